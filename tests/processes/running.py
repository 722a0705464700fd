"""The worker in this process and in a group of processes, started as users start it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.processes.worker import Case, run, write_plan

Results = list[dict[str, Any]]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(*command: str, count: int = 2) -> list[str]:
    """Return the command that starts a module with so many processes."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    return [*head, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "-m", *command]


def called(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the checkout, each process on one thread."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        command, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=900
    )


def together(cases: list[Case], model: Path, pairs: list[dict[str, str]], out: Path) -> Results:
    """Train the cases in one group of two processes; return the results of each."""
    out.mkdir(parents=True, exist_ok=True)
    write_plan(out / "plan.json", cases, model, pairs)
    ended = called(torchrun("tests.processes.worker", str(out / "plan.json"), str(out)))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads((out / f"results-{number}.json").read_text()) for number in range(2)]


def alone(cases: list[Case], model: Path, pairs: list[dict[str, str]], out: Path) -> dict[str, Any]:
    """Train the cases in this process."""
    out.mkdir(parents=True, exist_ok=True)
    return {case.name: run(case, model, pairs, out) for case in cases}
