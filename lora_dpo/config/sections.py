"""The sections of a config, field by field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Inits that rewrite the base weights: "adapters off" would no longer be the model that was loaded.
BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")


class Section(BaseModel):
    """A part of the config; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OpenSection(Section):
    """A section whose further keys are checked by the part of the package that owns them."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

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

    on_nonfinite: Literal["stop", "skip"] = "stop"
    chunk_tokens: int = Field(256, ge=1, le=2**31)
    engine: Literal["auto", "fast", "plain"] = "auto"
    max_tokens_per_batch: int | None = Field(None, ge=1)
    memory_budget_gib: float | None = Field(None, gt=0, le=2**20)
    activation_offloading: bool = True
    reference_update: Literal["none", "hard", "soft", "factors"] = "none"
    reference_update_steps: int = Field(512, ge=1)
    reference_update_weight: float = Field(0.6, gt=0, le=1)
    cache_reference: bool = False
    reference_cache_dir: str | None = None
    shard_base: bool = False


class OutputConfig(Section):
    """Where the run is written, and what is looked at beside the training."""

    dir: str
    diagnose: bool = True
    samples: int = Field(4, ge=0)
    sample_tokens: int = Field(64, ge=1)
