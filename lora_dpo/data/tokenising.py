"""Preferences to token ids: exact boundaries, one end token on each side, all losses counted."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lora_dpo.data import caching
from lora_dpo.data.encoding import Encoded, Encoder
from lora_dpo.data.lengths import Fitter, Measure, Overflow, Summary
from lora_dpo.data.preferences import Kind, Preferences
from lora_dpo.data.problems import Problems
from lora_dpo.data.records import Pair
from lora_dpo.data.report import DataReport
from lora_dpo.data.templates import make_renderer
from lora_dpo.data.vocabulary import Vocabulary, read_vocabulary
from lora_dpo.errors import DataError
from lora_dpo.showing import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000
BAR_FROM = 2000
SCORES = ("chosen_score", "rejected_score")
ANSWERS = {
    "paired": ("chosen", "rejected"),
    "unpaired": ("completion",),
    "demonstrations": ("completion",),
}


@dataclass(frozen=True, repr=False)
class Tokenised:
    """Token ids of every row that was kept, as a ``datasets.Dataset``.

    Columns: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (paired) or ``prompt_ids``,
    ``completion_ids``, ``label`` (unpaired, demonstrations), and ``prompt_key``, ``file``, ``row``; pairs have
    ``chosen_score`` and ``rejected_score`` too, null where the data have none. The report is of this
    stage alone: ``len(tokenised) == len(preferences) - report.dropped``.
    """

    kind: Kind
    rows: Any
    report: DataReport
    summary: Summary
    cached: bool = False

    @property
    def fingerprint(self) -> str:
        """Return a sha256 (hex) of every token, label and score of every row, in order."""
        digest = hashlib.sha256()
        table = self.rows.with_format("arrow")[:]
        for name in (n for n in SCORES if n in table.column_names):
            if any(value is not None for value in self.rows[name]):
                digest.update(repr(self.rows[name][:]).encode())
        for name in sorted(n for n in table.column_names if n.endswith("_ids") or n == "label"):
            column = table.column(name).combine_chunks()
            parts = (column,) if name == "label" else (column.flatten(), column.value_lengths())
            for array in parts:
                digest.update(array.to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        longest = self.summary.total.max
        return (
            f"Tokenised({len(self)} {self.kind} rows, at most {longest} tokens, "
            f"{self.report.dropped} dropped, {self.report.truncated} truncated)"
        )


def tokenise(
    preferences: Preferences,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overflow: Overflow = "drop",
    stop_ids: Sequence[int] = (),
    template_arguments: Mapping[str, Any] | None = None,
    cache_dir: Path | None = None,
) -> Tokenised:
    """Turn preferences into token ids.

    Args:
        preferences: checked rows, from ``load_preferences``.
        tokenizer: of the model that will be trained.
        max_length: the most tokens of prompt and longer answer together.
        overflow: what to do with longer rows.
        stop_ids: tokens at which the model's generation stops, besides the tokenizer's EOS.
        template_arguments: variables for the chat template (such as ``enable_thinking``).
        cache_dir: folder of cached results, found again by content, tokenizer and settings.

    Raises:
        DataError: a row that cannot be encoded, a tokenizer that cannot do it, or no rows left.
    """
    arguments = dict(template_arguments or {})
    _check(preferences, max_length, overflow, arguments)
    settings = {
        "max_length": max_length,
        "overflow": overflow,
        "stop_ids": sorted(set(map(int, stop_ids))),
        "template_arguments": arguments,
    }
    vocabulary = read_vocabulary(tokenizer, stop_ids)
    folder = key = None
    if cache_dir is not None:
        key = caching.cache_key(preferences, tokenizer, settings)
        folder = Path(cache_dir).absolute() / key
        if found := caching.load(folder, key):
            return _from_cache(preferences.kind, *found)
    report = DataReport("tokenising", read=len(preferences))
    renderer = None
    if chats := [row for row in preferences.rows if row.is_chat]:
        renderer = make_renderer(tokenizer, arguments, report, str(chats[0].origin))
        if "strftime_now" in str(tokenizer.chat_template):
            report.add(_DATED, chats[0].origin)
    encoder = Encoder(vocabulary, renderer, report)
    fitter = Fitter(vocabulary, max_length, overflow, report)
    rows, summary = _encode_all(preferences, encoder, fitter)
    if folder is not None and key is not None:
        facts = {"report": report.to_dict(), "summary": summary.to_dict()}
        caching.save(folder, key, rows, facts)
        if found := caching.load(folder, key):
            rows = found[0]
    return Tokenised(preferences.kind, rows, report, summary)


_DATED = (
    "noted: the chat template writes today's date into prompts (fix it in template_arguments, "
    "often as date_string)"
)


def _check(
    preferences: Preferences, max_length: int, overflow: str, arguments: Mapping[str, Any]
) -> None:
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
        raise DataError(f"max_length is {max_length!r}; at least 2 tokens are expected.")
    if overflow not in get_args(Overflow):
        raise DataError(f"overflow is {overflow!r}; expected one of {get_args(Overflow)}.")
    if not len(preferences):
        raise DataError("there are no rows to tokenise.")
    if arguments and not any(row.is_chat for row in preferences.rows):
        raise DataError(
            "template_arguments are given, but the rows are texts, to which no chat template is "
            "applied; leave template_arguments out, or give messages."
        )


def _encode_all(preferences: Preferences, encoder: Encoder, fitter: Fitter) -> tuple[Any, Summary]:
    datasets = importlib.import_module("datasets")
    measure, problems = Measure(ANSWERS[preferences.kind]), Problems()
    features = datasets.Features(_features(datasets, preferences.kind))
    parts = []
    rows = preferences.rows
    with bar("tokenising", len(rows), "rows", fewest=BAR_FROM) as advance:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            encoded = encoder(chunk, problems)
            problems.raise_if_any()  # a template that fails for one row of a thousand fails for many
            kept = []
            for row in encoded:
                measure.before.append(row.length)
                if (fitted := _fit(row, fitter, problems)) is not None:
                    measure.add(fitted)
                    kept.append(_columns(fitted))
            columns = {name: [row[name] for row in kept] for name in features}
            parts.append(datasets.Dataset.from_dict(columns, features=features))
            advance(len(chunk))
    problems.raise_if_any()
    if not measure.prompts:
        raise DataError(_nothing_left(fitter, measure))
    return datasets.concatenate_datasets(parts), measure.summary()


def _fit(row: Encoded, fitter: Fitter, problems: Problems) -> Encoded | None:
    if len(row.answers) == 2 and row.answers[0] == row.answers[1]:
        reason = "dropped: chosen and rejected are identical after tokenising"
        fitter.report.add(reason, row.origin)
        return None
    return fitter(row, problems)


def _nothing_left(fitter: Fitter, measure: Measure) -> str:
    lines = ["no rows are left after tokenising:", *fitter.report.lines()]
    if measure.before:
        lines.append(
            f"The shortest row has {min(measure.before)} tokens; max_length is "
            f"{fitter.max_length}. Raise max_length, or choose another overflow."
        )
    return "\n".join(lines)


def _features(datasets: Any, kind: str) -> dict[str, Any]:
    ids, text = [datasets.Value("int32")], datasets.Value("string")
    label = {"label": datasets.Value("bool")} if kind != "paired" else {}
    answers = {f"{name}_ids": ids for name in ANSWERS[kind]}
    scores = {name: datasets.Value("float64") for name in SCORES if kind == "paired"}
    place = {"prompt_key": text, "file": text, "row": datasets.Value("int64")}
    return {"prompt_ids": ids, **answers, **label, **scores, **place}


def _columns(row: Encoded) -> dict[str, Any]:
    source = row.row
    place = {"prompt_key": source.prompt_key, "file": row.origin.file, "row": row.origin.row}
    if isinstance(source, Pair):
        chosen, rejected = row.answers
        ids = {"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        scores = (source.score_chosen, source.score_rejected)
        return {**ids, **dict(zip(SCORES, scores, strict=True)), **place}
    ids = {"prompt_ids": row.prompt, "completion_ids": row.answers[0]}
    return {**ids, "label": source.label, **place}


def label_counts(data: Tokenised) -> tuple[int, int]:
    """Return how many unpaired rows are wanted, and how many are not."""
    wanted = sum(data.rows["label"][:])
    return wanted, len(data) - wanted


def require_scores(data: Tokenised) -> None:
    """Hold that every pair has both scores.

    Raises:
        DataError: names the first row without, and says which columns are read.
    """
    columns = [data.rows[name][:] for name in SCORES if name in data.rows.column_names]
    rows = zip(*columns, strict=True) if columns else iter([(None, None)])
    lacking = [i for i, pair in enumerate(rows) if None in pair]
    if not lacking:
        return
    first = data.rows[lacking[0]]
    raise DataError(
        f"{first['file']}:{first['row']}: no scores, and the objective reads them ({len(lacking)} of "
        f"{len(data)} rows lack them). Give score_chosen and score_rejected (or margin) in the data, or "
        "choose an objective that reads no scores, such as dpo."
    )


def _from_cache(kind: Kind, rows: Any, facts: Mapping[str, Any]) -> Tokenised:
    report = DataReport.from_dict(facts["report"])
    return Tokenised(kind, rows, report, Summary.from_dict(facts["summary"]), cached=True)


__all__ = ["Tokenised", "Vocabulary", "label_counts", "require_scores", "tokenise"]
