"""The part of the trainer that writes checkpoints and goes on from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from lora_dpo.callbacks import JsonlCallback, NothingLeftError
from lora_dpo.checkpoints import (
    STATE,
    asked_checkpoint,
    check_best,
    check_facts,
    check_first_rows,
    check_weights,
    evaluated_at_its_end,
    lacks_its_epochs_evaluation,
    new_checkpoint,
    read_state,
    rotate,
    seal_checkpoint,
)
from lora_dpo.metrics import Window
from lora_dpo.nonfinite import Steps
from lora_dpo.policy import read_reference, save_adapter, weights_identity, write_reference
from lora_dpo.ranks import agreed, wait
from lora_dpo.stepping import step_of
from lora_dpo.store import write_json
from lora_dpo.zero import ZeroTrainer

logger = logging.getLogger("lora_dpo")


class ResumableTrainer(ZeroTrainer):
    """A trainer whose checkpoints are whole or not there, and hold all that the next step depends on.

    ``PreferenceTrainer`` gives it what it writes: the rest of a checkpoint is the library's.
    """

    model: Any
    moves: Any
    window: Window
    steps: Steps
    states: Any
    facts: dict[str, Any]
    keep_checkpoints: int | None
    _margins: Any
    _check_logps: Sequence[float]
    _metrics: JsonlCallback | None = None
    _makes_up: bool = False  # for the evaluation at the end of an epoch, which a kill prevented
    _weights: str | None = None  # of the base and a frozen reference, as one hash
    _logged_at: int = -1  # the step of an evaluation that a resumed run's log has

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @property
    def reference_in_words(self) -> str:
        """What the reference is."""
        raise NotImplementedError

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch."""
        raise NotImplementedError

    def _probe(self) -> Any:
        raise NotImplementedError

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.args.should_save:
            save_adapter(self.model, Path(output_dir) if output_dir else self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        facts = self._all_facts()
        with agreed():  # an error of the disk ends every process
            with new_checkpoint(folder, writes=self.args.should_save):
                wait()  # before another process writes its random state there
                super()._save_checkpoint(model, trial)
                wait()  # until all have
                if self.args.should_save:
                    self._seal(folder, facts)
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                rotate(folder, keep=self.keep_checkpoints, best=best)

    def _seal(self, folder: Path, facts: dict[str, Any]) -> None:
        if self.moves:
            write_reference(self.model, folder)
            self._probe()  # its log-probs are others now
        state = {
            "window": self.window.state(),
            "loss": self.window.sums_of_the_run(),
            "reference_logps": self._check_logps,
            "objective": self.states,
            "skipped_steps": self.steps.state(),
            "micro_batch": self.micro_batch,
            "metrics": self._metrics.mark() if self._metrics else None,
        }
        write_json(folder / STATE, state)
        self._margins.write()
        seal_checkpoint(folder, facts)

    def _all_facts(self) -> dict[str, Any]:
        """Return what a checkpoint and who goes on from it must share; every process calls it."""
        if self._weights is None:  # once: they are frozen
            self._weights = weights_identity(self.model, with_reference=not self.moves)
        facts: dict[str, Any] = {
            "reference": self.reference_in_words,
            "weights": self._weights[:16],
        }
        facts |= {"deepspeed_processes": self.dealt_among} if self.dealt_among else {}
        return {**self.facts, **facts}

    def _train(self, checkpoint: str | None, **options: Any) -> TrainOutput:
        """Train with the library, and end a run that was killed behind its last step.

        The library does one step more from such a checkpoint, where that is not the end of an epoch.
        """
        try:
            output: TrainOutput = super().train(resume_from_checkpoint=checkpoint, **options)
        except NothingLeftError:
            self.is_in_train = False
            self.log({"train_runtime": 0.0, "total_flos": self.state.total_flos, "train_loss": 0.0})
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            end = self.callback_handler.on_train_end
            self.control = end(self.args, self.state, self.control)
            output = TrainOutput(self.state.global_step, 0.0, self.state.log_history[-1])
        return output._replace(training_loss=self.window.loss_of_the_run)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        check_best(best)
        super()._load_best_model()
        self.states = read_state(best)["objective"]  # what it remembered there
        if self.moves:
            read_reference(self.model, best)

    def _check_resume(self, asked: str | bool) -> str:
        folder, facts = asked_checkpoint(self.folder, asked)
        expected = self._all_facts()
        check_weights(folder, facts.pop("weights", None), expected.pop("weights"))
        check_facts(folder, facts, expected)
        state = read_state(folder)
        if self.moves:
            read_reference(self.model, folder)
        self._probe()
        check_first_rows(folder, state["reference_logps"], self._check_logps)
        self.window, self.states = Window.of(state["window"], state["loss"]), state["objective"]
        self.steps.resume(state["skipped_steps"])
        if state["micro_batch"] != self.micro_batch and _draws(self.model):
            logger.warning(
                "a micro-batch had %d rows and has %d now: dropout draws otherwise, so this run will not be "
                "the one that goes on unbroken",
                state["micro_batch"],
                self.micro_batch,
            )
        if evaluated_at_its_end(folder):
            self._logged_at = step_of(str(folder))
        if self._metrics is not None:
            self._metrics.resume(state["metrics"])
        # it was, when the run began; an epoch's end is evaluated behind the checkpoint of its last step
        at_epochs = self.args.eval_strategy == IntervalStrategy.EPOCH
        self._makes_up = at_epochs and lacks_its_epochs_evaluation(folder)
        self.args.eval_on_start = self._makes_up
        logger.info("resuming from %s", folder)
        return str(folder)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate; what is made up for at a resume counts for schedules and the best checkpoint too."""
        makes_up = skip_scheduler and self._makes_up
        skip = skip_scheduler and not makes_up
        found: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip)
        if makes_up:
            self._determine_best_metric(metrics=found, trial=trial)
        return found


def _draws(model: nn.Module) -> bool:
    """Whether a dropout is at work."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
