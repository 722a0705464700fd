"""The parts of ``docs/reliability.md`` that programs write."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_dpo.run_folder import versions
from lora_dpo.store import write_text


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page."""
    page = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: no place for {name!r}; expected {begin.strip()} and {end}.")
    write_text(path, f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> str:
    """Return what the figures were taken on, in words, without names."""
    found = {k: v for k, v in versions().items() if k != "lora-dpo"}
    known = ", ".join(f"{name} {version}" for name, version in found.items())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    day = datetime.date.today().isoformat()
    return f"{day}; {cores} cores, {platform.system()} {platform.machine()}; {known}"
