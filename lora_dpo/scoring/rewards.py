"""The implicit reward of given completions.

A policy trained against a reference is a reward model: ``beta x logratio`` (arXiv:2305.18290). Of
objectives without a reference it is their own reward, as in SimPO's ``beta x mean log-prob``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_dpo import objectives
from lora_dpo.data import DataReport, Labelled, Origin, Preferences, tokenise
from lora_dpo.diagnostics.measuring import Scored
from lora_dpo.diagnostics.measuring import score as both_logps
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.heads import causal_lm
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.objectives import BoundObjective
from lora_dpo.prompt_tokens import Prompt
from lora_dpo.stats import PAIR_NEEDS, LabelledStats, PairStats

Array = NDArray[np.float64]
Completion = Prompt
Ids = tuple[Sequence[int], Sequence[int]]

_PLACE = "<completions>"
# What an objective's reward may read that an answer by itself does not have.
_OF_PAIRS = frozenset({"scores", "first_logps", "sampled_logps", "kls"})


@dataclass(frozen=True, repr=False)
class Scores:
    """Completions under a policy, in the order in which they were given.

    Args:
        rewards: of each completion, ``[completions]``.
        logps: summed log-probs under the policy, nats.
        reference_logps: the same under the reference.
        tokens: of each completion, its end token included.
        rule: what the reward is, in words.
    """

    rewards: Array
    logps: Array
    reference_logps: Array
    tokens: NDArray[np.int64]
    rule: str

    def __len__(self) -> int:
        return len(self.rewards)

    def __repr__(self) -> str:
        mean = float(self.rewards.mean()) if len(self) else float("nan")
        return f"Scores({len(self)} completions, mean reward {mean:.4g}, {self.rule})"

    def ranking(self) -> list[int]:
        """Return the places of the completions, the best first; equal ones keep their order."""
        return [int(i) for i in np.argsort(-self.rewards, kind="stable")]

    def row(self, place: int) -> dict[str, Any]:
        """Return one completion's figures as plain values."""
        return {
            "reward": float(self.rewards[place]),
            "logps": float(self.logps[place]),
            "reference_logps": float(self.reference_logps[place]),
            "tokens": int(self.tokens[place]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"rule": self.rule, "rows": [self.row(i) for i in range(len(self))]}


def score(
    policy: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt] | Prompt,
    completions: Sequence[Completion],
    *,
    beta: float | None = None,
    objective: BoundObjective | None = None,
    max_length: int | None = None,
    stop_ids: Sequence[int] = (),
    template_arguments: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    chunk: int = CHUNK_TOKENS,
) -> Scores:
    """Return the implicit reward of each completion, tokenised as training does it.

    Args:
        policy: a ``PeftModel``; its reference is the base, or its adapter named ``reference``.
        tokenizer: the policy's.
        prompts: one a completion, or a single one for all: texts, or chats as lists of messages.
        completions: texts, each the answer of the assistant where its prompt is a chat; or messages.
        beta: scale of ``beta x logratio``, per nat; or give ``objective``.
        objective: a bound objective, whose own reward is taken.
        max_length: most tokens of prompt and completion; the model's context if left out.
        stop_ids: further tokens on which the model stops.
        template_arguments: variables of the chat template, as training had them.
        batch_size: completions of a forward pass.
        chunk: positions whose logits exist at one time.

    Raises:
        ConfigError: both or neither of ``beta`` and ``objective``.
        DataError: counts that differ, or a completion that is empty, too long or has no tokens.
    """
    if (beta is None) is (objective is None):
        raise ConfigError("score: give beta, or the objective whose reward is meant, and not both.")
    bound = objective or objectives.get("dpo").bind(beta=cast(float, beta))
    asked = _a_prompt_each(prompts, completions)
    rows = encode_rows(
        tokenizer,
        list(zip(asked, completions, strict=True)),
        max_length=max_length or context_of(causal_lm(policy).config),
        stop_ids=stop_ids,
        template_arguments=template_arguments,
    )
    return score_ids(policy, rows, bound, batch_size=batch_size, chunk=chunk)


def score_ids(
    policy: nn.Module,
    rows: Sequence[Ids],
    objective: BoundObjective,
    *,
    batch_size: int = 8,
    chunk: int = CHUNK_TOKENS,
) -> Scores:
    """Return the implicit reward of tokenised ``(prompt, completion)`` rows; see ``score``."""
    found = both_logps(policy, rows, batch_size=batch_size, chunk=chunk)
    return Scores(
        rewards=implicit_rewards(objective, found),
        logps=found.policy,
        reference_logps=found.fixed,
        tokens=found.lengths.astype(np.int64),
        rule=reward_in_words(objective),
    )


