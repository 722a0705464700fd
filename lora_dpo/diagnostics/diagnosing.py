"""A diagnosis of a finished run, and of data before any training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lora_dpo.data import Tokenised
from lora_dpo.diagnostics import detectors
from lora_dpo.diagnostics.detectors import Answers, Array, Curve
from lora_dpo.diagnostics.findings import Diagnosis, Finding
from lora_dpo.diagnostics.measuring import (
    Scored,
    answers_of,
    curves,
    pair_similarity,
    prompts_of,
    rewards_by_side,
    sample,
    score,
)
from lora_dpo.evaluation import collect_stats
from lora_dpo.lines import whole_lines
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import adapter_change

logger = logging.getLogger("lora_dpo")

# our names for curves of ``metrics.jsonl``
TRAINING = {"loss": "loss", "accuracy": "rewards/accuracies", "grad_norm": "grad_norm",
             "margin": "rewards/margins"}  # fmt: skip
HELD_OUT = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies"}


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        rows: of the data, at most.
        samples: of each model; 0 leaves out what needs samples.
        sample_tokens: longest sample.
        batch_size: rows of a forward pass and of a generation.
        chunk: positions whose logits exist at one time.
    """

    rows: int = 200
    samples: int = 32
    sample_tokens: int = 64
    batch_size: int = 8
    chunk: int = 1024


def diagnose_policy(
    policy: nn.Module,
    tokenizer: Any,
    objective: BoundObjective,
    data: Tokenised,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    margins: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    subject: str = "the policy",
    effort: Effort = Effort(),
) -> Diagnosis:
    """Return every finding on a trained policy.

    Args:
        policy: with its reference.
        tokenizer: its own.
        objective: that it was trained with; its rewards are looked at.
        data: held-out rows (or training rows, where none were held out).
        history: log lines of the training, as in ``metrics.jsonl``.
        margins: of training pairs as they were seen, by ``file:row``; None for unpaired rows.
        subject: for the headline.
        effort: how much is measured.
    """
    few = _few(data, effort.rows)
    rows, labels = answers_of(few, effort.rows)
    scored = score(policy, rows, batch_size=effort.batch_size, chunk=effort.chunk)
    wanted = np.array(labels, dtype=bool)
    sides = scored.take(wanted), scored.take(~wanted)
    rewards = _rewards(policy, few, objective, effort)
    paired = few.kind == "paired"
    answers = Answers((sides[0].lengths, sides[1].lengths), rewards, paired)
    ours, own = _samples(policy, tokenizer, few, effort)
    training, held_out = curves(history, TRAINING), curves(history, HELD_OUT)
    both = bool(wanted.any()) and bool((~wanted).any())
    away = few.kind == "demonstrations"  # to leave the base is what they are for
    findings = [
        _length_bias(answers, both, ours, own),
        _displacement(policy, few, sides, effort),
        _over_optimisation(None if away else ours, rewards, paired, held_out, training, len(few)),
        detectors.REFERENCE_MISMATCH.not_measured("fine-tuning is what mends it")
        if away
        else _mismatch(policy, rows, wanted, own, effort),
        _noise(margins, paired),
        detectors.not_learning(scored.logratios, adapter_change(policy), training),
    ]
    return Diagnosis(subject, tuple(findings))


def diagnose_data(
    policy: nn.Module,
    tokenizer: Any,
    data: Tokenised,
    *,
    subject: str = "the data",
    effort: Effort = Effort(),
) -> Diagnosis:
    """Return what can be told of data before any training, against the reference of a policy."""
    few = _few(data, effort.rows)
    rows, labels = answers_of(few, effort.rows)
    scored = score(policy, rows, batch_size=effort.batch_size, chunk=effort.chunk)
    wanted = np.array(labels, dtype=bool)
    sides = scored.take(wanted), scored.take(~wanted)
    _, own = _samples(policy, tokenizer, few, effort, reference_only=True)
    answers = Answers((sides[0].lengths, sides[1].lengths), paired=few.kind == "paired")
    both = bool(wanted.any()) and bool((~wanted).any())
    findings = [
        _length_bias(answers, both, None, None),
        _mismatch(policy, rows, wanted, own, effort),
    ]
    if few.kind == "paired":
        findings.append(detectors.similar_pairs(pair_similarity(policy, few, effort.rows)))
    else:
        findings.append(detectors.SIMILARITY.not_measured("the rows are no pairs"))
    return Diagnosis(subject, tuple(findings))


