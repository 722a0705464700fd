"""A run as a reward model of a file: a line a completion, in the file's order, and its accuracy."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import RenderableType

from lora_dpo.data import Labelled, Pair, Preferences, load_preferences
from lora_dpo.data.problems import Problems
from lora_dpo.data.readers import Raw
from lora_dpo.data.records import Origin
from lora_dpo.data.report import DataReport
from lora_dpo.data.sources import open_spec, specs
from lora_dpo.data.transcripts import is_transcript
from lora_dpo.errors import DataError
from lora_dpo.lines import json_line
from lora_dpo.preparing import tokenise_rows
from lora_dpo.run_folder import Run
from lora_dpo.scoring.categories import SUBSET, Accuracy, Section, overall, sections_of
from lora_dpo.scoring.rewards import Scores, labelled, reward_in_words, score_ids
from lora_dpo.showing import Displayed, hanging, said
from lora_dpo.store import refuse_existing, write_text

logger = logging.getLogger("lora_dpo")

SIDES = {"paired": ("chosen", "rejected"), "unpaired": ("completion",)}
NOTHING = dict.fromkeys(("reward", "logps", "reference_logps", "tokens"))


@dataclass(frozen=True, repr=False)
class FileScores(Displayed):
    """The completions of a file under a run, in their order.

    Args:
        subject: the run and the file.
        rule: what the reward is.
        rows: of every completion the columns of its row, which side it is, and its figures; these
            are None where the row was dropped, with the reason in ``report``.
        accuracy: of pair files; None of others.
        subsets: accuracy by the column ``subset``, where there is one.
        report: lines on what was dropped, truncated or repaired.
    """

    subject: str
    rule: str
    rows: tuple[Mapping[str, Any], ...]
    accuracy: Accuracy | None
    subsets: Mapping[str, Accuracy]
    report: tuple[str, ...]

    template: ClassVar[str] = "scores"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo score: {self.subject}"

    @property
    def sections(self) -> dict[str, Section]:
        """RewardBench's, where its subsets occur."""
        return sections_of(self.subsets)

    @property
    def overall(self) -> float | None:
        """RewardBench's score, where all of its subsets are there."""
        return overall(self.sections)

    @property
    def without(self) -> int:
        """Completions that could not be scored."""
        return sum(row["reward"] is None for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        accuracy = f", accuracy {self.accuracy}" if self.accuracy else ""
        return f"FileScores({len(self)} completions, {self.rule}{accuracy})"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        parts: list[RenderableType] = [said(self.subject, "bold"), said(f"reward: {self.rule}")]
        counts = f"{len(self)} completions"
        parts.append(said(counts + (f", {self.without} without a score" if self.without else "")))
        parts += [hanging(line, 11) for line in self.report]
        if self.accuracy:
            parts.append(said(f"accuracy, ties half [95 % by prompt]: {self.accuracy}", "bold"))
        width = max(map(len, self.subsets), default=0)
        parts += [said(f"  {name:<{width}}  {found}") for name, found in self.subsets.items()]
        parts += [said(f"RewardBench {name}: {found}") for name, found in self.sections.items()]
        if self.overall is not None:
            parts.append(said(f"RewardBench, mean of the sections: {self.overall:.4g}", "bold"))
        return parts

    def lines(self) -> list[str]:
        """Return each row as JSON; what JSON does not know, such as a date, as text."""
        return [json_line(row, default=str) for row in self.rows]

    def write(self, path: str | Path) -> None:
        """Write the rows to a new file, as JSON lines.

        Raises:
            OutputError: the file exists.
        """
        refuse_existing(Path(path))
        write_text(Path(path), "".join(f"{line}\n" for line in self.lines()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        sections = {
            name: {"mean": found.mean, "missing": list(found.missing)}
            for name, found in self.sections.items()
        }
        return {
            "subject": self.subject,
            "rule": self.rule,
            "completions": len(self),
            "without": self.without,
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            "subsets": {name: found.to_dict() for name, found in self.subsets.items()},
            "sections": sections,
            "overall": self.overall,
            "report": list(self.report),
            "rows": [json.loads(line) for line in self.lines()],
        }


def score_run(
    run: Run | str | Path,
    data: Any,
    *,
    checkpoint: str = "final",
    batch_size: int | None = None,
) -> FileScores:
    """Return the implicit reward of every completion of a file, and the accuracy of its pairs.

    Args:
        run: a run or its folder. Where it was trained on chats, a text becomes the user's turn.
        data: pairs, labelled answers, or rows with ``prompt`` and ``completion`` or ``completions``:
            a file, a folder, a hub id or rows in memory.
        checkpoint: ``final``, ``best`` or a step.
        batch_size: completions of a forward pass.

    Raises:
        DataError: names file and row of what cannot be read.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    raws = _raw_rows(data)
    rows = _read(run, data, raws)
    if run.is_chat and not rows.rows[0].is_chat and "transcript" not in rows.shape:
        rows = replace(rows, rows=tuple(map(_as_chat, rows.rows)))  # type: ignore[arg-type]
        logger.info("the run was trained on chats: each text prompt is read as the user's turn")
    tokens = tokenise_rows(rows, run.config, run.tokenizer())
    sides = SIDES[tokens.kind]
    flat = [(row["prompt_ids"], row[f"{side}_ids"]) for row in tokens.rows for side in sides]
    width = batch_size or int(run.config.train.further.get("per_device_eval_batch_size", 8))
    chunk = run.config.train.chunk_tokens
    scores = score_ids(
        run.load_policy(checkpoint), flat, run.objective, batch_size=width, chunk=chunk
    )
    places = {
        (row["file"], row["row"]): (i * len(sides), row["prompt_key"])
        for i, row in enumerate(tokens.rows)
    }
    accuracy, subsets = _accuracies(raws, places, scores) if len(sides) == 2 else (None, {})
    name = str(data) if isinstance(data, (str, Path)) else "rows in memory"
    return FileScores(
        subject=f"{name} under {run.folder.name}",
        rule=reward_in_words(run.objective),
        rows=tuple(_lines(raws, places, scores, sides)),
        accuracy=accuracy,
        subsets=subsets,
        report=(*rows.report.lines(), *tokens.report.lines()),
    )


def _raw_rows(data: Any) -> list[Raw]:
    problems = Problems()
    tables = [table for spec in specs(data, None) for table in open_spec(spec, problems)]
    problems.raise_if_any()
    return [row for table in tables for row in table.rows]


def _read(run: Run, data: Any, raws: Sequence[Raw]) -> Preferences:
    settings, names = run.config.data, {name for raw in raws for name in raw.values}
    # what the run was told of its own files is taken where it fits this one
    columns = {ours: theirs for ours, theirs in settings.columns.items() if theirs in names}
    spoken = any(is_transcript(str(raw.values.get("chosen", ""))) for raw in raws)
    if raws and not any(_has_preference(raw.values, columns) for raw in raws):
        return _plain_completions(raws, columns)
    return load_preferences(
        data,
        columns=columns or None,
        transcripts=settings.transcripts if spoken else "text",
        duplicates="keep",  # each has its line
    )


def _has_preference(values: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    label = {"label", "kto_tag", "thumbs", columns.get("label", "label")}
    answers = {"completion", "completions", columns.get("completion", "completion")}
    return not answers & set(values) or bool(label & set(values))


def _plain_completions(raws: Sequence[Raw], columns: Mapping[str, str]) -> Preferences:
    """Read rows of a prompt with one completion, or with a list of them, and no preference."""
    made: list[Labelled] = []
    for raw in raws:
        prompt: Any = raw.values.get(columns.get("prompt", "prompt"))
        if not (isinstance(prompt, str) and prompt.strip()) and not _is_chat(prompt):
            raise DataError(
                f"{raw.origin}: prompt is {type(prompt).__name__}; expected text or messages."
            )
        for origin, answer in _answers(raw, columns):
            made.append(labelled(origin, prompt, answer))
    report = DataReport(read=len(made))
    return Preferences("unpaired", tuple(made), "prompt / completion", "given", report)


def _answers(raw: Raw, columns: Mapping[str, str]) -> list[tuple[Origin, Any]]:
    single = raw.values.get(columns.get("completion", "completion"))
    several = raw.values.get("completions")
    if single is not None:
        return [(raw.origin, single)]
    if not isinstance(several, (list, tuple)) or not all(
        isinstance(answer, str) or _is_chat(answer) for answer in several
    ):
        raise DataError(
            f"{raw.origin}: expected completion as text or messages, or completions as a list of them."
        )
    return [(_numbered(raw.origin, i), answer) for i, answer in enumerate(several, start=1)]


def _numbered(origin: Origin, number: int) -> Origin:
    """Return the origin of one of several completions of a row."""
    return Origin(f"{origin} completions", number)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in value)
    )


def _as_chat(row: Pair | Labelled) -> Pair | Labelled:
    prompt = ({"role": "user", "content": row.prompt},)
    answers = {
        side: ({"role": "assistant", "content": getattr(row, side)},)
        for side in SIDES["paired" if isinstance(row, Pair) else "unpaired"]
    }
    return replace(row, prompt=prompt, **answers)  # type: ignore[arg-type]


Places = Mapping[tuple[str, int], tuple[int, str]]


def _lines(
    raws: Sequence[Raw], places: Places, scores: Scores, sides: Sequence[str]
) -> list[dict[str, Any]]:
    made = []
    for raw in raws:
        columns = _renamed(raw.values)
        several = raw.values.get("completions")
        if isinstance(several, (list, tuple)) and sides == SIDES["unpaired"]:
            for i in range(1, len(several) + 1):
                origin = _numbered(raw.origin, i)
                found = places.get((origin.file, origin.row))
                figures = scores.row(found[0]) if found else NOTHING
                made.append({**columns, "side": "completions", "place": i - 1, **figures})
            continue
        found = places.get((raw.origin.file, raw.origin.row))
        for i, side in enumerate(sides):
            figures = scores.row(found[0] + i) if found else NOTHING
            made.append({**columns, "side": side, **figures})
    return made


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the file's columns; one that has a name of ours gets ``input_`` before it."""
    ours = {*NOTHING, "side", "place"}
    return {f"input_{name}" if name in ours else name: value for name, value in values.items()}


def _accuracies(
    raws: Sequence[Raw], places: Places, scores: Scores
) -> tuple[Accuracy, dict[str, Accuracy]]:
    margins: dict[str, list[float]] = {}
    prompts: dict[str, list[str]] = {}
    every: tuple[list[float], list[str]] = ([], [])
    for raw in raws:
        found = places.get((raw.origin.file, raw.origin.row))
        if found is None:
            continue
        first, key = found
        margin = float(scores.rewards[first] - scores.rewards[first + 1])
        every[0].append(margin)
        every[1].append(key)
        if (subset := raw.values.get(SUBSET)) is not None:
            margins.setdefault(str(subset), []).append(margin)
            prompts.setdefault(str(subset), []).append(key)
    subsets = {name: Accuracy.of(margins[name], prompts[name]) for name in sorted(margins)}
    return Accuracy.of(*every), subsets
