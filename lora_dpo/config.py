"""The one description of a run: YAML, Python objects and ``--set`` overrides, all checked alike.

Every problem of a config is found at once and before any weights load. Nothing is ignored: an
unknown key is an error that names the nearest legal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lora_dpo.errors import ConfigError, nearest

# Inits that rewrite the base weights: "adapters off" would no longer be the model that was loaded.
BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")


class Section(BaseModel):
    """A part of the config; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenSection(Section):
    """A section whose further keys are checked by the part of the package that owns them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def further(self) -> dict[str, Any]:
        """The keys that are not fields of this class."""
        return dict(self.model_extra or {})


class ObjectiveConfig(OpenSection):
    """Which objective, and its own hyperparameters beside the name."""

    name: str = "dpo"

    def to_dict(self) -> dict[str, Any]:
        """Return what ``objectives.build`` takes."""
        return {"name": self.name, **self.further}


class ModelConfig(Section):
    """The base model and how it is held."""

    base: str
    revision: str | None = None
    quantisation: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quantisation: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: str = "auto"
    adapter: str | None = None
    trust_remote_code: bool = False
    embeddings_on_cpu: bool = False


class LoraConfig(Section):
    """The adapters: what is trained."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    exclude: list[str] = []
    modules_to_save: list[str] = []
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian"] = "default"

    @field_validator("init", mode="before")
    @classmethod
    def _refuse_base_changing(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower().startswith(BASE_CHANGING_INITS):
            raise ValueError(
                f"{value!r} rewrites the base weights, so the base with adapters disabled would not "
                "be the model that you loaded, and the reference would be wrong; use 'default' or "
                "'gaussian'"
            )
        return value


class SourceConfig(Section):
    """One source of preferences: a file, a folder or a hub id."""

    path: str
    weight: float = Field(1.0, gt=0)
    split: str | None = None


class DataConfig(Section):
    """The preferences, and how they become tokens."""

    train: list[SourceConfig]
    eval: list[SourceConfig] | None = None
    eval_fraction: float = Field(0.05, ge=0, lt=1)
    eval_max_rows: int | None = Field(500, ge=1)
    columns: dict[str, str] = {}
    transcripts: Literal["text", "messages"] = "text"
    chat_template: str | None = None
    template_arguments: dict[str, Any] = {}
    add_bos: Literal["auto", "always", "never"] = "auto"
    max_length: int = Field(1024, ge=2)
    overflow: Literal["drop", "truncate-prompt", "truncate-completion", "error"] = "drop"
    identical: Literal["drop", "error"] = "drop"
    empty: Literal["error", "drop"] = "error"
    duplicates: Literal["drop", "keep", "error"] = "drop"
    min_margin: float | None = Field(None, ge=0)
    ranking_pairs: Literal["best-worst", "adjacent", "best-rest", "all"] = "best-worst"
    seed: int = 0
    cache_dir: str | None = None

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _accept_short_forms(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        if value is None or not entries:
            return value
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


class TrainConfig(OpenSection):
    """Any field of ``transformers.TrainingArguments``, and these of ours."""

    chunk_tokens: int = Field(256, ge=1)
    engine: Literal["auto", "fast", "plain"] = "auto"
    max_tokens_per_batch: int | None = Field(None, ge=1)
    memory_budget_gib: float | None = Field(None, gt=0)
    reference_update: Literal["none", "hard", "soft", "factors"] = "none"
    reference_update_steps: int = Field(512, ge=1)
    reference_update_weight: float = Field(0.6, gt=0, le=1)
    cache_reference: bool = False
    reference_cache_dir: str | None = None


class OutputConfig(Section):
    """Where the run is written."""

    dir: str
    diagnose: bool = True


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
        problems: list[str] = []
        config = None
        # an empty section of a YAML is None, and means its defaults
        values = {key: {} if value is None else value for key, value in values.items()}
        if isinstance(values.get("objective"), str):
            values["objective"] = {"name": values["objective"]}
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            problems += _sentences(error)
        problems += _objective_problems(values.get("objective", {}))
        problems += _moving_problems(config)
        problems += _cache_problems(config)
        problems += _train_problems(values.get("train", {}))
        defaults = LoraConfig()  # type: ignore[call-arg]
        if config is not None and config.model.adapter and config.lora != defaults:
            problems.append(
                "lora: an adapter that is started from (model.adapter) brings its own rank, alpha and "
                "targets; leave this section out."
            )
        if problems or config is None:
            raise ConfigError(problems)
        return config

    def replace(self, key: str, value: Any) -> Config:
        """Return a copy with one dotted key set, checked again."""
        values = self.to_dict()
        _set_key(values, key, value)
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; broken syntax and repeated keys are ``ConfigError`` with the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); a YAML file is expected.") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a mapping of sections is expected, got {type(values).__name__}."
        )
    return values


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML's last-one-wins would ignore the first."""


