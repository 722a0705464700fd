"""When the reference follows the policy (TR-DPO): the schedule, kept by the trainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_dpo.data import Tokenised
from lora_dpo.errors import ConfigError
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import UPDATES, ReferenceUpdate, let_reference_move, move_reference
from lora_dpo.reference_cache import has_known_reference

logger = logging.getLogger("lora_dpo")


@dataclass(frozen=True)
class ReferenceMoves:
    """Trust-region updates of the reference (TR-DPO, arXiv:2404.09656).

    Args:
        update: ``none``; ``hard``, a copy of the policy; ``soft``, a weighted sum of the two weight
            matrices; ``factors``, of the adapters' factors, which is not the same.
        steps: optimiser steps between two updates, at least 1; 512 in the paper for hard ones.
        weight: of the policy in a soft update, in (0, 1]; 0.6 in the paper.
    """

    update: ReferenceUpdate = "none"
    steps: int = 512
    weight: float = 0.6

    def __post_init__(self) -> None:
        problems = []
        if self.update not in UPDATES:
            problems.append(
                f"train.reference_update: got {self.update!r}; expected one of {UPDATES}."
            )
        if self.steps < 1:
            problems.append(f"train.reference_update_steps: got {self.steps}; expected at least 1.")
        if not 0 < self.weight <= 1:
            problems.append(
                f"train.reference_update_weight: got {self.weight:g}; expected a number in (0, 1]."
            )
        if problems:
            raise ConfigError(problems)

    def __bool__(self) -> bool:
        return self.update != "none"

    def __str__(self) -> str:
        if not self:
            return ""
        how = "" if self.update == "hard" else f", weight {self.weight:g}"
        return f"a copy that follows the policy ({self.update}{how}, every {self.steps} steps)"

    def begin(
        self,
        policy: nn.Module,
        objective: BoundObjective,
        train: Tokenised,
        *,
        cached: bool = False,
    ) -> None:
        """Give the policy a reference that can move.

        Raises:
            ConfigError: the objective reads no reference, or its log-probs were computed once.
        """
        if not self:
            return
        if not objective.reference:
            raise ConfigError(
                f"train.reference_update is {self.update!r}, and {objective.name} reads no reference; "
                "leave it out."
            )
        if cached or has_known_reference(train):
            raise ConfigError(
                f"train.reference_update is {self.update!r}, and the rows carry log-probs of a "
                "reference that does not move; leave one of the two out."
            )
        let_reference_move(policy, self.update)


NEVER = ReferenceMoves()


class MovesCallback(TrainerCallback):
    """Moves the reference as the schedule says."""

    def __init__(self, moves: ReferenceMoves) -> None:
        self.moves = moves

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Move after every so many steps, but not after the last: no step would see it."""
        step = state.global_step
        if not self.moves or step % self.moves.steps or step >= state.max_steps:
            return
        error = move_reference(kw["model"], self.moves.update, self.moves.weight)
        left_out = f"; at most {error:.2g} of a layer's change left out" if error > 1e-6 else ""
        logger.info("step %d: reference moved (%s)%s", step, self.moves.update, left_out)
