"""What policy and reference make of a few fixed held-out prompts, at each evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_dpo.data import Tokenised
from lora_dpo.diagnostics.measuring import prompts_of
from lora_dpo.generation import sample_ids
from lora_dpo.heads import causal_lm
from lora_dpo.lines import add_lines, lines_until
from lora_dpo.sharding import is_sharded
from lora_dpo.showing import visible

logger = logging.getLogger("lora_dpo")

SHOWN = 160  # characters of a text in the log


class SamplesCallback(TrainerCallback):
    """Completes fixed prompts with the likeliest tokens and writes them to ``samples.jsonl``.

    A line holds ``step``, ``prompt``, ``policy`` and ``reference``. The reference answers once, and
    again where it moves. No number of the training depends on it: random numbers, the mode of the
    model and the seconds of the steps are as if nothing had been sampled.

    Args:
        policy: with its reference.
        tokenizer: its own.
        held_out: rows whose prompts are taken, spread over all of them.
        path: of the file.
        count: of prompts, at most.
        tokens: of a sample, at most.
        moves: whether the reference follows the policy.
        doing: what is told that sampling goes on.
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        held_out: Tokenised,
        path: Path,
        *,
        count: int,
        tokens: int,
        moves: bool,
        doing: Callable[[str], None],
    ) -> None:
        self.policy, self.tokenizer, self.path = policy, tokenizer, path
        self.tokens, self.moves, self.doing = tokens, moves, doing
        prompts = _with_room(policy, prompts_of(held_out, len(held_out)), tokens)
        self.prompts = prompts[:: max(len(prompts) // count, 1)][:count]
        self.together = is_sharded(policy)  # every process runs the model, the first one writes
        self.step = -1  # of the newest samples
        self._reference: list[str] | None = None
        if not self.prompts:
            logger.info(
                "no samples: the model has no room for output.sample_tokens (%d) behind the held-out "
                "prompts; lower it",
                tokens,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Keep what the checkpoint of this step had seen."""
        if state.is_world_process_zero or self.together:
            kept = lines_until(self.path, state.global_step)
            self.step = kept[-1]["step"] if kept else -1

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Sample, once a step."""
        first = state.is_world_process_zero
        if not (first or self.together) or not self.prompts or state.global_step <= self.step:
            return
        self.step = state.global_step
        self.doing("sampling")
        began = time.monotonic()
        try:
            if self._reference is None or self.moves:
                self._reference = self._complete(as_reference=True)
            texts = self._complete(as_reference=False)
        except (
            Exception
        ) as error:  # the run is as good without samples, and must not be lost to them
            reason = " ".join(str(error).split())[:200]
            logger.warning("no more samples (%s: %s)", type(error).__name__, reason)
            self.prompts = []
            return
        if not first:
            return
        prompts = self.tokenizer.batch_decode(self.prompts, skip_special_tokens=True)
        lines = [
            {"step": self.step, "prompt": prompt, "policy": ours, "reference": theirs}
            for prompt, ours, theirs in zip(prompts, texts, self._reference, strict=True)
        ]
        add_lines(self.path, lines)
        logger.info(
            "step %d: %d prompts sampled in %.1f s; all are in %s, this is the first",
            self.step, len(lines), time.monotonic() - began, self.path.name,
        )  # fmt: skip
        logger.info("  prompt     %s", _short(lines[0]["prompt"], from_end=True))
        logger.info("  policy     %s", _short(texts[0]))
        logger.info("  reference  %s", _short(self._reference[0]))

    def _complete(self, *, as_reference: bool) -> list[str]:
        made = sample_ids(
            self.policy,
            self.tokenizer,
            self.prompts,
            as_reference=as_reference,
            max_new_tokens=self.tokens,
            temperature=0.0,
        )
        texts: list[str] = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return texts


def _with_room(policy: Any, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return the prompts behind which the model has positions for a sample."""
    text = causal_lm(policy).config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    return [list(p) for p in prompts if not longest or len(p) + tokens <= longest]


def _short(text: str, *, from_end: bool = False) -> str:
    """Return the beginning of a text, or its end, on one line in which nothing is hidden."""
    line = visible(" ".join(text.split()))
    if len(line) <= SHOWN:
        return line
    return f"... {line[-SHOWN:]}" if from_end else f"{line[:SHOWN]} ..."