def read_margins(run: Path) -> dict[str, list[tuple[int, float]]] | None:
    """Return the margins of training pairs by ``file:row`` with their steps; None without the file."""
    path = run / "row_margins.jsonl"
    if not path.is_file():
        return None
    seen: dict[str, list[tuple[int, float]]] = {}
    for _, step in whole_lines(path):
        for file, row, margin in step["rows"]:
            seen.setdefault(f"{file}:{row}", []).append((step["step"], margin))
    return seen


def _few(data: Tokenised, most: int) -> Tokenised:
    from dataclasses import replace

    if len(data) <= most:
        return data
    places = [int(i * len(data) / most) for i in range(most)]
    return replace(data, rows=data.rows.select(places))


def _rewards(
    policy: nn.Module, data: Tokenised, objective: BoundObjective, effort: Effort
) -> tuple[Array, Array]:
    """Return the objective's own rewards of wanted and unwanted answers."""
    from lora_dpo.stepping import fitted

    known, _ = fitted(objective, data, None)
    stats = collect_stats(
        policy, known, objective, batch_size=effort.batch_size, chunk=effort.chunk
    )
    return rewards_by_side(objective, stats)


def _samples(
    policy: nn.Module,
    tokenizer: Any,
    data: Tokenised,
    effort: Effort,
    *,
    reference_only: bool = False,
) -> tuple[Scored | None, Scored | None]:
    if not effort.samples:
        return None, None
    prompts = prompts_of(data, effort.samples)
    found: list[Scored | None] = []
    for as_reference in (False, True):
        if reference_only and not as_reference:
            found.append(None)
            continue
        made = sample(
            policy,
            tokenizer,
            prompts,
            as_reference=as_reference,
            max_new_tokens=effort.sample_tokens,
            batch_size=effort.batch_size,
        )
        found.append(score(policy, made, batch_size=effort.batch_size, chunk=effort.chunk))
    return found[0], found[1]


def _length_bias(answers: Answers, both: bool, ours: Scored | None, own: Scored | None) -> Finding:
    if not both:
        return detectors.LENGTH_BIAS.not_measured("the rows have one label alone")
    sampled = (ours.lengths, own.lengths) if ours is not None and own is not None else None
    return detectors.length_bias(answers, sampled)


def _displacement(
    policy: nn.Module, data: Tokenised, sides: tuple[Scored, Scored], effort: Effort
) -> Finding:
    if not len(sides[0].lengths):
        return detectors.DISPLACEMENT.not_measured("no row is wanted")
    like = pair_similarity(policy, data, min(effort.rows, 64)) if data.kind == "paired" else None
    return detectors.displacement((sides[0].logratios, sides[1].logratios), like)


def _over_optimisation(
    ours: Scored | None,
    rewards: tuple[Array, Array],
    paired: bool,
    held_out: Mapping[str, Curve],
    training: Mapping[str, Curve],
    rows: int,
) -> Finding:
    kl = (ours.logratios, ours.lengths) if ours is not None else None
    margins = rewards[0] - rewards[1] if paired else np.zeros(0)
    return detectors.over_optimisation(kl, margins, held_out, training, rows)


def _mismatch(
    policy: nn.Module, rows: Sequence[Any], wanted: Any, own: Scored | None, effort: Effort
) -> Finding:
    """Compare the beginnings of answers with samples, which are cut at as many tokens."""
    if own is None:
        return detectors.REFERENCE_MISMATCH.not_measured("no samples were drawn")
    if not wanted.any():
        return detectors.REFERENCE_MISMATCH.not_measured("no row is wanted")
    begun, labels = [], []
    for label in (True, False):
        places = np.flatnonzero(wanted == label)[: 2 * effort.samples]
        begun += [(rows[i][0], rows[i][1][: effort.sample_tokens]) for i in places]
        labels += [label] * len(places)
    found = score(policy, begun, batch_size=effort.batch_size, chunk=effort.chunk)
    mask = np.array(labels, dtype=bool)
    of_wanted, of_others = found.fixed_a_token[mask], found.fixed_a_token[~mask]
    return detectors.reference_mismatch(of_wanted, of_others, own.fixed_a_token)


def _noise(margins: Mapping[str, Any] | None, paired: bool) -> Finding:
    if not paired:
        return detectors.LABEL_NOISE.not_measured("the rows are no pairs")
    if not margins:
        return detectors.LABEL_NOISE.not_measured("the margins of training rows were not kept")
    return detectors.label_noise(margins)
