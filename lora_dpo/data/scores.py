"""What data say of an answer's worth: scores under their many names, and rankings as pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

from lora_dpo.data.messages import shown
from lora_dpo.data.problems import BadRow, Problems
from lora_dpo.data.readers import Raw, Table
from lora_dpo.data.report import DataReport

RankingPairs = Literal["best-worst", "adjacent", "best-rest", "all"]
RULES: tuple[str, ...] = get_args(RankingPairs)
# Our names, and those that published data sets use; "margin" is the difference alone.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "score_chosen": ("chosen_score", "chosen-rating", "chosen_rating", "rating_chosen"),
    "score_rejected": ("rejected_score", "rejected-rating", "rejected_rating", "rating_rejected"),
}
MARGIN = "margin"
_LISTS = ("completions", "responses", "answers")
_NUMBERS = ("scores", "ratings", "ranks", "rank")
_TEXTS = ("response", "completion", "answer", "text", "content", "output")
# UltraFeedback's overall_score is known to hold wrong tens; the mean of its four aspects is not.
_WORTHS = ("score", "rating", "fine-grained_score", "overall_score", "rank")
_TIES = "dropped: ranking in which all answers are worth the same"


@dataclass(frozen=True)
class _Answer:
    value: Any
    worth: float  # the higher the better
    score: float | None  # None where only ranks are known


def name_scores(table: Table) -> None:
    """Give columns of scores our names, in place, where they stand under another usual one."""
    found = set(table.columns)
    moves = {
        theirs: ours
        for ours, usual in SPELLINGS.items()
        if ours not in found
        for theirs in [next((name for name in usual if name in found), "")]
        if theirs
    }
    takes_margin = MARGIN in found and not (set(SPELLINGS) & (found | set(moves.values())))
    if not moves and not takes_margin:
        return
    for i, raw in enumerate(table.rows):
        values = {moves.get(key, key): value for key, value in raw.values.items()}
        if takes_margin and (margin := values.pop(MARGIN, None)) is not None:
            values |= {"score_chosen": margin, "score_rejected": 0.0}
        table.rows[i] = Raw(raw.origin, values)


def to_score(value: Any, name: str) -> float | None:
    """Return a cell as a score; None where there is none."""
    if value is None or value == "":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if isinstance(value, bool) or not math.isfinite(score):
        raise BadRow(f"{name} is {shown(value)}; expected a number.")
    return score


def expand_rankings(
    table: Table, rule: RankingPairs, report: DataReport, problems: Problems
) -> Table:
    """Return a table of pairs where rows hold several answers with scores or ranks.

    Answers are put in order of their worth, and pairs are taken by ``rule``: ``best-worst`` (one
    pair), ``adjacent`` (k - 1 pairs of neighbours), ``best-rest`` (k - 1 pairs with the best), or
    ``all`` (each with each). A pair of equal worth is no preference and is left out. A table of
    another shape comes back as it is.
    """
    several = any(holds_answers(raw.values) for raw in table.rows)
    if not several or {"chosen", "rejected"} & set(table.columns):
        return table
    rows: list[Raw] = []
    for raw in table.rows:
        try:
            answers = _answers(raw.values)
        except BadRow as bad:
            problems.add(raw.origin, str(bad))
            continue
        pairs = list(_pairs(answers, rule))
        if not pairs:
            report.read += 1
            report.add(_TIES, raw.origin)
            continue
        # one row of the file became several
        report.read -= len(pairs) - 1
        report.added += len(pairs) - 1
        rows += [Raw(raw.origin, _pair_row(raw.values, better, worse)) for better, worse in pairs]
    report.add(
        f"noted: rankings made into pairs (ranking_pairs: {rule})",
        table.rows[0].origin,
        count=len(table.rows),
    )
    return Table(table.name, rows)


def holds_answers(values: Mapping[str, Any]) -> bool:
    """Whether a row holds several answers under one of their usual names."""
    return bool(_column(values, _LISTS))


def answer_values(values: Mapping[str, Any]) -> list[Any]:
    """Return the answers of a row that holds several, without their scores."""
    name = _column(values, _LISTS)
    return [_text(item, f"{name}[{i}]") for i, item in enumerate(values.get(name) or ())]


def _column(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(values.get(name), (list, tuple))), "")


def _answers(values: Mapping[str, Any]) -> list[_Answer]:
    name = _column(values, _LISTS)
    items = values.get(name) if name else None
    if not isinstance(items, (list, tuple)) or len(items) < 2:
        raise BadRow(f"{name or _LISTS[0]} is {shown(items)}; expected a list of answers.")
    numbers = _column(values, _NUMBERS)
    if all(isinstance(item, Mapping) and _known(item, _WORTHS) for item in items):
        return [_of_mapping(item, f"{name}[{i}]") for i, item in enumerate(items)]
    if not numbers:
        raise BadRow(
            f"{name} holds {len(items)} answers without a score; expected {_WORTHS[0]} in each, or a "
            f"list of numbers beside it ({', '.join(_NUMBERS)})."
        )
    given = values[numbers]
    if len(given) != len(items):
        raise BadRow(f"{numbers} has {len(given)} numbers for the {len(items)} {name}.")
    return [
        _answer(_text(item, f"{name}[{i}]"), number, numbers, f"{numbers}[{i}]")
        for i, (item, number) in enumerate(zip(items, given, strict=True))
    ]


def _of_mapping(item: Mapping[str, Any], where: str) -> _Answer:
    key = _known(item, _WORTHS)
    return _answer(_text(item, where), item[key], key, f"{where}.{key}")


def _answer(value: Any, number: Any, key: str, where: str) -> _Answer:
    worth = to_score(number, where)
    if worth is None:
        raise BadRow(f"{where} is {shown(number)}; expected a number.")
    if key.startswith("rank"):
        return _Answer(value, -worth, None)  # 1 is the best
    return _Answer(value, worth, worth)


def _text(item: Any, where: str) -> Any:
    if isinstance(item, Mapping) and "role" not in item:
        key = _known(item, _TEXTS)
        if not key:
            raise BadRow(f"{where} has no text; expected one of {', '.join(_TEXTS)}.")
        return item[key]
    return item


def _known(item: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if item.get(name) is not None), "")


def _pairs(answers: Sequence[_Answer], rule: RankingPairs) -> Iterator[tuple[_Answer, _Answer]]:
    ordered = sorted(answers, key=lambda answer: -answer.worth)
    if rule == "best-worst":
        found = [(ordered[0], ordered[-1])]
    elif rule == "adjacent":
        found = list(pairwise(ordered))
    elif rule == "best-rest":
        found = [(ordered[0], answer) for answer in ordered[1:]]
    else:
        found = list(combinations(ordered, 2))
    return ((better, worse) for better, worse in found if better.worth > worse.worth)


def _pair_row(values: Mapping[str, Any], better: _Answer, worse: _Answer) -> dict[str, Any]:
    rest = {k: v for k, v in values.items() if k not in (*_LISTS, *_NUMBERS)}
    scores = {"score_chosen": better.score, "score_rejected": worse.score}
    return {**rest, "chosen": better.value, "rejected": worse.value, **scores}
