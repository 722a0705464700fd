"""A whole run, from a config to a folder, and a folder opened again.

RUN/
  config.yaml        the resolved config; reproduces the run
  run.json           versions, what the reference was, results
  data.json          what was dropped, truncated or repaired, with examples
  metrics.jsonl      every log line
  adapter/           the trained policy, as peft loads it, with tokenizer
  reference/         the frozen starting adapter, if there was one
  checkpoint-N/      to resume from; the best one on held-out rows is never deleted
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import set_seed

from lora_dpo import objectives
from lora_dpo.arguments import build_arguments
from lora_dpo.callbacks import show_log_lines
from lora_dpo.card import model_card
from lora_dpo.checkpoints import check_facts, latest_checkpoint
from lora_dpo.config import Config
from lora_dpo.data import Tokenised
from lora_dpo.errors import DataError, ExportError, OutputError
from lora_dpo.evaluation import Evaluation, evaluate_pairs
from lora_dpo.exporting import export_adapter, export_merged
from lora_dpo.generation import Prompt, SideBySide, generate_side_by_side
from lora_dpo.guards import (
    check_context,
    check_folder,
    check_target,
    checkpoint_facts,
    settings_of_the_library,
)
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import (
    check_base,
    describe_policy,
    load_adapter,
    load_base,
    load_policy,
    peft_config,
    save_adapter,
)
from lora_dpo.preparing import RunData, load_rows, load_tokenizer, prepare_data, tokenise_rows
from lora_dpo.proving import Proof
from lora_dpo.store import lock, read_json, write_json, write_text
from lora_dpo.trainer import PreferenceTrainer

logger = logging.getLogger("lora_dpo")


@dataclass(frozen=True)
class Run:
    """A finished (or saved) run: ``Run.open(folder)``, or what ``train`` returns."""

    folder: Path
    config: Config
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open the folder of a run that has trained.

        Raises:
            OutputError: the folder holds no run of ours.
        """
        path = Path(folder)
        if not (path / "config.yaml").is_file():
            raise OutputError(
                f"{path}: no run there (config.yaml is missing). Give the folder that "
                "'lora-dpo train' wrote, its output.dir."
            )
        results = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        return cls(path, Config.load(path / "config.yaml"), results)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every log line, oldest first."""
        import json

        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def objective(self) -> BoundObjective:
        """The objective with its hyperparameters."""
        return _bound(self.config)

    def tokenizer(self) -> Any:
        """Return the run's tokenizer."""
        return load_tokenizer(self.config)

    def load_policy(self, checkpoint: str = "final") -> Any:
        """Load base, trained adapter and reference.

        Args:
            checkpoint: ``final``, ``best``, or the step of a checkpoint.
        """
        adapter = self._adapter_folder(checkpoint)
        start = self.folder / "reference"
        base = load_base(self.config.model)
        return load_adapter(base, adapter, start if start.is_dir() else None)

    def held_out(self) -> Tokenised:
        """Return the run's held-out rows, tokenised as in training."""
        data = prepare_data(self.config, self.tokenizer(), self.objective.data)
        if data.held_out is None:
            raise DataError(f"{self.folder}: the run has no held-out rows; give some with --data.")
        if self.results.get("held_out_rows") not in (None, data.held_out.fingerprint):
            raise DataError(
                f"{self.folder}: the data has changed since the run, so its held-out rows may be ones "
                "that it was trained on. Bring the old files back, or give held-out rows with --data."
            )
        return data.held_out

    def proof_rows(self) -> Tokenised:
        """Return rows to compare an export on: held-out ones, else what the files hold now."""
        data = prepare_data(self.config, self.tokenizer(), self.objective.data)
        return data.held_out if data.held_out is not None else data.train

    def _adapter_folder(self, checkpoint: str) -> Path:
        if checkpoint == "final":
            folder = self.folder / "adapter"
        elif checkpoint == "best":
            best = self.results.get("best_checkpoint")
            if not best:
                raise OutputError(f"{self.folder}: no best checkpoint is recorded; use 'final'.")
            folder = self.folder / best
        else:
            folder = self.folder / f"checkpoint-{checkpoint.removeprefix('checkpoint-')}"
        if not (folder / "adapter_config.json").is_file():
            found = sorted(p.name for p in self.folder.glob("checkpoint-*"))
            raise OutputError(
                f"{folder}: no adapter there. The run has {', '.join(found) or 'no checkpoints'}"
                f"{' and adapter/' if (self.folder / 'adapter').is_dir() else ' (training did not end)'}."
            )
        return folder


