"""Pairs and labelled rows read as single answers: both of a pair, or the wanted ones alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora_dpo.data.records import Labelled, Pair
from lora_dpo.data.report import DataReport, excerpt

UNWANTED = "dropped: unwanted answer, and demonstrations are wanted ones"
EARLIER = "noted: earlier assistant turns stay in the prompt; the last one alone is trained"


def both_answers(pair: Pair) -> tuple[Labelled, Labelled]:
    """Return the wanted and the unwanted answer of a pair."""
    return (
        Labelled(pair.prompt, pair.chosen, True, pair.origin, pair.tools),
        Labelled(pair.prompt, pair.rejected, False, pair.origin, pair.tools),
    )


def demonstrations(rows: Iterable[Pair | Labelled], report: DataReport) -> Iterator[Labelled]:
    """Yield the wanted answers: the chosen side of pairs, and rows that no label says no of.

    What is left out, and conversations with more than one answer, are counted in ``report``.
    """
    for row in rows:
        single = row if isinstance(row, Labelled) else both_answers(row)[0]
        if not single.label:
            shown = single.completion if isinstance(single.completion, str) else "messages"
            report.add(UNWANTED, single.origin, excerpt(shown))
            continue
        turns = () if isinstance(single.prompt, str) else single.prompt
        if any(turn["role"] == "assistant" for turn in turns):
            report.add(EARLIER, single.origin)
        yield single
