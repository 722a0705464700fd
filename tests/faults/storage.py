"""Disks that are full or read-only, files that are damaged, folders that two processes want."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.checkpoints import STATE, list_checkpoints
from lora_dpo.store import MANIFEST, read_json, write_json, write_manifest
from tests.faults.checks import WEIGHTS, Whole, check_end, check_nothing_half
from tests.faults.kills import _logged
from tests.faults.world import SETTINGS, Trial, World, kill_when

STORED = "stored reference, constant with warm-up"


class NotHereError(Exception):
    """This machine does not let us make that fault."""


@dataclass(frozen=True)
class Tried:
    """A fault that was tried once, and what came of it."""

    fault: str
    outcome: str


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """Mount a small disk of its own there; yields what changes its options.

    Raises:
        NotHereError: mounting is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotHereError("there is no mount command") from None
    if done.returncode:
        raise NotHereError(f"mounting is not allowed ({done.stderr.strip()})")

    def change(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield change
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(trial: Trial, said: str, *options: str) -> str:
    """Start a run that cannot go on: one message, exit code 1."""
    text = trial.ended(trial.train(*options), code=1)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in text, f"{trial.log}: {text[-2000:]}"
    return errors[0]


def full_disk(
    world: World,
    name: str,
    expected: Whole,
    shares: Sequence[float] = (0.02, 0.2, 0.4, 0.6, 0.8, 0.95),
) -> Iterator[Tried]:
    """A run on a disk that is full sooner or later; then it is made larger."""
    files = [path for path in expected.trial.run.rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // 4096) for path in files)
    for share in shares:
        trial = world.trial(f"full-{share}", {**SETTINGS[name], "train.save_total_limit": 99})
        with disk(trial.run, f"size={int(pages * share * 4)}k") as change:
            told = refused(trial, "could not be written", "--resume")
            check_nothing_half(trial, expected)
            kept = list_checkpoints(trial.run)
            change("size=256m")
            assert list_checkpoints(trial.run) == kept
            trial.ended(trial.train("--resume"))
            check_end(trial, expected)
        assert "make room" in told
        yield Tried("disk full under the run", "one error; once there is room, the same end")


def full_cache_disk(world: World, expected: Whole) -> Iterator[Tried]:
    """Caches that take nothing: the run goes on without them."""
    trial = world.trial("full-cache", SETTINGS[STORED])
    with disk(trial.cache, "size=16k"), disk(trial.store, "size=8k"):
        text = trial.ended(trial.train())
        assert "could not be kept" in text and "could not be written" in text
        check_end(trial, expected)
    yield Tried("disk full under both caches", "two warnings, the same end")


def read_only(world: World, name: str, expected: Whole) -> Iterator[Tried]:
    """A folder that cannot be written to, before the run and in its midst."""
    trial = world.trial("read-only", SETTINGS[name])
    with disk(trial.run, "ro,size=64m") as change:
        for options in ((), ("--resume",)):
            refused(trial, "cannot be written", *options)
            yield Tried("output folder read-only", "one error before anything is loaded")
        change("rw")
        process = trial.train()
        assert kill_when(process, _logged(trial, 9), 0)
        change("ro")
        before = sorted(trial.run.rglob("*"))
        refused(trial, "cannot be written", "--resume")
        assert sorted(trial.run.rglob("*")) == before
        change("rw")
        trial.ended(trial.train("--resume"))
        check_end(trial, expected)
    yield Tried("output folder read-only in mid-run", "one error; when it is mended, the same end")


def stopped(world: World, name: str, step: int = 11) -> Trial:
    """Return a run that was killed behind a step, with two whole checkpoints."""
    trial = world.trial(f"stopped-{step}", SETTINGS[name])
    assert kill_when(trial.train(), _logged(trial, step), 0)
    assert len(list_checkpoints(trial.run)) == 2
    return trial


def copied(world: World, of: Trial, name: str) -> Trial:
    """Return a copy of a run and its caches."""
    trial = world.trial(name, of.settings)
    for part in ("run", "cache", "store"):
        if (of.folder / part).is_dir():
            shutil.copytree(of.folder / part, trial.folder / part)
    return trial


def flip(world: World, path: Path, share: float = 1.0) -> None:
    """Change one bit of a file, in its first part."""
    content = bytearray(path.read_bytes())
    content[world.random.randrange(int(len(content) * share))] ^= 1 << world.random.randrange(8)
    path.write_bytes(content)


def truncate(world: World, path: Path) -> None:
    """Leave the first bytes of a file."""
    os.truncate(path, world.random.randrange(path.stat().st_size))


def damaged_checkpoints(world: World, name: str, expected: Whole) -> Iterator[Tried]:
    """Every file of the newest checkpoint, truncated and with a bit flipped; then all checkpoints."""
    source = stopped(world, name)
    newest = list_checkpoints(source.run)[-1]
    for path in sorted(p.relative_to(source.run) for p in newest.rglob("*") if p.is_file()):
        for damage in (truncate, flip):
            trial = copied(world, source, f"{damage.__name__}-{path.name}")
            damage(world, trial.run / path)
            text = trial.ended(trial.train("--resume"))
            assert "left alone: " in text, f"{trial.log}: damage not told"
            check_end(trial, expected)
            what = "truncated" if damage is truncate else "with a flipped bit"
            yield Tried(
                f"a file of the newest checkpoint {what}",
                "named; on from the one before, the same end",
            )
    trial = copied(world, source, "all-damaged")
    for folder in list_checkpoints(trial.run):
        flip(world, folder / WEIGHTS)
    before = {p: p.read_bytes() for p in trial.run.rglob("*") if p.is_file()}
    refused(trial, "nothing to resume from", "--resume")
    refused(trial, "nothing to resume from")
    assert {p: p.read_bytes() for p in trial.run.rglob("*") if p.is_file()} == before
    yield Tried("every checkpoint damaged", "one error, nothing touched")
    trial = copied(world, source, "metrics-damaged")
    flip(world, trial.run / "metrics.jsonl", 0.5)  # of what the checkpoint had seen
    text = trial.ended(trial.train("--resume"))
    assert "is not what it was" in text, f"{trial.log}: damage not told"
    check_end(trial, expected)
    yield Tried("metrics.jsonl with a flipped bit", "named, written again from the checkpoint")
    trial = copied(world, source, "older-checkpoint")
    for folder in list_checkpoints(trial.run):
        state = read_json(folder / STATE)
        facts = read_json(folder / MANIFEST)["facts"]
        write_json(folder / STATE, {key: state[key] for key in state if key != "loss"})
        write_manifest(folder, facts)
    refused(trial, "written by another version", "--resume")
    yield Tried("checkpoints of another version", "one error, nothing touched")


def damaged_caches(world: World, expected: Whole) -> Iterator[Tried]:
    """Entries that are damaged, or of another version, are made again."""
    source = expected.trial

    def rerun(name: str, change: Callable[[Trial, Path], Any], fault: str) -> Tried:
        trial = copied(world, source, f"cache-{name}")
        shutil.rmtree(trial.run)
        for entry in sorted((trial.cache / "tokenised").glob("[!.]*")):
            change(trial, entry)
        trial.ended(trial.train())
        check_end(trial, expected)
        return Tried(fault, "made again, the same end")

    def manifest_of(entry: Path) -> dict[str, Any]:
        facts: dict[str, Any] = read_json(entry / MANIFEST)["facts"]
        return facts

    def older_facts(trial: Trial, entry: Path) -> None:
        facts = manifest_of(entry)
        write_json(entry / "facts.json", {"report": read_json(entry / "facts.json")["report"]})
        write_manifest(entry, facts)

    def other_features(trial: Trial, entry: Path) -> None:
        facts, path = manifest_of(entry), entry / "rows" / "dataset_info.json"
        text = path.read_text().replace('"Value"', '"NoSuchFeature"')
        path.write_text(text)
        write_manifest(entry, facts)

    def older_manifest(trial: Trial, entry: Path) -> None:
        manifest = read_json(entry / MANIFEST)
        (entry / MANIFEST).write_text(json.dumps({k: manifest[k] for k in ("facts", "files")}))

    def in_store(trial: Trial, entry: Path) -> None:
        for path in trial.store.glob("*/*.logps"):
            flip(world, path)

    names = sorted(
        p.relative_to(entry)
        for entry in [next((source.cache / "tokenised").glob("[!.]*"))]
        for p in entry.rglob("*")
        if p.is_file()
    )
    for name in names:
        change = flip if world.random.random() < 0.5 else truncate
        yield rerun(
            name.name, lambda t, e, n=name, c=change: c(world, e / n), "a cache of tokens damaged"
        )
    for older in (older_facts, other_features, older_manifest):
        yield rerun(older.__name__, older, "a cache of tokens of another version")
    if source.store.is_dir():
        yield rerun("store", in_store, "stored reference log-probs damaged")


def two_in_one_folder(world: World, name: str, expected: Whole, serial: int) -> Iterator[Tried]:
    """Both started at once: one trains, the other says so and changes nothing."""
    trial = world.trial(f"two-in-one-{serial}", SETTINGS[name])
    first, log = trial.train(), trial.log
    second = trial.train(*world.random.choice([(), ("--resume",)]))
    for process in (first, second):
        process.join(300)
    codes = sorted([first.exitcode, second.exitcode], key=str)
    texts = log.read_text() + trial.log.read_text()
    assert codes == [0, 1], f"{trial.folder}: {codes}\n{texts[-2000:]}"
    assert texts.count("error: ") == 1 and "Traceback" not in texts
    assert "another process" in texts or "exists already" in texts, texts[-2000:]
    check_end(trial, expected)
    yield Tried("two runs in one output folder", "one trains, the other is refused")


def two_on_one_cache(world: World, expected: Whole, serial: int) -> Iterator[Tried]:
    """Two runs fill one cache of tokens and one store; with luck one is killed."""
    shared = world.folder / f"shared-{serial}"
    trials = [world.trial(f"beside-{serial}-{i}", SETTINGS[STORED]) for i in range(2)]
    for trial in trials:
        trial.environment["LORA_DPO_CACHE"] = str(shared)
        text = trial.path.read_text().replace(str(trial.store), str(shared / "store"))
        trial.path.write_text(text)
    processes = [trial.train() for trial in trials]
    if serial % 2:
        kill_when(processes[0], lambda: any(shared.glob("store/*/*.logps")), 0)
    else:
        trials[0].ended(processes[0])
    trials[1].ended(processes[1])
    trials[0].ended(trials[0].train("--resume"))
    for trial in trials:
        check_end(trial, expected)
    left = [p for p in (shared / "tokenised").glob(".*")]
    assert not left, left
    yield Tried("two processes fill one cache", "the same end for both")