def train(config: Config | Mapping[str, Any] | str | Path, *, resume: bool = False) -> Run:
    """Train a policy as a config says, evaluate it on held-out rows, and return the run.

    Args:
        config: a ``Config``, a nested mapping, or the path of a YAML file.
        resume: go on from the newest whole checkpoint of ``output.dir``.

    Raises:
        LoraDpoError: a setting, file, model or folder that cannot be used; all of these before the
            weights load, and nothing is written.
    """
    show_log_lines()
    config = _as_config(config).resolved()
    folder = Path(config.output.dir)
    check_folder(folder, resume=resume)
    objective = _bound(config)
    if objective.data != "paired":
        raise DataError(
            f"objective {objective.name!r} needs unpaired data, which is not trained on yet."
        )
    evaluates = bool(config.data.eval) or config.data.eval_fraction > 0
    arguments = build_arguments(config.train.further, output_dir=str(folder), evaluates=evaluates)
    if resume:
        checkpoint, facts, _ = latest_checkpoint(folder)
        expected = checkpoint_facts(config)
        check_facts(checkpoint, {key: facts.get(key) for key in expected}, expected)
    base = check_base(config.model)
    check_context(config, base)
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer, objective.data)
    for line in data.lines():
        logger.info(line)
    if evaluates and data.held_out is None:  # too few prompts to hold any out
        arguments = build_arguments(config.train.further, output_dir=str(folder), evaluates=False)
    with lock(folder):
        _write_settings(folder, config, data)
        set_seed(arguments.seed)
        with settings_of_the_library():
            trainer = _build_trainer(config, objective, arguments, data)
        if (start := config.model.adapter) is not None and not resume:
            save_adapter(trainer.model, folder / "reference", adapter="reference")
            logger.info("starting adapter %s kept in %s", start, folder / "reference")
        accumulated = trainer.args.per_device_train_batch_size // trainer.micro_batch
        logger.info("a step: %d x %d pairs", trainer.micro_batch, accumulated)
        trainer.train(resume_from_checkpoint=resume or None)
        return _finish(trainer, config, objective, tokenizer, data)


def evaluate(
    run: Run | str | Path,
    *,
    data: Any = None,
    checkpoint: str = "final",
    batch_size: int | None = None,
) -> Evaluation:
    """Return held-out metrics of a run with intervals clustered by prompt.

    Args:
        run: a run or its folder.
        data: other preferences than the run's held-out rows (a file, folder, hub id or dataset).
        checkpoint: ``final``, ``best`` or a step.
        batch_size: pairs of a forward pass.
    """
    run = _as_run(run)
    tokenizer = run.tokenizer()
    rows = (
        tokenise_rows(load_rows(run.config, data, "paired"), run.config, tokenizer)
        if data
        else run.held_out()
    )
    width = batch_size or int(run.config.train.further.get("per_device_eval_batch_size", 2))
    return evaluate_pairs(
        run.load_policy(checkpoint),
        rows,
        run.objective,
        pad_id=0,
        batch_size=width,
        chunk=run.config.train.chunk_tokens,
    )


