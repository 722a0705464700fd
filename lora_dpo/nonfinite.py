"""A loss, log-prob or gradient that is not a finite number: the run stops, or goes on without that step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lora_dpo.errors import TrainingError
from lora_dpo.heads import causal_lm
from lora_dpo.passes import Step
from lora_dpo.ranks import is_engine
from lora_dpo.reference_cache import NAMED, row_places

logger = logging.getLogger("lora_dpo")

OnNonfinite = Literal["stop", "skip"]
IN_A_ROW = 5  # steps left out one behind the other, before the run stops all the same
SCALED_IN_A_ROW = 40  # halvings of a gradient scale of 2**16, behind which nothing is left of it
NOTED = 20  # sentences in notes.jsonl

Row = Mapping[str, Any]


class Steps:
    """Decides whether a step's update is made, and counts those that are left out.

    Args:
        on_nonfinite: ``stop``, or ``skip``: weights, moments and what the objective remembers stay as
            they are, and the run goes on.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.on_nonfinite = on_nonfinite
        self.skipped = 0  # of the whole run, over resumes
        self._in_a_row = self._overflows = 0
        self._marked = False

    def state(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "overflows": self._overflows}

    def resume(self, state: Mapping[str, int]) -> None:
        """Count on from those of a checkpoint."""
        self.skipped = state["skipped"]
        self._in_a_row, self._overflows = state["in_a_row"], state["overflows"]

    def foresee(self, model: nn.Module, rows: Any) -> None:
        """Look for rows to which the base can give no log-prob, before the first step.

        A token has none whose embedding is not finite, or whose bias in the head is -inf, as where
        somebody has masked it.

        Args:
            model: the policy.
            rows: of a ``Tokenised``.

        Raises:
            TrainingError: names the rows, where the run is to stop.
        """
        hits = _rows_with(rows, *_tokens_without_numbers(model))
        if not hits:
            return
        tokens = sorted(set().union(*hits.values()))
        problem = (
            f"{row_places([rows[place] for place in hits])}: holds a token to which the base gives no "
            f"log-prob (token {', '.join(map(str, tokens[:NAMED]))}: its embedding is not finite, or the "
            "head masks it)"
        )
        if self.on_nonfinite == "stop":
            raise TrainingError(
                f"{problem}. Nothing was trained. Remove these rows, or leave their steps out with "
                "train.on_nonfinite: skip."
            )
        logger.warning("%s; steps with these rows will be left out", problem)

    def updates(self, trainer: Any, model: nn.Module, rows: Sequence[Row], found: Step) -> bool:
        """Return whether the gradients that are there are to be applied; if not, they are gone.

        Args:
            trainer: whose step it is. Its gradient scaler (fp16) skips steps of its own accord.
            model: whose gradients are there.
            rows: of the step.
            found: their losses and statistics.

        Raises:
            TrainingError: names the rows, where the run is to stop.
        """
        step, accelerator = trainer.state.global_step + 1, trainer.accelerator
        scaled = accelerator.scaler is not None
        self._look_at_the_scaler(step, scaled and accelerator.optimizer_step_was_skipped)
        problem = _problem(model, rows, found, scaled)
        if not problem:  # every process has the losses of the whole step, and the same gradient
            self._in_a_row = 0
            return True
        if self.on_nonfinite == "stop":
            raise TrainingError(
                f"step {step}: {problem}. No update was made and earlier checkpoints are kept. Look at "
                "these rows, lower train.learning_rate, use model.compute_dtype: float32, or leave such "
                "steps out with train.on_nonfinite: skip."
            )
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise TrainingError(
                f"step {step}: {problem}. It is the {IN_A_ROW}th such step in a row, so it is more than a "
                "row: lower train.learning_rate, or use model.compute_dtype: float32. Earlier "
                "checkpoints are kept."
            )
        self.skipped += 1
        text = f"{problem}; no update was made ({self.skipped} skipped so far)"
        if self.skipped <= NOTED:
            trainer.advice.tell(step, f"skipped step {step}", text)
        else:
            logger.warning("step %d skipped: %s", step, text)
        self._leave_out(model, scaled)
        return False

    def line(self, logs: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
        """Return a log line with the window's means and the number of steps left out.

        There is no loss where all steps since the last line were left out, and no norm of a gradient
        that was not applied.
        """
        made = {**logs, **means}
        absent = {"loss"} if not means else set()
        if not means or not math.isfinite(made.get("grad_norm", 0.0)):
            absent.add("grad_norm")
        made = {name: value for name, value in made.items() if name not in absent}
        return {**made, "skipped_steps": self.skipped} if self.skipped else made

    def _leave_out(self, model: nn.Module, scaled: bool) -> None:
        if not scaled:
            # an optimiser passes over what has no gradient: no step, no decay, no moment
            model.zero_grad(set_to_none=True)
            return
        self._marked = True  # the scaler insists on gradients, and skips what is not finite
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, torch.nan)
                return

    def _look_at_the_scaler(self, step: int, skipped: bool) -> None:
        """Count what the gradient scaler left out: an overflow is its way to find a scale, no fault."""
        ours, self._marked = self._marked, False
        if not skipped:
            self._overflows = 0
        elif not ours:
            self.skipped += 1
            self._overflows += 1
        if self._overflows >= SCALED_IN_A_ROW:
            raise TrainingError(
                f"step {step}: the gradient overflows in float16 however it is scaled, in "
                f"{SCALED_IN_A_ROW} steps in a row. Use model.compute_dtype: bfloat16 or float32, or lower "
                "train.learning_rate. Earlier checkpoints are kept."
            )