def reward_in_words(objective: BoundObjective) -> str:
    """Say what the implicit reward of an objective is, as its own documentation does."""
    row = objective.objective
    formula = (inspect.getdoc(row.rewards) or "its own").split("\n", 1)[0].rstrip(".")
    for words in ("Implicit rewards ", " of both sides", " of the rows"):
        formula = formula.replace(words, "")
    beyond = sorted(_OF_PAIRS & set(row.needs) - (set() if "score" in formula else {"scores"}))
    if beyond:
        formula += f"; what it takes from pairs ({', '.join(beyond)}) is left out"
    return f"{formula.replace('``', '')}: {objective.terms[0]}"


def encode_rows(
    tokenizer: Any,
    rows: Sequence[tuple[Prompt, Completion]],
    *,
    max_length: int,
    stop_ids: Sequence[int] = (),
    template_arguments: Mapping[str, Any] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each ``(prompt, completion)``, with boundary and end as training has them.

    Raises:
        DataError: names the first completion that has no such tokens.
    """
    made = [
        labelled(Origin(_PLACE, i), prompt, answer) for i, (prompt, answer) in enumerate(rows, 1)
    ]
    if not made:
        return []
    read = Preferences("unpaired", tuple(made), "given", "given", DataReport(read=len(made)))
    # equal rows stay apart: nothing looks for duplicates behind load_preferences
    found = tokenise(
        read,
        tokenizer,
        max_length=max_length,
        overflow="error",
        stop_ids=stop_ids,
        template_arguments=template_arguments if made[0].is_chat else None,
    )
    if len(found) < len(made):
        raise DataError("not every completion can be scored:\n" + "\n".join(found.report.lines()))
    return [(row["prompt_ids"], row["completion_ids"]) for row in found.rows]


def context_of(config: Any) -> int:
    """Return the most tokens that a model of this config takes."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def _a_prompt_each(
    prompts: Sequence[Prompt] | Prompt, completions: Sequence[Completion]
) -> list[Prompt]:
    single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
    if single:
        return [cast(Prompt, prompts)] * len(completions)
    several = list(cast(Sequence[Prompt], prompts))
    if len(several) != len(completions):
        raise DataError(
            f"score: {len(several)} prompts and {len(completions)} completions; give one prompt for "
            "each completion, or a single one for all."
        )
    return several


def labelled(origin: Origin, prompt: Prompt, completion: Completion) -> Labelled:
    """Return one completion as the tokeniser takes it; a text is the assistant's turn of a chat.

    Raises:
        DataError: messages that answer a text, or an answer without text.
    """
    if isinstance(prompt, str) and not isinstance(completion, str):
        raise DataError(f"{origin}: messages as the answer to a text; give the prompt as messages.")
    if isinstance(prompt, str):
        answer: Any = completion
    elif isinstance(completion, str):
        answer = ({"role": "assistant", "content": completion},)
    else:
        answer = tuple(completion)
    texts = [answer] if isinstance(answer, str) else [str(m.get("content", "")) for m in answer]
    if not any(text.strip() for text in texts):
        raise DataError(f"{origin}: the completion is empty; leave it out, or score its tokens.")
    asked = prompt if isinstance(prompt, str) else tuple(prompt)
    return Labelled(asked, answer, True, origin)


def implicit_rewards(objective: BoundObjective, found: Scored) -> Array:
    """Return the objective's own reward of each answer by itself, ``[answers]``."""
    ours, fixed, lengths = (
        torch.from_numpy(np.ascontiguousarray(values))
        for values in (found.policy, found.fixed, found.lengths)
    )
    if objective.data != "paired":
        there = {"reference_logps": fixed} if objective.reference else {}
        labels = torch.ones(len(lengths), dtype=torch.bool)
        single = LabelledStats(policy_logps=ours, lengths=lengths, labels=labels, **there)
        return objective.rewards(single)[0].double().numpy()
    values = {"logps": ours, "first_logps": ours, "sampled_logps": ours}
    theirs = dict.fromkeys(values, fixed) if objective.reference else {}
    # an answer by itself is its own pair: all its tokens are among the first, and all are drawn
    sides = {
        f"{owner}_{side}_{name}": value
        for owner, sums in (("policy", values), ("reference", theirs))
        for name, value in sums.items()
        for side in ("chosen", "rejected")
    }
    nothing = torch.zeros_like(ours)
    absent = {name: nothing for need in ("scores", "kls") for name in PAIR_NEEDS[need]}
    pair = PairStats(chosen_lengths=lengths, rejected_lengths=lengths, **sides, **absent)
    return objective.rewards(pair)[0].double().numpy()
