"""The one description of a run: YAML, Python objects and ``--set`` overrides, all checked alike.

Every problem of a config is found at once and before any weights load. Nothing is ignored: an
unknown key is an error that names the nearest legal one.
"""

from lora_dpo.config.reading import data_settings, read_yaml
from lora_dpo.config.sections import (
    BASE_CHANGING_INITS,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    SourceConfig,
    TrainConfig,
)
from lora_dpo.config.whole import Config

__all__ = [
    "BASE_CHANGING_INITS",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OutputConfig",
    "SourceConfig",
    "TrainConfig",
    "data_settings",
    "read_yaml",
]
