"""What the diagnostics look at: log-probs of rows, samples of both models, and how like pairs are."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_dpo.data import LabelledBatch, Tokenised, collate_labelled
from lora_dpo.forward import completion_logps, completion_token_logps
from lora_dpo.generation import sample_ids
from lora_dpo.heads import causal_lm, compute_context, home_device
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import reference
from lora_dpo.stats import AnyStats, PairStats

Array = NDArray[np.float64]
LONGEST_COMPARED = 256  # tokens of an answer whose edit distance is taken


@dataclass(frozen=True)
class Scored:
    """Answers with their log-probs, nats, under policy and reference, and their tokens, ``[rows]``."""

    policy: Array
    fixed: Array
    lengths: Array

    @property
    def logratios(self) -> Array:
        """Policy minus reference, nats."""
        return self.policy - self.fixed

    @property
    def fixed_a_token(self) -> Array:
        """Log-prob a token under the reference, nats."""
        return self.fixed / self.lengths

    def take(self, chosen: Array) -> Scored:
        """Return the rows of a mask."""
        return Scored(self.policy[chosen], self.fixed[chosen], self.lengths[chosen])


def score(
    policy: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    chunk: int,
) -> Scored:
    """Return log-probs of ``(prompt, answer)`` rows under policy and reference, without dropout."""
    found = np.zeros((2, len(rows)))
    with _evaluating(policy):
        for places, batch in _batches(policy, rows, batch_size):
            with torch.no_grad():
                found[0, places] = completion_logps(policy, batch, chunk=chunk).double().cpu()
            with reference(policy):
                found[1, places] = completion_logps(policy, batch, chunk=chunk).double().cpu()
    return Scored(found[0], found[1], np.array([len(answer) for _, answer in rows], dtype=float))


def token_scores(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    chunk: int,
) -> list[Array]:
    """Return the log-prob of every token of each row's answer, nats, without dropout.

    Args:
        model: a policy, or a bare base.
        rows: ``(prompt, answer)`` token ids.
        batch_size: rows of a forward pass.
        chunk: positions whose logits exist at one time.
    """
    found: list[Array] = [np.zeros(0)] * len(rows)
    with _evaluating(model), torch.no_grad():
        for places, batch in _batches(model, rows, batch_size):
            values = completion_token_logps(model, batch, chunk=chunk).double().cpu().numpy()
            ends = np.cumsum([len(rows[i][1]) for i in places])
            for place, part in zip(places, np.split(values, ends[:-1]), strict=True):
                found[place] = part
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> Iterator[tuple[list[int], LabelledBatch]]:
    """Yield batches of rows of like length, with the place of each row."""
    device = home_device(model)
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        labelled = [
            {"prompt_ids": rows[i][0], "completion_ids": rows[i][1], "label": True} for i in places
        ]
        yield places, collate_labelled(labelled, pad_id=0).to(device)


def sample(
    policy: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    as_reference: bool,
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[list[int], list[int]]]:
    """Return ``(prompt, sample)`` at temperature 1, end token included where it was reached."""
    made = sample_ids(
        policy,
        tokenizer,
        prompts,
        as_reference=as_reference,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return [(list(prompt), ids) for prompt, ids in zip(prompts, made, strict=True) if ids]


def answers_of(data: Tokenised, most: int) -> tuple[list[Any], list[bool]]:
    """Return ``(prompt, answer)`` rows and whether each is wanted: of pairs, chosen first."""
    rows = [data.rows[i] for i in _spread(len(data), most)]
    if data.kind == "paired":
        sides = [
            (row["prompt_ids"], row[f"{s}_ids"]) for s in ("chosen", "rejected") for row in rows
        ]
        return sides, [True] * len(rows) + [False] * len(rows)
    return [(r["prompt_ids"], r["completion_ids"]) for r in rows], [bool(r["label"]) for r in rows]


def prompts_of(data: Tokenised, most: int) -> list[list[int]]:
    """Return distinct prompts, spread over the data."""
    by_key = dict(zip(data.rows["prompt_key"][:], range(len(data)), strict=True))
    places = list(by_key.values())
    return [data.rows[places[i]]["prompt_ids"] for i in _spread(len(places), most)]


def rewards_by_side(objective: BoundObjective, stats: AnyStats) -> tuple[Array, Array]:
    """Return the objective's own rewards of wanted and of unwanted answers."""
    exact = stats.map(lambda _, v: v.double() if v.is_floating_point() else v)
    with torch.no_grad():
        found = [reward.numpy() for reward in objective.rewards(exact)]
    if isinstance(stats, PairStats):
        return found[0], found[1]
    wanted = stats.labels.numpy()
    return found[0][wanted], found[0][~wanted]


def pair_similarity(policy: nn.Module, data: Tokenised, most: int) -> dict[str, float]:
    """Return how like chosen and rejected are, by their tokens and by the reference's hidden states.

    ``token_similarity``: matching tokens in order, twice over both lengths, in [0, 1] (1 minus the
    normalised edit distance of insertions and deletions). ``hidden_similarity``: cosine of the mean
    last hidden states over the answers' tokens. ``ches``: mean of ``<h_c, h_r> - |h_c|^2`` of these
    means, the length-normalised CHES score (arXiv:2410.08847), higher where displacement threatens.
    """
    rows = [data.rows[i] for i in _spread(len(data), most)]
    shared = [
        difflib.SequenceMatcher(
            None,
            row["chosen_ids"][:LONGEST_COMPARED],
            row["rejected_ids"][:LONGEST_COMPARED],
            False,
        ).ratio()
        for row in rows
    ]
    cosines, scores = [], []
    for row in rows[:32]:
        chosen, rejected = (_mean_state(policy, row["prompt_ids"], row[f"{s}_ids"]) for s in _SIDES)
        cosines.append(float(torch.cosine_similarity(chosen, rejected, dim=0)))
        scores.append(float(chosen @ rejected - chosen @ chosen))
    return {
        "token_similarity": float(np.mean(shared)),
        "hidden_similarity": float(np.mean(cosines)),
        "ches": float(np.mean(scores)),
    }


_SIDES = ("chosen", "rejected")


def _mean_state(policy: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the mean of the reference's last hidden states that predict an answer's tokens."""
    device = home_device(policy)
    ids = torch.tensor([[*prompt, *answer]], device=device)
    with reference(policy), compute_context(policy):
        out = causal_lm(policy).base_model(  # without the head: no logits
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
    states: torch.Tensor = out.last_hidden_state[0, len(prompt) - 1 : -1].float()
    return states.mean(0).cpu()


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many places, evenly over all."""
    if count <= most:
        return list(range(count))
    return [int(i * count / most) for i in range(most)]


def curves(history: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    """Return values by step of a run's log lines, under our names for them."""
    from lora_dpo.diagnostics.detectors import Curve

    found = {}
    for ours, theirs in names.items():
        points = [(line["step"], line[theirs]) for line in history if theirs in line]
        if points:
            steps, values = zip(*points, strict=True)
            found[ours] = Curve(np.array(steps, dtype=float), np.array(values, dtype=float))
    return found
