"""``Config``: all sections of a run together, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lora_dpo.config.plain import plain_problems
from lora_dpo.config.problems import problems_between, sentences
from lora_dpo.config.reading import override, read_yaml, set_key
from lora_dpo.config.secret_values import secret_problems
from lora_dpo.config.sections import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    Section,
    TrainConfig,
)
from lora_dpo.errors import ConfigError


class Config(Section):
    """A whole run. ``Config.load(path)`` reads YAML; ``Config.parse(mapping)`` takes Python."""

    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig
    lora: LoraConfig = LoraConfig()  # type: ignore[call-arg]
    data: DataConfig
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    output: OutputConfig

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Read a YAML file and apply ``key=value`` overrides.

        Raises:
            ConfigError: with a sentence for every problem of file and overrides together.
        """
        return cls.parse(override(read_yaml(path), overrides))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Config:
        """Check a nested mapping; all problems are collected into one ``ConfigError``."""
        if problems := secret_problems(values):  # alone: other sentences repeat what was given
            raise ConfigError(problems)
        config = None
        if foreign := plain_problems(values):
            raise ConfigError(foreign)  # what reads it further trusts it to be plain
        # an empty section of a YAML is None, and means its defaults
        values = {key: {} if value is None else value for key, value in values.items()}
        if isinstance(values.get("objective"), str):
            values["objective"] = {"name": values["objective"]}
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            problems += sentences(error, cls)
        problems += problems_between(config, values)
        if problems or config is None:
            raise ConfigError(problems)
        return config

    def replace(self, key: str, value: Any) -> Config:
        """Return a copy with one dotted key set, checked again."""
        values = self.to_dict()
        set_key(values, key, value)
        return Config.parse(values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that ``parse`` accepts again."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """Return the config as YAML that reproduces it."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def resolved(self) -> Config:
        """Return a copy whose local paths are absolute, so that it works from any folder."""
        values = self.to_dict()
        values["output"]["dir"] = str(Path(self.output.dir).absolute())
        for key in ("base", "adapter"):
            values["model"][key] = _absolute(values["model"][key])
        for source in (values["data"]["train"] or []) + (values["data"]["eval"] or []):
            source["path"] = _absolute(source["path"])
        for key in ("chat_template", "cache_dir"):
            values["data"][key] = _absolute(values["data"][key])
        if (store := self.train.reference_cache_dir) is not None:  # made by the first run
            values["train"]["reference_cache_dir"] = str(Path(store).absolute())
        return Config.parse(values)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path