def generate(
    run: Run | str | Path,
    prompts: Sequence[Prompt],
    *,
    checkpoint: str = "final",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[SideBySide]:
    """Complete prompts with policy and reference side by side.

    A text becomes the user's turn where the run was trained on chats.
    """
    run = _as_run(run)
    if run.results.get("chat"):
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return generate_side_by_side(
        run.load_policy(checkpoint),
        run.tokenizer(),
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def export(
    run: Run | str | Path,
    to: str | Path,
    *,
    merge: bool = False,
    base: Literal["trained", "original"] = "trained",
    checkpoint: str = "final",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    overwrite: bool = False,
) -> Proof | None:
    """Hand a run on: its adapter alone, or merged into plain weights and proven.

    Args:
        run: a run or its folder.
        to: the new folder; an existing one is replaced only with ``overwrite``.
        merge: whether the adapter is merged.
        base: ``trained`` (the dequantised weights that the policy was trained on) or ``original``.
        checkpoint: ``final``, ``best`` or a step.
        dtype: of the merged files; ``auto`` is that of the base checkpoint.
        overwrite: replace an existing folder, once the new one is whole.

    Returns:
        The proof of a merge; None for an adapter alone.
    """
    run, target = _as_run(run), Path(to)
    check_target(run.folder, target, overwrite=overwrite)
    if not merge and (base != "trained" or dtype != "auto"):
        raise ExportError("export: 'base' and 'dtype' belong to a merge; give --merge with them.")
    tokenizer = run.tokenizer()
    if not merge:
        card = model_card(run.config, run.results, proof=None)
        export_adapter(
            run.load_policy(checkpoint), tokenizer, target, card=card, overwrite=overwrite
        )
        return None
    sequences = _proof_sequences(run.proof_rows())
    return export_merged(
        lambda: run.load_policy(checkpoint),
        tokenizer,
        target,
        sequences=sequences,
        base=base,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        revision=run.config.model.revision,
        card=lambda proof: model_card(run.config, run.results, proof=proof),
        overwrite=overwrite,
    )


def _build_trainer(
    config: Config, objective: BoundObjective, arguments: Any, data: RunData
) -> PreferenceTrainer:
    model = config.model
    policy = load_policy(
        model.base,
        device="cpu" if arguments.use_cpu else None,
        lora=None if model.adapter else peft_config(config.lora),
        adapter=model.adapter,
        **{k: v for k, v in model.model_dump().items() if k not in ("base", "adapter")},
    )
    trainer = PreferenceTrainer(
        policy,
        objective=objective,
        args=arguments,
        train_data=data.train,
        eval_data=data.held_out,
        chunk_tokens=config.train.chunk_tokens,
        facts=checkpoint_facts(config),
    )
    trainer.write_metrics_to(Path(config.output.dir) / "metrics.jsonl")
    return trainer


def _finish(
    trainer: PreferenceTrainer,
    config: Config,
    objective: BoundObjective,
    tokenizer: Any,
    data: RunData,
) -> Run:
    folder = Path(config.output.dir)
    save_adapter(trainer.model, folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    best = trainer.state.best_model_checkpoint
    results: dict[str, Any] = {
        "objective": str(objective),
        "reference": trainer.reference_in_words,
        "steps": trainer.state.global_step,
        "chat": data.is_chat,
        "weights": describe_policy(trainer.model).lines()[0],
        "held_out_rows": data.held_out.fingerprint if data.held_out is not None else None,
        "rows": {"train": len(data.train), "held_out": len(data.held_out) if data.held_out else 0},
        "best_checkpoint": Path(best).name if best else None,
        "versions": versions(),
    }
    if data.held_out is not None:
        if trainer.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
        results["held_out"] = trainer.last_evaluation.to_dict()
        for line in str(trainer.last_evaluation).splitlines():
            logger.info(line)
    write_json(folder / "run.json", results)
    write_text(folder / "adapter" / "README.md", model_card(config, results, proof=None))
    logger.info("adapter and metrics are in %s", folder)
    return Run(folder, config, results)


def _write_settings(folder: Path, config: Config, data: RunData) -> None:
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "data.json", {name: r.to_dict() for name, r in data.reports.items()})


def _proof_sequences(rows: Tokenised) -> list[tuple[list[int], list[int]]]:
    """Return held-out rows for the proof of a merge, short ones first, one a prompt."""
    by_prompt = {row["prompt_key"]: (row["prompt_ids"], row["chosen_ids"]) for row in rows.rows}
    return sorted(by_prompt.values(), key=lambda pair: len(pair[0]) + len(pair[1]))[:64]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "device": _device_name()}
    for name in (
        "lora-dpo",
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _bound(config: Config) -> BoundObjective:
    return objectives.build(config.objective.to_dict())


def _as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    return Config.load(config) if isinstance(config, (str, Path)) else Config.parse(config)


def _as_run(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(run)
