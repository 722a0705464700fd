"""From whatever the user names to checked preferences."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from lora_dpo.data.imitations import leaves
from lora_dpo.data.preferences import Kind, Preferences
from lora_dpo.data.problems import BadRow, DroppedRow, Problems, few, listing
from lora_dpo.data.readers import Raw, Table
from lora_dpo.data.records import Labelled, Origin, Pair, Text, digest
from lora_dpo.data.report import DataReport, excerpt
from lora_dpo.data.rows import IDENTICAL, RowReader
from lora_dpo.data.scores import RULES, RankingPairs, expand_rankings, name_scores
from lora_dpo.data.shapes import KNOWN_COLUMNS, Shape, recognise
from lora_dpo.data.singles import both_answers, demonstrations
from lora_dpo.data.sources import Source, Spec, open_spec, specs
from lora_dpo.errors import DataError, nearest

Row = Pair | Labelled
DEEPEST = 100  # of what messages and tools hold; a template walks through it


@dataclass(frozen=True)
class Rules:
    """What to do with rows that teach nothing or say the same twice."""

    identical: Literal["drop", "error"]
    empty: Literal["error", "drop"]
    duplicates: Literal["drop", "keep", "error"]
    transcripts: Literal["text", "messages"]
    min_margin: float | None
    ranking_pairs: RankingPairs


def load_preferences(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    kind: Kind | None = None,
    transcripts: Literal["text", "messages"] = "text",
    identical: Literal["drop", "error"] = "drop",
    empty: Literal["error", "drop"] = "error",
    duplicates: Literal["drop", "keep", "error"] = "drop",
    min_margin: float | None = None,
    ranking_pairs: RankingPairs = "best-worst",
    seed: int = 0,
) -> Preferences:
    """Read, recognise and check preferences.

    Args:
        source: a file, a folder, a hub id, rows in memory, or a list of sources, each of which may
            be ``{"path": ..., "weight": ..., "split": ...}``.
        columns: our column name -> the name in the data, where it differs.
        split: which split of a hub or saved dataset to read.
        kind: what the objective needs. Pairs asked for as ``"unpaired"`` give two rows each; as
            ``"demonstrations"`` their chosen side, and labelled rows those that are wanted. None
            takes the data as they are; answers without a label are demonstrations then.
        transcripts: keep "Human:/Assistant:" transcripts as text, or read them as messages.
        identical: what to do where chosen equals rejected.
        empty: what to do with a blank prompt or answer.
        duplicates: what to do with a row that occurred before.
        min_margin: the least that the score of chosen must be above that of rejected; other pairs
            are dropped, those without scores too.
        ranking_pairs: which pairs several answers with scores or ranks give: ``best-worst``,
            ``adjacent``, ``best-rest`` or ``all``.
        seed: chooses the rows that a fractional weight keeps.

    Raises:
        DataError: names file and row, for up to ten bad rows at once.
    """
    rules = Rules(identical, empty, duplicates, transcripts, min_margin, ranking_pairs)
    _check_options(rules, kind, columns)
    problems, report = Problems(), DataReport()
    tables = [(spec, _open(spec, problems)) for spec in specs(source, split)]
    problems.raise_if_any()
    _rename([table for _, group in tables for table in group], dict(columns or {}))
    shapes: list[tuple[Shape, str]] = []
    loaded: list[tuple[Spec, list[Row]]] = []
    for spec, group in tables:
        rows: list[Row] = []
        for table in group:
            name_scores(table)
            table = expand_rankings(table, ranking_pairs, report, problems)
            problems.raise_if_any()
            if not table.rows:
                continue
            shape = recognise(table, kind)
            shapes.append((shape, _why(table, shape, report)))
            rows += _read_table(table, shape, rules, report, problems)
        loaded.append((spec, rows))
    problems.raise_if_any()
    if not shapes:
        raise DataError("no rows are left:\n" + "\n".join(report.lines()))
    _check_shapes([shape for shape, _ in shapes], kind, rules, tables[0][1][0].name)
    if kind == "demonstrations":
        loaded = [(spec, list(demonstrations(rows, report))) for spec, rows in loaded]
    loaded = _without_duplicates(loaded, rules, report, problems)
    problems.raise_if_any()
    return _assemble(loaded, shapes, kind, report, seed)


def _check_options(rules: Rules, kind: str | None, columns: Mapping[str, str] | None) -> None:
    legal = {
        "identical": ("drop", "error"),
        "empty": ("error", "drop"),
        "duplicates": ("drop", "keep", "error"),
        "transcripts": ("text", "messages"),
        "ranking_pairs": RULES,
    }
    given = {name: getattr(rules, name) for name in legal} | {"kind": kind}
    for name, values in (legal | {"kind": (*get_args(Kind), None)}).items():
        if given[name] not in values:
            raise DataError(f"{name} is {given[name]!r}; expected one of {values}.")
    if rules.min_margin is not None and not (
        isinstance(rules.min_margin, (int, float)) and rules.min_margin >= 0
    ):
        raise DataError(f"min_margin is {rules.min_margin!r}; expected a number of at least 0.")
    for ours in columns or {}:
        if ours not in KNOWN_COLUMNS:
            raise DataError(
                f"columns: {ours!r} is not a column that we read; expected our name first, one of "
                f"{', '.join(KNOWN_COLUMNS)}.{nearest(ours, KNOWN_COLUMNS)}"
            )


def _open(spec: Spec, problems: Problems) -> list[Table]:
    return [table for table in open_spec(spec, problems) if table.rows]


def _rename(tables: Sequence[Table], columns: dict[str, str]) -> None:
    """Give the user's columns our names; a mapping that fits no file is an error."""
    fitting = set()
    for table in tables:
        found = table.columns
        for ours, theirs in columns.items():
            if theirs not in found and ours not in found:
                raise DataError(
                    f"{table.name}: columns maps {ours} to {theirs!r}, which is not there; columns "
                    f"found: {few(found)}.{nearest(theirs, found)}"
                )
            fitting |= {ours} if theirs in found else set()
        moved = {ours: theirs for ours, theirs in columns.items() if theirs in found}
        for i, raw in enumerate(table.rows):
            rest = {k: v for k, v in raw.values.items() if k not in {*moved, *moved.values()}}
            mine = {o: raw.values[t] for o, t in moved.items() if t in raw.values}
            table.rows[i] = Raw(raw.origin, mine | rest)
    if unused := [ours for ours in columns if ours not in fitting]:
        raise DataError(
            f"columns maps {unused[0]} to {columns[unused[0]]!r}, which is in no file; columns "
            f"found: {few(tables[0].columns)}."
        )


