"""Two runs side by side: log lines, held-out metrics, adapters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_dpo.checkpoints import list_checkpoints
from lora_dpo.reproducing.result import Difference, Twin
from lora_dpo.sealing import check_seal
from lora_dpo.store import file_sha256, read_manifest

_WEIGHTS = "adapter_model.safetensors"
_OF_THE_CLOCK = ("_per_second", "_runtime")
_OF_THE_MACHINE = ("memory/",)

Line = Mapping[str, Any]
Key = tuple[int, str, int]


def keyed(history: Iterable[Line], until: int) -> dict[Key, dict[str, float]]:
    """Return the figures of log lines up to a step, by step, kind and number of the line.

    Times and memory are left out: they are no part of what a config decides.
    """
    counts: Counter[tuple[int, str]] = Counter()
    found: dict[Key, dict[str, float]] = {}
    for line in history:
        if (step := int(line["step"])) > until:
            continue
        kind = _kind(line)
        counts[step, kind] += 1
        found[step, kind, counts[step, kind]] = {
            name: float(value)
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step" and _counts(name)
        }
    return found


def compare_lines(
    was: Mapping[Key, Mapping[str, float]],
    now: Mapping[Key, Mapping[str, float]],
    *,
    ended: bool,
) -> tuple[list[Difference], list[str], int]:
    """Return figures that differ, lines that one side lacks, and how many figures were compared.

    Args:
        was: of the first run.
        now: of the second.
        ended: whether the first came to its end; else what only the second has is no fault.
    """
    differing: list[Difference] = []
    missing = [f"{_named(key)} of the second run" for key in was if key not in now]
    if ended:
        missing += [f"{_named(key)} of the first run" for key in now if key not in was]
    count = 0
    for key in (key for key in was if key in now):
        names = list({**was[key], **now[key]})
        count += len(names)
        differing += compare_figures(f"step {key[0]}", names, was[key], now[key])
    return differing, missing, count


def compare_figures(
    where: str, names: Sequence[str], was: Mapping[str, float], now: Mapping[str, float]
) -> Iterator[Difference]:
    """Yield the figures that are not the same; one that a side lacks is no number there."""
    for name in names:
        pair = was.get(name, math.nan), now.get(name, math.nan)
        both_none = name in was and name in now and all(map(math.isnan, pair))
        if pair[0] != pair[1] and not both_none:
            yield Difference(where, name, *pair)


def held_out(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out figures of ``run.json`` with their intervals."""
    found = (results.get("held_out") or {}).get("mean_low_high") or {}
    ends = ("", ", low", ", high")
    return {
        f"{name}{end}": float(value)
        for name, values in found.items()
        for end, value in zip(ends, values, strict=True)
    }


def check_kept(run: Path) -> None:
    """Hold that the adapters of a run are what it wrote, before it is run again.

    Raises:
        OutputError: names the file that is another.
    """
    for path in list_checkpoints(run):
        read_manifest(path)
    check_seal(run / "adapter")


def compare_adapters(was: Path, now: Path, *, ended: bool) -> Iterator[Twin]:
    """Yield the adapters that both runs have: of checkpoints, and of the end."""
    theirs = {path.name for path in list_checkpoints(now)}
    for path in list_checkpoints(was):
        if path.name in theirs:
            yield _twin(f"step {path.name.rpartition('-')[2]}", path, now / path.name)
    if ended:
        yield _twin("the end", was / "adapter", now / "adapter")


def _twin(where: str, was: Path, now: Path) -> Twin:
    first, second = was / _WEIGHTS, now / _WEIGHTS
    if file_sha256(first) == file_sha256(second):
        return Twin(where, True, 0.0)
    mine, theirs = load_file(first), load_file(second)
    shapes = [{name: value.shape for name, value in part.items()} for part in (mine, theirs)]
    if shapes[0] != shapes[1]:
        return Twin(where, False, math.inf)
    squares = sum(float((mine[k].double() - theirs[k].double()).square().sum()) for k in mine)
    size = sum(float(value.double().square().sum()) for value in mine.values())
    apart = math.sqrt(squares / size) if size else math.sqrt(squares)
    return Twin(where, all(_same_bytes(mine[k], theirs[k]) for k in mine), apart)


def _same_bytes(mine: Any, theirs: Any) -> bool:
    """Equal in dtype and in every bit; files may differ in their headers alone."""
    import torch

    same: bool = mine.dtype == theirs.dtype and torch.equal(
        mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
    )
    return same


def _kind(line: Line) -> str:
    if "train_runtime" in line:
        return "end"
    return "evaluation" if any(name.startswith("eval_") for name in line) else "training"


def _counts(name: str) -> bool:
    return not (
        name.endswith(_OF_THE_CLOCK) or name.removeprefix("eval_").startswith(_OF_THE_MACHINE)
    )


def _named(key: Key) -> str:
    step, kind, number = key
    again = f" ({number})" if number > 1 else ""
    return f"step {step}: the {kind} line{again}"