def _problem(model: nn.Module, rows: Sequence[Row], found: Step, scaled: bool) -> str:
    """Return what is not finite and of which rows, in words; nothing where all is well."""
    logps = {name: v for name, v in found.stats.present().items() if name.endswith("logps")}
    looked_at = {"the loss": found.losses, **{_in_words(name): v for name, v in logps.items()}}
    bad = {what: ~torch.isfinite(values) for what, values in looked_at.items()}
    if bool(torch.stack(list(bad.values())).any()):
        # a log-prob says more than the loss, which those of other rows too may have spoilt
        what, *causes = [what for what, hits in bad.items() if bool(hits.any())]
        if causes and what == "the loss":
            del bad[what]
            what = causes[0]  # the policy's
        hits = torch.stack(list(bad.values())).any(0).tolist()
        places = [row for row, hit in zip(rows, hits, strict=True) if hit]
        return f"{what} is not a finite number; rows {row_places(places)}"
    if scaled or math.isfinite(_gradient_norm(model)):
        return ""
    return f"the gradient is not a finite number; rows {row_places(rows)}"


def _gradient_norm(model: Any) -> float:
    if is_engine(model):  # each process has its share of the gradient
        return float(model.optimizer.scaled_global_norm())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _in_words(name: str) -> str:
    """Return a statistic's name for a sentence: ``reference_chosen_logps`` and its like."""
    who, *rest = name.removesuffix("_logps").split("_")
    side = f" of {' '.join(rest)}" if rest else ""
    return f"the log-prob{side} under the {who}"


def _tokens_without_numbers(model: nn.Module) -> tuple[list[int], list[int]]:
    """Return the tokens that the base cannot read, and those that it never says."""
    causal = causal_lm(model)
    embeddings, head = (
        getattr(layer, "original_module", getattr(layer, "base_layer", layer))  # not the adapters'
        for layer in (causal.get_input_embeddings(), causal.get_output_embeddings())
    )
    ends: Tensor = torch.stack(embeddings.weight.detach().aminmax(dim=1))  # no copy of the matrix
    unread = (~torch.isfinite(ends)).any(0).nonzero().flatten().tolist()
    bias = getattr(head, "bias", None)
    return unread, [] if bias is None else bias.detach().isneginf().nonzero().flatten().tolist()


def _rows_with(rows: Any, unread: list[int], unsaid: list[int]) -> dict[int, set[int]]:
    """Return the rows that hold one of these tokens, with those that they hold."""
    found: dict[int, set[int]] = {}
    if not unread and not unsaid:
        return found
    columns = {
        name: np.array(unread if name == "prompt_ids" else [*unread, *unsaid])
        for name in rows.column_names
        if name.endswith("_ids")
    }
    for place, row in enumerate(rows.with_format("numpy", columns=list(columns))):
        held = {int(t) for name, bad in columns.items() for t in row[name][np.isin(row[name], bad)]}
        if held:
            found[place] = held
    return found
