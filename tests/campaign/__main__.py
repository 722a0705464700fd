"""``python -m tests.campaign``: run the campaign, and write what came out."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from lora_dpo.run_folder import versions
from tests.campaign.judging import Tally
from tests.campaign.running import SHARES, run_one

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- written by make campaign -->", "<!-- end of what make campaign writes -->"


def main() -> int:
    """Run it; return 1 where a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--cases", type=int, default=12_000, help="of data, configs and commands")
    parser.add_argument("--trained", type=int, default=60, help="files that are trained on, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind alone; nothing is written then")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "campaign.md")
    asked = parser.parse_args()
    began = time.monotonic()
    counts = {kind: round(asked.cases * share) for kind, share in SHARES.items()}
    counts["training"] = asked.trained
    kinds = [kind for kind in counts if asked.only in (None, kind)]
    # each kind in a process of its own: one that ends it is told, and the others go on
    with ProcessPoolExecutor(len(kinds), mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_one, place, kind, counts[kind], asked.seed)
            for place, kind in enumerate(kinds)
        ]
        tallies = [job.result() for job in jobs]
    told = report(tallies, asked.seed, time.monotonic() - began)
    print(told)
    for tally in tallies:
        for what, example in tally.defects.items():
            print(f"\nDEFECT, {tally.kind}: {what}\n  {example}")
    if asked.only is None:
        write(asked.to, told)
    return int(any(tally.defects for tally in tallies))


def report(tallies: list[Tally], seed: int, seconds: float) -> str:
    """Return a table of cases by kind and outcome, with what it depends on."""
    names = ["read", "refused", "wrong usage", "DEFECT"]
    titles = ["read and right", "refused, one message", "wrong usage", "law broken"]
    lines = [f"| input | {' | '.join(titles)} | cases |", "|---" * (len(names) + 2) + "|"]
    for tally in tallies:
        counts = " | ".join(str(tally.outcomes[name]) for name in names)
        lines.append(f"| {tally.kind} | {counts} | {tally.total} |")
    total = [sum(tally.outcomes[name] for tally in tallies) for name in names]
    lines.append(f"| all | {' | '.join(map(str, total))} | {sum(total)} |")
    known = versions()
    shown = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
    found = ", ".join(f"{name} {known[name]}" for name in shown)
    lines += [
        "",
        f"Seed {seed}, {seconds / 60:.0f} minutes; Python {platform.python_version()}, {found}.",
    ]
    return "\n".join(lines)


def write(path: Path, told: str) -> None:
    """Put the table into its page, between the marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{told}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
