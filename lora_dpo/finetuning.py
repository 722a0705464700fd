"""``sft``: supervised fine-tuning with the config, data, checkpoints and folder of every other run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dpo.config import Config
from lora_dpo.run import train
from lora_dpo.run_folder import Run

logger = logging.getLogger("lora_dpo")

OBJECTIVE = "sft_demonstrations"


def sft(config: Config | Mapping[str, Any] | str | Path, *, resume: bool = False) -> Run:
    """Fine-tune on demonstrations: the chosen side of preferences, or instruction data.

    The adapter of the run (``RUN/adapter``) is what preference training starts from, as
    ``model.adapter``; its frozen copy is the reference there.

    Args:
        config: as for ``train``; the objective is ``sft_demonstrations`` whatever it names, so that
            one YAML serves both.
        resume: as for ``train``.

    Raises:
        LoraDpoError: as ``train``.
    """
    return train(_sft_config(config), resume=resume)


def _sft_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if not isinstance(config, Config):
        config = Config.load(config) if isinstance(config, (str, Path)) else Config.parse(config)
    if config.objective.name == OBJECTIVE:
        return config
    logger.info(
        "objective: %s, for this is sft; %s is what 'lora-dpo train' makes of this config",
        OBJECTIVE,
        config.objective.name,
    )
    return Config.parse({**config.to_dict(), "objective": {"name": OBJECTIVE}})
