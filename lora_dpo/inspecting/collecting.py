"""Preferences looked at before any training: collected here, shown by ``Inspection``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.config import Config
from lora_dpo.data import Preferences, Tokenised
from lora_dpo.data.preferences import Kind
from lora_dpo.data.tokenising import ANSWERS
from lora_dpo.data.vocabulary import Vocabulary, read_vocabulary
from lora_dpo.diagnostics import Effort, detectors
from lora_dpo.diagnostics.findings import Finding
from lora_dpo.diagnostics.measuring import answers_of, token_scores
from lora_dpo.errors import DataError
from lora_dpo.guards import check_context
from lora_dpo.inspecting import advice
from lora_dpo.inspecting.inspection import Inspection
from lora_dpo.inspecting.measures import (
    Count,
    Histogram,
    Readiness,
    counts_of,
    leaks_of,
    lengths_of,
    summed,
    work_of,
)
from lora_dpo.inspecting.tokens import show_rows
from lora_dpo.policy import check_base, load_base
from lora_dpo.preparing import load_rows, load_tokenizer, stop_ids, tokenise_rows

READINESS = Effort(rows=64)


def inspect_preferences(
    data: Any,
    base: str | Path,
    *,
    held_out: Any = None,
    kind: Kind | None = None,
    rows: int = 3,
    ids: bool = False,
    readiness: bool = True,
    effort: Effort = READINESS,
    **settings: Any,
) -> Inspection:
    """Look at preferences as a model will see them; nothing is written but the cache of tokens.

    Args:
        data: a file, folder, hub id or dataset.
        base: the model that would be trained. Its tokenizer is used; its weights only for readiness.
        held_out: preferences that are kept from training, to look for prompts that stand in both.
        kind: what the objective needs; None takes the data as they are.
        rows: how many rows are shown token by token.
        ids: whether token ids are shown beside the tokens.
        readiness: whether the base is loaded, in 4 bits, and asked what it makes of the answers.
        effort: how many rows it is asked about, and how many at a time.
        settings: of the section ``data``, such as ``max_length``. ``empty`` is ``drop`` here.

    Raises:
        LoraDpoError: data, model or a setting that cannot be used.
    """
    if rows < 0:
        raise DataError(f"rows is {rows}; expected 0 or more rows to show.")
    values = {"train": "given", "empty": "drop", **settings}
    config = Config.parse({"model": {"base": str(base)}, "data": values, "output": {"dir": "none"}})
    if readiness:
        check_context(config, check_base(config.model))
    tokenizer = load_tokenizer(config)
    preferences = load_rows(config, data, kind)
    tokens = tokenise_rows(preferences, config, tokenizer)
    vocabulary = read_vocabulary(tokenizer, stop_ids(config))
    leaks = None
    if held_out is not None:
        leaks = leaks_of(preferences, load_rows(config, held_out, kind))
    measured = _readiness(config, tokens, vocabulary, effort) if readiness else None
    counts = counts_of((preferences.report, tokens.report))
    shown = [tokens.rows[i] for i in range(min(rows, len(tokens)))]
    chat = preferences.rows[0].is_chat
    return Inspection(
        subject=str(data) if isinstance(data, (str, Path)) else "the data",
        base=str(base),
        kind=tokens.kind,
        shape=preferences.shape,
        why=preferences.why,
        read=preferences.report.read,
        kept=len(tokens),
        counts=(*counts, *([leaks] if leaks and leaks.count else [])),
        totals={**summed(counts), "leaking": leaks.count if leaks else None},
        rows=show_rows(shown, vocabulary, ANSWERS[tokens.kind], chat=chat),
        lengths=tokens.summary,
        histogram=Histogram.of(lengths_of(tokens)),
        work=work_of(tokens.rows),
        readiness=measured,
        findings=_findings(
            preferences, tokens, counts, leaks, measured, bool(tokenizer.chat_template)
        ),
        max_length=config.data.max_length,
        show_ids=ids,
    )


def _findings(
    preferences: Preferences,
    tokens: Tokenised,
    counts: tuple[Count, ...],
    leaks: Count | None,
    measured: Readiness | None,
    has_template: bool,
) -> tuple[Finding, ...]:
    texts = "texts for a chat model" if has_template else "texts"
    form = "chat" if preferences.rows[0].is_chat else texts
    why_not = "the base's weights were not loaded, as asked"
    return (
        advice.empty_rows([count for count in counts if count.name.startswith("dropped: empty")]),
        advice.leaking_rows(leaks, len(preferences)),
        _length_bias(tokens),
        advice.unlikely_answers(measured, why_not, form=form),
        advice.endless_answers(measured, why_not, form=form),
    )


def _length_bias(tokens: Tokenised) -> Finding:
    lengths = {name: np.array(found, dtype=float) for name, found in lengths_of(tokens).items()}
    if tokens.kind == "paired":
        return detectors.length_bias(detectors.Answers((lengths["chosen"], lengths["rejected"])))
    wanted = np.array(tokens.rows["label"][:], dtype=bool)
    if wanted.all() or not wanted.any():
        return detectors.LENGTH_BIAS.not_measured("the rows have one label alone")
    sides = lengths["completion"][wanted], lengths["completion"][~wanted]
    return detectors.length_bias(detectors.Answers(sides, paired=False))


def _readiness(
    config: Config, tokens: Tokenised, vocabulary: Vocabulary, effort: Effort
) -> Readiness | None:
    rows, wanted = answers_of(tokens, effort.rows)
    if not any(wanted):
        return None
    base = load_base(config.model)
    found = token_scores(base, rows, batch_size=effort.batch_size, chunk=effort.chunk)
    sides = {
        label: [values for values, own in zip(found, wanted, strict=True) if own is label]
        for label in (True, False)
    }
    ends = {*vocabulary.added.values(), *vocabulary.stops}
    closed = [  # of answers that were not cut
        (answer[-1], float(np.exp(values[-1])))
        for (_, answer), values, own in zip(rows, found, wanted, strict=True)
        if own and answer[-1] in ends
    ]
    usual = Counter(token for token, _ in closed).most_common(1)
    return Readiness(
        rows=len(sides[True]),
        wanted_nats_a_token=_mean(sides[True]),
        unwanted_nats_a_token=_mean(sides[False]),
        end_token=vocabulary.name(usual[0][0]) if usual else "",
        end_probability=float(np.median([p for _, p in closed])) if closed else math.nan,
    )


def _mean(values: Sequence[Any]) -> float:
    return float(np.concatenate(values).mean()) if values else math.nan