def _why(table: Table, shape: Shape, report: DataReport) -> str:
    chat = shape.form == "messages"
    used = shape.layout.used(chat)
    ignored = [name for name in table.columns if name not in used]
    why = f"{table.name}: columns {', '.join(shape.layout.columns)} ({shape.name})"
    if ignored:
        report.add(f"noted: columns ignored: {few(ignored)}", table.rows[0].origin)
        why += f"; ignored: {few(ignored)}"
    return why


def _read_table(
    table: Table, shape: Shape, rules: Rules, report: DataReport, problems: Problems
) -> list[Row]:
    reader, rows = RowReader(shape, rules.transcripts, report), []
    for raw in table.rows:
        report.read += 1
        try:
            row = reader.read(raw)
            _check_parts(row)
            _check_margin(row, rules.min_margin)
        except BadRow as bad:
            problems.add(raw.origin, str(bad))
        except RecursionError:
            problems.add(raw.origin, "lists or objects within each other, too deeply to be read.")
        except DroppedRow as drop:
            if rules.empty == "error" and drop.reason.startswith("dropped: empty"):
                name = drop.reason.split()[-1]
                problems.add(
                    raw.origin,
                    f"{name} is empty; expected text. Remove the row, or set "
                    "empty: drop to leave such rows out.",
                )
            elif rules.identical == "error" and drop.reason == IDENTICAL:
                problems.add(
                    raw.origin,
                    "chosen and rejected are identical; they must differ. "
                    "Remove the row, or set identical: drop to leave such rows out.",
                )
            else:
                report.add(drop.reason, raw.origin, drop.detail)
        else:
            rows.append(row)
    return rows


def _check_parts(row: Row) -> None:
    """Hold that no part is blank, that all text can be encoded, and that the answers differ."""
    names = ("prompt", "chosen", "rejected") if isinstance(row, Pair) else ("prompt", "completion")
    for name in names:
        part: Text = getattr(row, name)
        texts = [part] if isinstance(part, str) else [str(m["content"]) for m in part]
        calls = not isinstance(part, str) and any(m.get("tool_calls") for m in part)
        if not calls and not any(text.strip() for text in texts):
            raise DroppedRow(f"dropped: empty {name}")
        for text in texts if isinstance(part, str) else leaves(_named(part, name)):
            if not text.isascii():
                check_unicode(text, name)
    for text in leaves(_named(row.tools or (), "tools")):
        check_unicode(text, "tools")
    if isinstance(row, Pair) and row.chosen == row.rejected:
        raise DroppedRow(IDENTICAL, _first_text(row.chosen))


def _named(value: Any, name: str, depth: int = 0) -> Any:
    """Return a value in which every key is text; a cell of Python's own spelling may hold others."""
    if depth > DEEPEST:
        raise BadRow(f"{name} holds lists or objects within each other more than {DEEPEST} deep.")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadRow(f"{name} holds the key {excerpt(repr(key), 40)}; expected text.")
    for item in value.values() if isinstance(value, Mapping) else value:
        if isinstance(item, Mapping | list | tuple):
            _named(item, name, depth + 1)
    return value


