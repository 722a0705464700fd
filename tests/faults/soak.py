"""Thousands of steps of a tiny run: does anything grow that should not?

python -m tests.faults.soak --steps 4000 --out docs/reliability.md
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lora_dpo.stepping import step_of
from tests.faults import page
from tests.faults.checks import logged_step
from tests.faults.world import World, _command

RESIDENT, ALLOCATED = 8.0, 4.0  # MiB that may be gained over the last two thirds
BEAT = 0.25  # seconds between two looks at memory
# The median CPU time of a step in the last quarter, over that in the second one. What grew with the steps
# would come to 7/8 over 3/8 = 2.3; a busy machine takes wall time, not this.
SLOWER = 1.4
# Bytes a step of the files that grow with the run, and of all others beside checkpoints together.
GROWING = {"metrics.jsonl": 2000, "row_margins.jsonl": 500, "notes.jsonl": 20}
REST = 2**20

_COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
_COUNTS += ("uordblks", "fordblks", "keepcost")


class _Allocated(ctypes.Structure):
    """What glibc's allocator says of itself (``mallinfo2``)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS]


def _watched(
    words: tuple[str, ...], log: str, environment: dict[str, str], beats: str, metrics: str
) -> None:
    """Run the command beside a thread that writes down CPU time, step, and memory in bytes."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Allocated

    def look() -> None:
        with open(beats, "w", encoding="utf-8") as stream:
            while True:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                found = library.mallinfo2()
                resident = pages * os.sysconf("SC_PAGE_SIZE")
                allocated, spent = found.uordblks + found.hblkhd, time.process_time()
                step = _tail_step(Path(metrics))
                stream.write(f"{spent} {step} {resident} {allocated}\n")
                stream.flush()
                time.sleep(BEAT)

    threading.Thread(target=look, daemon=True).start()
    _command(words, log, environment)


def soak(folder: Path, steps: int) -> tuple[str, list[str]]:
    """Run so many steps; return the table and what did not hold."""
    world = World.make(folder, 0)
    every = max(steps // 40, 20)
    trial = world.trial(
        "soak",
        {
            "train.max_steps": steps,
            "train.save_steps": every,
            "train.eval_steps": every,
            "lora.dropout": 0.1,
        },
    )
    beats, (sizes, kept) = folder / "beats.txt", ([], [])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    words, environment = ("train", str(trial.path)), {"LORA_DPO_CACHE": str(trial.cache)}
    metrics = trial.run / "metrics.jsonl"
    told = (str(beats), str(metrics))
    process = context.Process(target=_watched, args=(words, str(trial.log), environment, *told))
    process.start()
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        while process.is_alive():
            process.join(1)
            bar.update(_tail_step(metrics) - bar.n)
            folders = list(trial.run.glob("checkpoint-*/manifest.json"))
            kept.append(len(folders))
            late = [p.parent for p in folders if step_of(str(p.parent)) > steps // 3]
            sizes += [_size(path) for path in late[:1]]  # it may be deleted while it is looked at
    assert process.exitcode == 0, trial.log.read_text()[-3000:]
    assert logged_step(trial) == steps
    return _judged(trial.run, beats, steps, sizes, kept)


def _judged(
    run: Path, beats: Path, steps: int, sizes: list[int], kept: list[int]
) -> tuple[str, list[str]]:
    table = np.array([line.split() for line in beats.read_text().splitlines()], dtype=float)
    table = table[table[:, 1] > 0]  # from the first step on
    third = len(table) // 3
    tried = table[third:, 2:] / 2**20  # [beats, 2], MiB
    tenth = max(len(tried) // 10, 1)
    gained = np.median(tried[-tenth:], 0) - np.median(tried[:tenth], 0)
    rows: list[tuple[str, str | int, str]] = [
        (
            "resident memory (MiB), gained over the last two thirds",
            f"{gained[0]:+.1f}",
            f"{RESIDENT:.0f}",
        ),
        ("allocated by malloc (MiB), likewise", f"{gained[1]:+.1f}", f"{ALLOCATED:.0f}"),
        ("resident memory at the end (MiB)", f"{tried[-1, 0]:.0f}", ""),
        (
            "CPU time of a step, median of the last quarter over that of the second",
            f"{slowing(table[:, 0], table[:, 1], steps):.2f}",
            str(SLOWER),
        ),
        (
            "a checkpoint, largest to smallest, likewise",
            f"{max(sizes) / min(filter(None, sizes)):.2f}",
            "1.5",
        ),
        ("whole checkpoints at a time", max(kept), "4"),
    ]
    beside = [p for p in run.rglob("*") if p.is_file() and "checkpoint-" not in str(p.parent)]
    each = {path.name: path.stat().st_size for path in beside if path.name in GROWING}
    rows += [
        (f"{name} (bytes a step)", f"{each.get(name, 0) / steps:.0f}", str(bound))
        for name, bound in GROWING.items()
    ]
    rest = sum(path.stat().st_size for path in beside if path.name not in GROWING)
    rows.append(("all other files of the run (KiB)", rest // 1024, str(REST // 1024)))
    failed = [
        f"{what}: {value}, bound {bound}"
        for what, value, bound in rows
        if bound and float(value) > float(bound)
    ]
    text = f"{steps} steps, every one logged; {page.machine()}."
    return f"{text}\n\n" + page.table(["what", "measured", "bound"], rows), failed


def slowing(spent: Any, at: Any, steps: int) -> float:
    """Return the median CPU time of a step in the last quarter, over that in the second one.

    Args:
        spent: seconds of CPU at each beat, ``[beats]``.
        at: the step at each beat, ``[beats]``.
        steps: of the run.
    """
    made = np.diff(at)
    each = np.diff(spent)[made > 0] / made[made > 0]
    place = at[1:][made > 0] / steps
    second = each[(place > 0.25) & (place <= 0.5)]
    return float(np.median(each[place > 0.75]) / np.median(second))


def _tail_step(path: Path) -> int:
    """Return the step of the last whole line, read from the end of the file."""
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - 8192, 0))
        for line in reversed(stream.read().split(b"\n")):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue
    return 0


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0


def main(words: list[str] | None = None) -> int:
    """Run the soak; exit with 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="of the run (4000)")
    parser.add_argument("--out", type=Path, help="the page whose table is written")
    args = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="lora-dpo-soak-"))
    text, failed = soak(folder, args.steps)
    if args.out:
        page.put(args.out, "soak", f"`python -m tests.faults.soak --steps {args.steps}`: {text}")
    print(text)
    for line in failed:
        print(f"does not hold: {line}", file=sys.stderr)
    shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