def _strict_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a word, not a list or a mapping", key_node.start_mark
            )
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set ``key=value`` texts in a nested mapping, in place, and return it."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"--set {text}: expected key=value, as in objective.beta=0.05.")
            continue
        try:
            _set_key(values, key.strip(), yaml.load(value, Loader=_StrictLoader))
        except (ConfigError, yaml.YAMLError, ValueError) as error:
            problems.append(f"--set {text}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError(problems)
    return values


def data_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the section ``data`` that ``data.key=value`` texts give.

    Raises:
        ConfigError: a text that is none, or that names another section or the files themselves.
    """
    values = override({}, overrides)
    settings: dict[str, Any] = values.pop("data", {})
    wrong = [*values, *(f"data.{name}" for name in ("train", "eval") if name in settings)]
    if wrong:
        raise ConfigError(
            f"--set {wrong[0]}: expected a setting of the section data that says how the files are "
            "read, such as data.overflow=truncate-prompt; the files themselves are arguments."
        )
    return settings


def _set_key(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = values
    for name in parents:
        if here.setdefault(name, {}) is None:
            here[name] = {}
        if here is values and name == "objective" and isinstance(here[name], str):
            here[name] = {"name": here[name]}  # the short form
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"{name!r} holds {here!r}, which has no keys below it.")
    here[last] = value


_REQUIRED = {"model": "model.base", "data": "data.train", "output": "output.dir"}


def _sentences(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        place = [str(part) for part in problem["loc"] if not str(part).startswith("list[")]
        if problem["loc"][-1] == "str" and len(place) > 1:
            place.pop()  # pydantic's name for one arm of a union
        where, given = ".".join(place), problem["input"]
        if problem["type"] == "extra_forbidden":
            legal = _legal_keys(place[:-1])
            yield f"{where}: unknown key; expected one of {', '.join(legal)}.{nearest(place[-1], legal)}"
        elif problem["type"] == "missing":
            where = _REQUIRED.get(where, where)
            yield f"{where}: missing; it is required. Add it to the YAML, or give --set {where}=..."
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{where}: got {given!r}; {message[0].lower()}{message[1:]}."


def _legal_keys(path: Sequence[str]) -> list[str]:
    model: Any = Config
    for name in path:
        if name.isdigit():
            continue
        annotation = model.model_fields[name].annotation
        nested = [a for a in (annotation, *_arguments(annotation)) if _is_section(a)]
        model = nested[0] if nested else model
    return list(model.model_fields)


def _arguments(annotation: Any) -> Iterator[Any]:
    for argument in getattr(annotation, "__args__", ()):
        yield argument
        yield from _arguments(argument)


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Section)


def _objective_problems(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []  # pydantic has said so
    from lora_dpo import objectives

    wrong = [key for key in values if not isinstance(key, str)]
    if wrong:
        return [f"objective: the key {wrong[0]!r} is no text; expected the name of a setting."]
    try:
        objectives.build(values)
    except ConfigError as error:
        return error.problems
    return []


def _moving_problems(config: Config | None) -> list[str]:
    """Settings of a moving reference where none moves, or where there is none."""
    if config is None:
        return []
    train, defaults = config.train, TrainConfig()  # type: ignore[call-arg]
    given = [
        name
        for name in ("reference_update_steps", "reference_update_weight")
        if getattr(train, name) != getattr(defaults, name)
    ]
    if train.reference_update == "none":
        return [f"train.{name}: set, but train.reference_update is none." for name in given]
    if train.reference_update == "hard" and "reference_update_weight" in given:
        return ["train.reference_update_weight: a hard update has no weight; leave it out."]
    return []


def _cache_problems(config: Config | None) -> list[str]:
    """Settings of stored reference log-probs where none are kept, or where none would be right."""
    if config is None:
        return []
    train = config.train
    if not train.cache_reference:
        given = train.reference_cache_dir is not None
        return ["train.reference_cache_dir: set, but train.cache_reference is false."] * given
    from lora_dpo import objectives

    problems = []
    if train.reference_update != "none":
        problems.append(
            f"train.cache_reference: true, but the reference moves (train.reference_update is "
            f"{train.reference_update}); leave one of the two out."
        )
    try:
        reason = objectives.build(config.objective.to_dict()).needs_running_reference
    except ConfigError:
        reason = ""  # said where the objective is looked at
    return problems + [f"train.cache_reference: true, but {reason}"] * bool(reason)


def _train_problems(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []
    from lora_dpo.arguments import argument_problems

    ours = set(TrainConfig.model_fields)
    return argument_problems({key: value for key, value in values.items() if key not in ours}, ours)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path