def _check_margin(row: Row, least: float | None) -> None:
    if least is None or isinstance(row, Labelled):
        return
    if row.score_chosen is None or row.score_rejected is None:
        raise DroppedRow("dropped: no scores, which min_margin compares")
    if row.score_chosen - row.score_rejected < least:
        raise DroppedRow(
            f"dropped: score margin below min_margin {least:g}",
            f"{row.score_chosen:g} - {row.score_rejected:g}",
        )


def check_unicode(text: str, name: str) -> None:
    """Hold that a text can be written as UTF-8; raises ``BadRow``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{name} holds half of a character ({text[error.start]!r} at position {error.start}); "
            "expected whole Unicode text. Repair or remove the row."
        ) from None


def _first_text(part: Text) -> str:
    return excerpt(part if isinstance(part, str) else str(part[-1]["content"]))


def _check_shapes(shapes: list[Shape], kind: str | None, rules: Rules, name: str) -> None:
    kinds = {shape.layout.kind for shape in shapes}
    if len(kinds) > 1 and kind != "demonstrations":
        raise DataError(
            f"the sources mix {listing(sorted(kinds))} rows: "
            f"{listing(sorted({shape.name for shape in shapes}))}. Expected one kind of rows."
        )
    if kind == "paired" and kinds == {"unpaired"}:
        columns = "/".join(shapes[0].layout.columns)
        raise DataError(
            f"{name}: this file holds {columns} (unpaired) rows; a paired objective such as dpo "
            "needs prompt/chosen/rejected. Use an unpaired objective such as kto, or paired data."
        )
    if "paired" not in kinds and rules.min_margin is not None:
        raise DataError(
            f"{name}: min_margin compares the scores of pairs, and these rows are "
            f"{listing(sorted(kinds))}; leave min_margin out."
        )
    if rules.transcripts == "messages" and not any(shape.transcript for shape in shapes):
        raise DataError(
            f"{name}: transcripts is 'messages', but the data are no Human/Assistant transcripts "
            f"({shapes[0].name}); leave transcripts out."
        )


def _without_duplicates(
    loaded: list[tuple[Spec, list[Row]]], rules: Rules, report: DataReport, problems: Problems
) -> list[tuple[Spec, list[Row]]]:
    seen: dict[str, Origin] = {}
    result = []
    for spec, rows in loaded:
        kept: list[Row] = []
        for row in rows:
            key, opposite = digest(row.content), digest(_opposite(row))
            if key in seen and rules.duplicates != "keep":
                if rules.duplicates == "error":
                    problems.add(
                        row.origin,
                        f"the same row as {seen[key]}; remove one of them, or "
                        "set duplicates: drop.",
                    )
                else:
                    report.add("dropped: duplicate of an earlier row", row.origin, str(seen[key]))
                continue
            if opposite in seen:
                detail = f"the other way round in {seen[opposite]}"
                report.add("noted: conflicting preference", row.origin, detail)
            seen.setdefault(key, row.origin)
            kept.append(row)
        result.append((spec, kept))
    return result


def _opposite(row: Row) -> tuple[Any, ...]:
    if isinstance(row, Pair):
        return (row.prompt, row.rejected, row.chosen, row.tools)
    return (row.prompt, row.completion, not row.label, row.tools)


def _assemble(
    loaded: list[tuple[Spec, list[Row]]],
    shapes: list[tuple[Shape, str]],
    kind: Kind | None,
    report: DataReport,
    seed: int,
) -> Preferences:
    unique = sum(len(rows) for _, rows in loaded)
    if not unique:
        raise DataError("no rows are left:\n" + "\n".join(report.lines()))
    rows = [
        r for i, (spec, group) in enumerate(loaded) for r in _weighted(spec, group, seed, i, report)
    ]
    if not rows:
        raise DataError("no rows are left: the weights keep less than one row of each source.")
    names = list(dict.fromkeys(shape.name for shape, _ in shapes))
    why = [reason for _, reason in shapes]
    own = shapes[0][0].layout.kind
    if kind == "demonstrations":
        if own != kind:
            names.append("their wanted answers alone")
        own = kind
    elif kind == "unpaired" and own == "paired":
        rows = [single for pair in rows for single in both_answers(cast(Pair, pair))]
        report.added += len(rows) // 2
        names.append("each pair read as one wanted and one unwanted row")
        own = "unpaired"
    return Preferences(own, cast(Any, tuple(rows)), "; ".join(names), "\n".join(why), report)


def _weighted(
    spec: Spec, rows: list[Row], seed: int, index: int, report: DataReport
) -> Iterator[Row]:
    whole, part = int(spec.weight), spec.weight - int(spec.weight)
    sample = random.Random(f"{seed}:{index}").sample(range(len(rows)), round(part * len(rows)))
    added = len(rows) * (whole - 1) + len(sample)
    report.added += added
    if added:
        place = spec.place if not isinstance(spec.place, list | tuple) else "rows in memory"
        reason = (
            f"noted: weight {spec.weight:g} of {place}: rows {'added' if added > 0 else 'left'}"
        )
        report.add(reason, None, count=abs(added))
    for _ in range(whole):
        yield from rows
    yield from (rows[i] for i in sorted(sample))
