"""The worker in this process and in a group of processes, started as users start it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.conftest import ROOT
from tests.processes.worker import DONE, Case, run, write_plan

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


def called(
    command: list[str], look: Callable[[], None] = lambda: None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command from the checkout, each process on one thread.

    Args:
        command: with its words.
        look: called each second while it runs.
        environment: beside this process's own.
    """
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=own, stdout=pipe, stderr=pipe, text=True
    ) as process:
        end = time.monotonic() + 900
        while True:
            try:
                out, err = process.communicate(timeout=1)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                look()
                if time.monotonic() > end:
                    process.kill()
                    raise


def bar(what: str, total: int) -> Any:
    """Return a progress bar on the terminal behind pytest's capture; elsewhere nothing is shown."""
    terminal = sys.__stderr__
    quiet = terminal is None or not terminal.isatty()
    return tqdm(desc=what, total=total, unit="case", file=terminal, disable=quiet)


def together(cases: list[Case], model: Path, pairs: list[dict[str, str]], out: Path) -> Results:
    """Train the cases in one group of two processes; return the results of each."""
    out.mkdir(parents=True, exist_ok=True)
    write_plan(out / "plan.json", cases, model, pairs)
    done = out / DONE
    with bar("two processes", len(cases)) as progress:

        def look() -> None:
            names = done.read_text().splitlines() if done.is_file() else []
            progress.set_postfix_str(names[-1] if names else "")
            progress.update(len(names) - progress.n)

        command = torchrun("tests.processes.worker", str(out / "plan.json"), str(out))
        ended = called(command, look)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads((out / f"results-{number}.json").read_text()) for number in range(2)]


def alone(cases: list[Case], model: Path, pairs: list[dict[str, str]], out: Path) -> dict[str, Any]:
    """Train the cases in this process."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    with bar("one process", len(cases)) as progress:
        for case in cases:
            progress.set_postfix_str(case.name)
            results[case.name] = run(case, model, pairs, out)
            progress.update()
    return results
