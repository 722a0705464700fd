"""A whole run, from a config to a folder (``run_folder``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from lora_dpo.arguments import asks, build_arguments
from lora_dpo.callbacks import EndCallback, show_log_lines
from lora_dpo.card import model_card
from lora_dpo.checkpoints import check_facts
from lora_dpo.config import Config
from lora_dpo.data import label_counts
from lora_dpo.determinism import deterministic
from lora_dpo.diagnostics import (
    Effort,
    diagnose_policy,
    read_margins,
)
from lora_dpo.guards import (
    check_context,
    check_lengths,
    check_scaler,
    check_trackers,
    checkpoint_facts,
    only_numbers,
    settings_of_the_library,
)
from lora_dpo.inspecting import data_card
from lora_dpo.metrics import peak_gib
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import (
    check_base,
    compute_dtype,
    describe_policy,
    let_segments_grow,
    load_policy,
    peft_config,
    save_adapter,
)
from lora_dpo.preparing import (
    RunData,
    load_tokenizer,
    prepare_data,
    reference_cache,
)
from lora_dpo.ranks import (
    agreed,
    first_alone,
    launched_processes,
    processes,
    rank,
    refuse_launch,
)
from lora_dpo.restarting import check_start, started
from lora_dpo.run_folder import Run, bound_objective, reference_moves, versions
from lora_dpo.sealing import seal
from lora_dpo.sharding import check_sharding, is_sharded, shard_base
from lora_dpo.stepping import fitted, rows_a_step, step_of
from lora_dpo.store import new_folder, write_json, write_text
from lora_dpo.surroundings import as_it_began, check_sources, note_environment
from lora_dpo.trainer import PreferenceTrainer
from lora_dpo.watching import add_samples, plan_and_measurement

logger = logging.getLogger("lora_dpo")


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
) -> Run:
    """Train a policy as a config says, evaluate it on held-out rows, and return the run.

    Args:
        config: a ``Config``, a nested mapping, or the path of a YAML file.
        resume: go on from the newest whole checkpoint of ``output.dir``; begin where there is none
            yet; leave a run that has ended as it is.
        stop_after: the last step; learning rate and all else go as if the run were not cut short.

    Raises:
        LoraDpoError: a setting, file, model or folder that cannot be used; all of these before the
            weights load, and nothing is written.
    """
    show_log_lines()
    let_segments_grow()
    refuse_launch()
    config = _as_config(config).resolved()
    check_sharding(config, launched_processes())
    with deterministic(asks(config.train.further, "full_determinism")):
        return _train(config, resume=resume, stop_after=stop_after)


def _train(config: Config, *, resume: bool, stop_after: int | None) -> Run:
    folder = Path(config.output.dir)
    found = check_start(folder, config, resume=resume)
    if found.state == "ended":
        logger.info("%s: %s; nothing is left to do", folder, found.words)
        return Run.open(folder)
    if resume and found.state != "stopped":
        logger.info("%s: %s; it begins now", folder, found.words)
    resume = found.state == "stopped"
    begun = step_of(str(found.checkpoint)) if found.checkpoint is not None else 0
    objective = bound_objective(config)
    evaluates = bool(config.data.eval) or config.data.eval_fraction > 0
    arguments = build_arguments(config.train.further, output_dir=str(folder), evaluates=evaluates)
    check_trackers(arguments.report_to)
    if resume and found.checkpoint is not None:
        here, there = rows_a_step(arguments), found.facts.get("rows_a_step")
        check_facts(found.checkpoint, {"rows_a_step": there}, {"rows_a_step": here})
    source = as_it_began(config, folder) if resume else config
    base = check_base(source.model)
    check_context(config, base)
    if resume:
        check_sources(folder, source, base)
    with first_alone():  # the others find the tokens that it has stored
        tokenizer = load_tokenizer(source)
        data = prepare_data(source, tokenizer, objective.data)
        train_rows, held_out = fitted(objective, data.train, data.held_out)
    data = replace(data, train=train_rows, held_out=held_out)
    check_lengths(base, data.train, data.held_out)
    for line in data.lines():
        logger.info(line)
    if evaluates and data.held_out is None:  # too few prompts to hold any out
        arguments = build_arguments(config.train.further, output_dir=str(folder), evaluates=False)
    with ExitStack() as held:
        with agreed():
            if rank() == 0:
                held.enter_context(started(folder, config, found))
                _write_settings(folder, config, data)
                note_environment(folder, config, base, data.train, data.held_out, begun)
        set_seed(arguments.seed)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # an earlier run of this process had its own
        with agreed(), settings_of_the_library():
            trainer = _build_trainer(source, objective, arguments, data, checkpoint_facts(config))
            if resume and found.checkpoint is not None:
                check_scaler(found.checkpoint, trainer.accelerator.scaler)
            add_samples(trainer, config.output, tokenizer, data.held_out)
            trainer.memory.foresee()
        if stop_after is not None:
            trainer.add_callback(EndCallback(stop_after))
        if (start := config.model.adapter) is not None and not resume:
            with agreed():
                if rank() == 0:
                    save_adapter(trainer.model, folder / "reference", adapter="reference")
                    seal(folder / "reference", "reference")
            logger.info("starting adapter %s kept in %s", start, folder / "reference")
        _tell_step(trainer)
        began = time.monotonic()
        with plan_and_measurement(trainer, folder / "plan.json"), only_numbers():
            trainer.train(resume_from_checkpoint=resume or None)
        minutes, peak = (time.monotonic() - began) / 60, peak_gib(trainer.args.device)
        logger.info("trained in %.1f minutes; peak memory %.1f GiB", minutes, peak)
        return _finish(trainer, config, objective, tokenizer, data)


def _build_trainer(
    config: Config,
    objective: BoundObjective,
    arguments: Any,
    data: RunData,
    facts: dict[str, Any],
) -> PreferenceTrainer:
    model, sharded = config.model, config.train.shard_base
    settings = {k: v for k, v in model.model_dump().items() if k not in ("base", "adapter")}
    if sharded:  # loaded into the memory of the machine, for the card that will compute
        dtype = compute_dtype(model.compute_dtype, arguments.device)
        settings["compute_dtype"] = str(dtype).removeprefix("torch.")
    policy = load_policy(
        model.base,
        device="cpu" if arguments.use_cpu or sharded else None,
        lora=None if model.adapter else peft_config(config.lora),
        adapter=model.adapter,
        **settings,
    )
    if sharded:
        logger.info(shard_base(policy, arguments.device))
    trainer = PreferenceTrainer(
        policy,
        objective=objective,
        args=arguments,
        train_data=data.train,
        eval_data=data.held_out,
        chunk_tokens=config.train.chunk_tokens,
        engine=config.train.engine,
        max_tokens_per_batch=config.train.max_tokens_per_batch,
        memory_budget_gib=config.train.memory_budget_gib,
        activation_offloading=config.train.activation_offloading,
        reference_moves=reference_moves(config),
        reference_cache=reference_cache(config),
        on_nonfinite=config.train.on_nonfinite,
        facts=facts,
    )
    trainer.write_metrics_to(Path(config.output.dir) / "metrics.jsonl")
    return trainer


def _tell_step(trainer: PreferenceTrainer) -> None:
    accumulated = trainer.args.per_device_train_batch_size // trainer.micro_batch
    rows = "pairs" if trainer.objective.data == "paired" else "rows"
    several = f"{processes()} processes x " if processes() > 1 else ""
    logger.info("a step: %s%d x %d %s", several, trainer.micro_batch, accumulated, rows)
    if processes() == 1 and torch.cuda.device_count() > 1:
        logger.info(
            "one of %d cards is used; torchrun --nproc_per_node %d -m lora_dpo train ... takes all",
            torch.cuda.device_count(),
            torch.cuda.device_count(),
        )


def _finish(
    trainer: PreferenceTrainer,
    config: Config,
    objective: BoundObjective,
    tokenizer: Any,
    data: RunData,
) -> Run:
    folder = Path(config.output.dir)
    with agreed():
        if rank() == 0:
            _write_adapters(trainer, tokenizer, folder)
    best = trainer.state.best_model_checkpoint
    results: dict[str, Any] = {
        "objective": str(trainer.objective),
        "reference": trainer.reference_in_words,
        "steps": trainer.state.global_step,
        "chat": data.is_chat,
        "weights": describe_policy(trainer.model).lines()[0],
        "train_rows": data.train.fingerprint,
        "held_out_rows": data.held_out.fingerprint if data.held_out is not None else None,
        "rows": {"train": len(data.train), "held_out": len(data.held_out) if data.held_out else 0},
        "best_checkpoint": Path(best).name if best else None,
        "labels": list(label_counts(data.train)) if objective.data == "unpaired" else None,
        "objective_states": trainer.states,
        "processes": processes(),
        "versions": versions(),
    }
    if data.held_out is not None:
        if trainer.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
        results["held_out"] = trainer.last_evaluation.to_dict()
        for line in str(trainer.last_evaluation).splitlines():
            logger.info(line)
    with agreed():
        if rank() == 0:
            write_text(folder / "adapter" / "README.md", model_card(config, results))
            write_json(folder / "run.json", results)  # now the run has ended
    if config.output.diagnose and (rank() == 0 or is_sharded(trainer.model)):
        _diagnose_at_the_end(trainer, tokenizer, data, folder)
    logger.info("adapter and metrics are in %s", folder)
    return Run(folder, config, results)


def _write_adapters(trainer: PreferenceTrainer, tokenizer: Any, folder: Path) -> None:
    """Write the reference, if it has moved, and then the adapter: each is whole or not there."""
    if trainer.moves:
        with new_folder(folder / "reference", overwrite=True) as work:
            save_adapter(trainer.model, work, adapter="reference")
            seal(work, "reference")
    with new_folder(folder / "adapter", overwrite=True) as work:
        save_adapter(trainer.model, work)
        tokenizer.save_pretrained(work)
        seal(work, "adapter")


def _diagnose_at_the_end(
    trainer: PreferenceTrainer, tokenizer: Any, data: RunData, folder: Path
) -> None:
    try:
        diagnosis = diagnose_policy(
            trainer.model,
            tokenizer,
            trainer.objective,
            # with the reference's log-probs, where the trainer took them from disk
            replace(data.held_out, rows=trainer.eval_dataset)
            if data.held_out
            else replace(data.train, rows=trainer.train_dataset),
            history=Run.open(folder).history,
            margins=read_margins(folder),
            subject=folder.name,
            effort=Effort(batch_size=trainer.micro_batch, chunk=trainer.chunk_tokens),
        )
        if rank() == 0:
            diagnosis.write(folder / "diagnostics.json")
    except Exception as error:  # the run is whole without it, and must not be lost to it
        logger.warning("diagnosis failed (%s); try: lora-dpo diagnose %s", error, folder)
        return
    for line in diagnosis.lines():
        logger.info(line)


def _write_settings(folder: Path, config: Config, data: RunData) -> None:
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "data.json", {name: r.to_dict() for name, r in data.reports.items()})
    parts = {"train": data.train, "held out": data.held_out}
    cards = {name: data_card(rows) for name, rows in parts.items() if rows is not None}
    write_json(folder / "lengths.json", cards)


def _as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    return Config.load(config) if isinstance(config, (str, Path)) else Config.parse(config)
