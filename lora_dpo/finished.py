"""What is asked of a run that has ended: held-out metrics, a diagnosis, answers; and of data before one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dpo.config import Config, LoraConfig
from lora_dpo.diagnostics import (
    Diagnosis,
    Effort,
    diagnose_data,
    diagnose_policy,
    read_margins,
)
from lora_dpo.engine import choose_engine
from lora_dpo.evaluation import Evaluation, evaluate_policy
from lora_dpo.generation import SideBySide, generate_side_by_side
from lora_dpo.guards import check_context
from lora_dpo.policy import check_base, load_policy, peft_config
from lora_dpo.preparing import load_rows, load_tokenizer, reference_cache, tokenise_rows
from lora_dpo.prompt_tokens import Prompt, as_trained
from lora_dpo.reference_store import stored_reference_logps
from lora_dpo.run_folder import Run
from lora_dpo.stepping import fitted, row_length

logger = logging.getLogger("lora_dpo")


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
    if data:
        read = load_rows(run.config, data, run.objective.data)
        rows = tokenise_rows(read, run.config, tokenizer)
        for line in (*read.report.lines(), *rows.report.lines()):
            logger.info(line)
        rows, _ = fitted(run.objective, rows, None)
    else:
        rows = run.held_out()
    width = batch_size or int(run.config.train.further.get("per_device_eval_batch_size", 2))
    policy, chunk = run.load_policy(checkpoint), run.config.train.chunk_tokens
    if (folder := reference_cache(run.config)) is not None:
        # what training stored is of the layout that it ran on
        longest = max(map(row_length, rows.rows))
        first = [rows.rows[i] for i in range(min(2, len(rows)))]
        line = choose_engine(policy, first, longest, run.config.train.engine, chunk=chunk)
        if not line.warns:  # else it is told already
            logger.info(line)
        rows = stored_reference_logps(policy, rows, folder, batch_size=width, chunk=chunk)
    return evaluate_policy(
        policy,
        rows,
        run.objective,
        states=run.objective_states(checkpoint),
        batch_size=width,
        chunk=chunk,
    )


def diagnose(
    run: Run | str | Path, *, checkpoint: str = "final", effort: Effort | None = None
) -> Diagnosis:
    """Look for DPO's known failures in a finished run; write what was found to its folder.

    Args:
        run: a run or its folder.
        checkpoint: ``final``, ``best`` or a step.
        effort: how many rows and samples are looked at.
    """
    run = _as_run(run)
    width = int(run.config.train.further.get("per_device_eval_batch_size", 8))
    diagnosis = diagnose_policy(
        run.load_policy(checkpoint),
        run.tokenizer(),
        run.objective,
        run.proof_rows(),
        history=run.history,
        margins=read_margins(run.folder),
        subject=run.folder.name if checkpoint == "final" else f"{run.folder.name} at {checkpoint}",
        effort=effort or Effort(batch_size=width, chunk=run.config.train.chunk_tokens),
    )
    if checkpoint == "final":
        diagnosis.write(run.folder / "diagnostics.json")
    return diagnosis


def diagnose_preferences(
    data: Any, base: str | Path, *, effort: Effort | None = None, **settings: Any
) -> Diagnosis:
    """Look at preferences before any training: lengths, similarity, and fit to the base model.

    Args:
        data: a file, folder, hub id or dataset.
        base: the model that would be trained; it is the reference.
        effort: how many rows and samples are looked at.
        settings: further settings of the section ``data``, such as ``max_length``.
    """
    config = Config.parse(
        {
            "model": {"base": str(base)},
            "data": {"train": "given", **settings},
            "output": {"dir": "none"},
        }
    )
    check_context(config, check_base(config.model))
    tokenizer = load_tokenizer(config)
    rows = tokenise_rows(load_rows(config, data, None), config, tokenizer)
    policy = load_policy(str(base), lora=peft_config(LoraConfig.model_validate({"rank": 1})))
    subject = str(data) if isinstance(data, (str, Path)) else "the data"
    return diagnose_data(policy, tokenizer, rows, subject=subject, effort=effort or Effort())


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
    return generate_side_by_side(
        run.load_policy(checkpoint),
        run.tokenizer(),
        as_trained(prompts, chat=run.is_chat),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        template_arguments=run.config.data.template_arguments,
    )


def _as_run(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(run)
