"""``PreferenceTrainer``: loss, batches, metrics and saving; all else is ``transformers.Trainer``.

The library sees one batch per optimiser step. ``training_step`` splits it into micro-batches and
weighs each pair by the pairs of the whole step on all ranks, so that 1 x 8 equals 8 x 1.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from lora_dpo import objectives
from lora_dpo.callbacks import (
    JsonlCallback,
    MovementCallback,
    ResumeCallback,
    StopCallback,
    show_log_lines,
)
from lora_dpo.engine import Engine, choose_engine, has_fast_layers, is_flat
from lora_dpo.errors import DataError, TrainingError
from lora_dpo.evaluation import evaluate_stats, joined, rows_stats, tell_of_gaps
from lora_dpo.heads import base_dtype, check_head
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.memory import Memory
from lora_dpo.metrics import Window, peak_gib, row_metrics
from lora_dpo.moving_reference import NEVER, MovesCallback, ReferenceMoves
from lora_dpo.nonfinite import OnNonfinite, Steps
from lora_dpo.objectives import BoundObjective
from lora_dpo.passes import Passes, Step
from lora_dpo.policy import (
    describe_reference,
    prepare_policy,
    unwrap,
)
from lora_dpo.randomness import forked
from lora_dpo.ranks import (
    agreed,
    largest,
    of_all,
    processes,
)
from lora_dpo.reference_cache import check_known_reference, without_known_reference
from lora_dpo.reference_store import stored_rows
from lora_dpo.resuming import ResumableTrainer
from lora_dpo.shortage import Width, narrowing
from lora_dpo.starting import start_lines
from lora_dpo.stats import AnyStats, reference_logps, stats_of
from lora_dpo.stepping import (
    RowMargins,
    balanced,
    batches_of,
    counted_tokens,
    fitted,
    in_order,
    keep_rows,
    leave_checkpointing,
    longest_row,
    one_batch_a_step,
    recomputes,
    row_tokens,
    rows_a_step,
    step_of,
    tokenised,
)
from lora_dpo.store import MANIFEST
from lora_dpo.watching.advice import AdviceCallback
from lora_dpo.watching.pace import Pace
from lora_dpo.watching.progress import put_display

logger = logging.getLogger("lora_dpo")


class PreferenceTrainer(ResumableTrainer):
    """Train a policy on preferences against its reference.

    Args:
        policy: a ``PeftModel``, from ``load_policy`` or your own.
        objective: a name of the table or ``objectives.get(name).bind(...)``.
        args: ``TrainingArguments``; the product of ``per_device_train_batch_size`` and
            ``gradient_accumulation_steps`` is the rows of a step, the first the rows of a
            micro-batch.
        train_data: tokenised pairs, or anything that ``load_preferences`` takes (then with
            ``tokenizer``).
        eval_data: held-out pairs, likewise.
        tokenizer, max_length: for data that is not tokenised yet.
        chunk_tokens: positions whose logits exist at one time.
        engine: ``auto``, ``fast`` or ``plain``, as in ``choose_engine``.
        max_tokens_per_batch: tokens of a micro-batch, in place of its rows: a step is split so that
            no micro-batch has more (a longer row has one to itself). No number depends on it.
        memory_budget_gib: memory that training may take; as few layers are recomputed as fit. That of
            the card if left out; on a CPU then all that ``args`` asks for.
        activation_offloading: whether layers may wait in the memory of the CPU in place of being
            recomputed, where that is timed to be faster; and the inputs of recomputed ones, where
            nothing else makes a step fit.
        reference_is: ``auto``, ``base`` or ``start``, as in ``prepare_policy``: what the reference of
            an adapter is that was trained before.
        reference_moves: when the reference follows the policy, and how (TR-DPO); never by default.
        reference_cache: folder of reference log-probs, which are taken from there; unknown ones are
            computed in one pass and stored for every later run. None runs the reference in each step.
        on_nonfinite: ``stop`` or ``skip``: what is done about a loss or gradient that is no number.
        facts: what a checkpoint must agree with to be resumed from (the config, say).

    Raises:
        ModelError, DataError, ConfigError: before anything is trained.
    """

    # what the library types more loosely than it is here
    model: Any
    train_dataset: Any
    accelerator: Any
    objective: BoundObjective
    _check_logps: Sequence[float] = ()  # of the reference, on the first rows
    _kept_lines: Sequence[str] = ()  # on log-probs of the reference that are kept with the rows

    def __init__(
        self,
        policy: PeftModel,
        *,
        objective: str | BoundObjective = "dpo",
        args: TrainingArguments,
        train_data: Any,
        eval_data: Any = None,
        tokenizer: Any = None,
        max_length: int = 1024,
        chunk_tokens: int = CHUNK_TOKENS,
        engine: Engine = "auto",
        max_tokens_per_batch: int | None = None,
        memory_budget_gib: float | None = None,
        activation_offloading: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
        reference_is: Literal["auto", "base", "start"] = "auto",
        reference_moves: ReferenceMoves = NEVER,
        reference_cache: str | Path | None = None,
        on_nonfinite: OnNonfinite = "stop",
        facts: dict[str, Any] | None = None,
    ) -> None:
        bound = objectives.get(objective).bind() if isinstance(objective, str) else objective
        self.chunk_tokens, self.moves = chunk_tokens, reference_moves
        show_log_lines()
        self._batches = batches_of(args, max_tokens_per_batch)
        self.keep_checkpoints = args.save_total_limit
        self.window, self.pace, self.evaluated_at = Window(), Pace(), -1
        self.steps = Steps(on_nonfinite)
        train, held_out = (
            tokenised(data, tokenizer, max_length, bound.data) if data is not None else None
            for data in (train_data, eval_data)
        )
        if train is None or not len(train):
            raise DataError("PreferenceTrainer: train_data holds no rows.")
        seen = {"rows": train.fingerprint[:16], "rows_a_step": rows_a_step(args)}
        self.facts = {**(facts or {"objective": str(bound)}), **seen}
        train, held_out = fitted(bound, train, held_out)
        self.objective = balanced(bound, train)
        self.states = self.objective.initial_states()
        self._margins = RowMargins()
        policy = prepare_policy(policy, reference_is=reference_is)
        self.moves.begin(policy, self.objective, train, cached=reference_cache is not None)
        super().__init__(
            model=policy,
            args=one_batch_a_step(args, unwrap(policy)),
            data_collator=keep_rows,
            train_dataset=train.rows if train else None,
            eval_dataset=held_out.rows if held_out else None,
            compute_metrics=self._held_out_metrics,
            callbacks=[*self._own_callbacks(), *callbacks],
        )
        self.label_names, self._eval_width = [], Width(self.args.eval_batch_size)
        self.display = put_display(self)
        check_head(self.model)
        longest = max(longest_row(data.rows) for data in (train, held_out) if data)
        how: Any = {"chunk": chunk_tokens, "recompute": recomputes(self.args)}
        how["with_reference"] = self.objective.reference
        self.engine = choose_engine(self.model, self._first_rows(), longest, engine, **how)
        if has_fast_layers(self.model):
            leave_checkpointing(self.args)
        if reference_cache is not None:  # now that the layout is known, which its key holds
            width = args.per_device_eval_batch_size if held_out else self._batches.micro_batch
            sets, forward = (train, held_out), {"batch_size": width, "chunk": chunk_tokens}
            kept = stored_rows(policy, bound, sets, reference_cache, **forward)
            self.train_dataset, self.eval_dataset = (data and data.rows for data in kept)
            how["with_reference"] = False
        how |= {"args": args, "budget_gib": memory_budget_gib, "offloads": activation_offloading}
        options: Any = {"device": self.args.device, "alone": processes() == 1, "settings": how}
        self.memory = Memory(self.model, self.train_dataset, self._batches, **options)

    def _own_callbacks(self) -> list[TrainerCallback]:
        self.stop, self.advice = StopCallback(), AdviceCallback(self)
        movement, moves = MovementCallback(self.advice.tell), MovesCallback(self.moves)
        return [ResumeCallback(), self.stop, movement, moves]

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch; a shortage of memory makes it smaller."""
        return self.memory.batches.micro_batch

    # ---- one optimiser step ------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Backpropagate the mean loss over all rows of the step; return it, detached."""
        model.train()
        rows = in_order(inputs["rows"].rows)
        each = sum(map(counted_tokens, rows)) / len(rows)

        def attempt() -> Step:
            how = (self._stats, *self.ways_back(model))
            batches, flat = self.memory.batches, is_flat(self.model)
            seed = self.args.seed * 1_000_003 + self.state.global_step
            passes = Passes(self.objective, *how, batches, flat, seed)
            return passes(model, rows, self.states, tokens_a_row=each)

        step = self.memory.fitted(attempt, f"step {self.state.global_step + 1}")
        self.pace.add(len(rows))
        self.pace.tokens += sum(map(row_tokens, rows))
        if not self.steps.updates(self, model, rows, step):
            return torch.zeros_like(step.losses.sum())
        self.update(model)
        if self.state.global_step == 0:
            self.advice.first_step(step, self.states, each)
        self.states = self.objective.updated(self.states, step.stats)
        values = row_metrics(self.objective, step.stats, step.losses)
        self.window.add(values)
        if self.objective.data == "paired":
            self._margins.add(self.state.global_step + 1, rows, values["rewards/margins"])
        return step.losses.mean()

    def _stats(
        self, model: nn.Module, rows: Sequence[Mapping[str, Any]], gradient_only: bool = False
    ) -> AnyStats:
        return rows_stats(
            model,
            rows,
            self.objective,
            self.args.device,
            chunk=self.chunk_tokens,
            gradient_only=gradient_only,
        )

    # ---- evaluation --------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without moving the random numbers that training draws from."""
        with self.pace.resting(), self.display.shown(), forked():
            torch.manual_seed(0)  # an objective's draws are the same in every evaluation
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.evaluated_at = self.state.global_step
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return per-row statistics in place of logits, those of all processes in the rows' order."""
        rows, width = inputs["rows"].rows, self.args.eval_batch_size

        def run(own: Sequence[Any]) -> Mapping[str, Tensor]:
            call, places = partial(self._stats, model), range(len(own))
            found = narrowing(model, own, places, self._eval_width, call, "evaluation")
            return joined([stats for _, stats in found]).present()

        with torch.no_grad():
            found = of_all(rows, width, run)
        self._statistics = list(found)
        table = torch.stack([value.double() for value in found.values()], dim=1)
        keys = [int(row["prompt_key"][:12], 16) for row in rows]
        return None, table, torch.tensor(keys, device=table.device)

    def _held_out_metrics(self, prediction: Any) -> dict[str, float]:
        table = torch.from_numpy(prediction.predictions)  # [rows, statistic]
        stats = stats_of(dict(zip(self._statistics, table.unbind(1), strict=True)))
        tell_of_gaps(stats, self.eval_dataset)
        self.held_out_stats, keys = stats, prediction.label_ids
        self.last_evaluation = evaluate_stats(stats, self.objective, keys, self.states)
        return {name: estimate.mean for name, estimate in self.last_evaluation.estimates.items()}

    # ---- a whole run -------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train; Ctrl-C and SIGTERM save a checkpoint first.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint of the output folder, or
                the path of one.

        Raises:
            TrainingError: the policy is not at its reference at the start, a checkpoint of another
                run or reference, a loss that is not finite, or an interruption (saved).
        """
        with agreed():
            if resume_from_checkpoint:
                resume_from_checkpoint = self._check_resume(resume_from_checkpoint)
            else:
                for line in self.self_check():
                    logger.info(line)
            self.memory.probe(self._stats)
        self._margins.begin(step_of(resume_from_checkpoint))
        with self.stop.listening(), self.display.shown():
            output = self._train(resume_from_checkpoint or None, **kwargs)
        self.stop.agree()
        saved = self.folder / f"checkpoint-{self.state.global_step}" / MANIFEST
        if self.stop.signal is not None and not saved.is_file():
            self._save_checkpoint(self.model, None)  # a save strategy can overrule the callback
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self.evaluated_at = self._logged_at = -1  # the last evaluation was of another model
        if self.stop.signal is not None and self.state.global_step < self.state.max_steps:
            raise TrainingError(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}; a checkpoint is "
                f"saved in {self.args.output_dir}. Go on with --resume (train(..., resume=True))."
            )
        return output

    def self_check(self) -> list[str]:
        """Return sentences on engine, policy and reference, after proving that they agree."""
        self.steps.foresee(self.model, self.train_dataset)
        stats = self._probe()
        scale = max(map(abs, self._check_logps), default=0.0)
        lines = start_lines(self.model, self.objective, self.states, stats, scale)
        # a warning is told already
        told = [] if getattr(self.engine, "warns", False) else [self.engine]
        return [*told, *self.memory.lines(), *self._kept_lines, *lines]

    @property
    def reference_in_words(self) -> str:
        """What the reference is; that there is none, for an objective that reads none."""
        if not self.objective.reference:
            return "none"
        return str(self.moves) or describe_reference(self.model)

    def _first_rows(self) -> list[dict[str, Any]]:
        return [self.train_dataset[i] for i in range(min(2, len(self.train_dataset)))]

    def _probe(self) -> AnyStats:
        rows, was_training = self._first_rows(), self.model.training
        self.model.eval()
        with torch.no_grad(), forked():
            stats = self._stats(self.model, [without_known_reference(row) for row in rows])
        self.model.train(was_training)
        if stats.has_reference:
            self._check_logps = reference_logps(stats).tolist()
            dtype, logps = base_dtype(self.model), reference_logps(stats)
            self._kept_lines = check_known_reference(rows, logps, dtype)
        return stats

    # ---- logs --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics: means over every pair since the last line, and over the run at its end."""
        if "eval_loss" in logs and self.state.global_step == self._logged_at:
            return  # before the process was killed whose last checkpoint this one resumed from
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self.window.loss_of_the_run}
        if "loss" in logs:
            logs = self.steps.line(logs, self.window.means()) | self.pace.since_last_line()
            logs["memory/peak_gib"] = largest(peak_gib(self.args.device))
            self._margins.write()
        super().log(logs, start_time)

    def write_metrics_to(self, path: Path) -> None:
        """Keep every log line as JSON in ``path``, and beside it the margins of training rows."""
        self._metrics = JsonlCallback(path)
        self.add_callback(self._metrics)
        if self.is_world_process_zero():
            self.advice.path = path.with_name("notes.jsonl")
            self._margins.path = path.with_name("row_margins.jsonl")
