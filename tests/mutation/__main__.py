"""``python -m tests.mutation``: plant defects in the mathematics and the data code; do the tests notice?

The mutants are Cosmic Ray's. Each is tried in a forked process, which imports the package with one
file changed in memory and runs that file's tests; torch and the other libraries are imported once,
before any fork, which is what makes thousands of mutants affordable. Nothing on disk is changed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import json
import os
import platform
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import CodeType
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from rich.progress import Progress

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lora_dpo"
# The tests that hold a file's laws, the quickest and sharpest first: the first failure ends a trial.
TESTS: Mapping[str, tuple[str, ...]] = {
    "objectives": (
        "objectives/test_vectors.py",
        "objectives/test_bound.py",
        "objectives/test_values.py",
        "objectives/test_contract.py",
        "objectives/test_planted.py",
        "objectives/test_optimum.py",
    ),
    "logprobs.py": ("test_logprobs.py", "test_statistics.py", "test_forward.py"),
    "data": ("data",),
}
SECONDS = 240  # of a trial; a mutant that hangs is noticed too
# Names of no fault: a decorator that is gone is an objective that is gone, and reads as one.
LEFT_OUT = ("core/RemoveDecorator", "core/VariableReplacer", "core/VariableInserter", "core/NoOp")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "pytest",
             "scipy.stats", "scipy.optimize", "pandas", "yaml")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file with one change: the place, the operator, and the line before and after."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str


def places(path: Path) -> Iterator[tuple[Path, int, str, int]]:
    """Every place of a file where an operator changes something: file, line, operator, occurrence."""
    nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
    for name in operator_names():
        if not name.startswith(LEFT_OUT):
            operator = get_operator(name)()
            positions = (p for node in nodes for p in operator.mutation_positions(node))
            for occurrence, ((line, _), _) in enumerate(positions):
                yield path, line, name, occurrence


def planted(path: Path, line: int, operator: str, occurrence: int) -> Mutant | None:
    """Return the mutant of a place; None where it does the same, as in an annotation."""
    source = path.read_text(encoding="utf-8")
    try:
        changed = mutate_code(source, get_operator(operator)(), occurrence)
    except AttributeError:  # Cosmic Ray's own, on ``except package.Error``
        return None
    if changed is None or _meaning(changed) == _meaning(source):
        return None
    old, new = (text.splitlines()[line - 1].strip() for text in (source, changed))
    return Mutant(path.relative_to(ROOT).as_posix(), line, operator, occurrence, old, new)


def _meaning(source: str) -> str:
    """Return a file without annotations and docstrings; two that agree do the same."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return ast.dump(tree)


def _is_text(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def try_out(mutant: Mutant | None, tests: Sequence[str], tell: Path) -> int:
    """Run tests in this (forked) process with the mutant in place of its file; return the status."""
    os.setsid()
    if mutant is not None:
        target, changed = str(ROOT / mutant.file), _changed(mutant)
        original = SourceFileLoader.get_code

        def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
            if self.path == target:
                return compile(changed, target, "exec")
            return original(self, fullname)

        SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]
    import pytest

    said = io.StringIO()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line"]
    # a library's plugin was imported before pytest could rewrite its assertions
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with redirect_stdout(said), redirect_stderr(said):
        status = int(pytest.main([*options, *tests]))
    tell.write_text(said.getvalue(), encoding="utf-8")
    return status


def _changed(mutant: Mutant) -> str:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    found = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert found is not None
    return str(found)


class Trials:
    """Runs mutants in forked processes, so many at a time.

    Args:
        jobs: processes at a time.
        folder: for what the tests say.
    """

    def __init__(self, jobs: int, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self._running: dict[int, tuple[Mutant | None, float]] = {}

    def outcomes(self, waiting: Sequence[Mutant | None], tests: Sequence[str]) -> Iterator[Any]:
        """Yield each mutant with ``survived``, ``killed`` or ``timeout``."""
        left = list(waiting)
        while left or self._running:
            while left and len(self._running) < self.jobs:
                self._start(left.pop(0), tests)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                mutant, _ = self._running.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                yield mutant, {0: "survived", -signal.SIGKILL: "timeout"}.get(code, "killed")
            else:
                self._end_late_ones()
                time.sleep(0.05)

    def _start(self, mutant: Mutant | None, tests: Sequence[str]) -> None:
        tell = self.folder / "last-trial.txt"
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(try_out(mutant, tests, tell))
            except BaseException:  # the parent's own work is not the child's to go on with
                tell.write_text(traceback.format_exc(), encoding="utf-8")
                os._exit(99)
        self._running[pid] = (mutant, time.monotonic())

    def _end_late_ones(self) -> None:
        for pid, (_, began) in self._running.items():
            if time.monotonic() - began > SECONDS:
                os.killpg(pid, signal.SIGKILL)


def tests_of(file: str) -> list[str]:
    """Return the test files that hold the laws of a file of the package."""
    room = file.split("/")[1]
    return [str(ROOT / "tests" / name) for name in TESTS[room]]


def main() -> int:
    """Try mutants, write the counts and every survivor, and return how many survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--sample", type=int, help="so many of each room; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    for name in LIBRARIES:
        importlib.import_module(name)
    trials = Trials(given.jobs, given.out.absolute().parent)
    table: dict[str, Any] = {}
    survivors: list[dict[str, Any]] = []
    for room in given.rooms:
        path = PACKAGE / room
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        every = [place for file in files for place in places(file)]
        random.Random(given.seed).shuffle(every)
        wanted = given.sample or len(every)
        found = (mutant for place in every if (mutant := planted(*place)) is not None)
        drawn = list(islice(found, wanted))
        tests = tests_of(f"lora_dpo/{room}")
        ((_, healthy),) = trials.outcomes([None], tests)
        if healthy != "survived":
            print((trials.folder / "last-trial.txt").read_text())
            raise SystemExit(f"{room}: its tests fail without any mutant ({healthy})")
        counts: Counter[str] = Counter()
        with Progress() as progress:
            task = progress.add_task(room, total=len(drawn))
            for mutant, outcome in trials.outcomes(drawn, tests):
                counts[outcome] += 1
                if outcome == "survived":
                    survivors.append(asdict(mutant))
                    progress.print(
                        f"{mutant.file}:{mutant.line}  {mutant.before}  ->  {mutant.after}"
                    )
                progress.advance(task)
        table[room] = {"places": len(every), "tried": len(drawn), **counts}
        print(room, table[room], flush=True)
        facts = {"python": platform.python_version(), "cosmic_ray": version("cosmic-ray")}
        record = {"versions": facts, "seed": given.seed, "rooms": table, "survivors": survivors}
        given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(0 if main() >= 0 else 1)
