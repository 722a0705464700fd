"""Configs: YAML texts, mappings and ``--set`` texts, with keys and values that should not be there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from lora_dpo.arguments import argument_fields, build_arguments
from lora_dpo.config import Config
from lora_dpo.config.foreign import foreign_options
from lora_dpo.config.sections import DataConfig, LoraConfig, ModelConfig, OutputConfig, TrainConfig
from lora_dpo.errors import LoraDpoError
from lora_dpo.guards import checkpoint_facts
from tests.campaign.judging import READ, hold, refusal
from tests.campaign.texts import texts, values

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "model": ModelConfig, "lora": LoraConfig, "data": DataConfig, "train": TrainConfig,
    "output": OutputConfig,
}  # fmt: skip
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
KEYS += [f"train.{key}" for key in sorted(argument_fields())]
KEYS += [
    "objective",
    "objective.name",
    "objective.beta",
    "objective.label_smoothing",
    "objective.terms",
]
FOREIGN = sorted({option.option for option in foreign_options()})


@dataclass(frozen=True)
class Settings:
    """A config: a YAML text or a mapping, and what ``--set`` was given."""

    text: bytes | None
    mapping: Mapping[Any, Any] | None
    overrides: tuple[str, ...] = ()


def least() -> dict[str, Any]:
    """Return a config that is right and names nothing that is there."""
    return {
        "model": {"base": "nowhere"},
        "data": {"train": "prefs.jsonl"},
        "output": {"dir": "runs/x"},
    }


_key = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from([key for key in KEYS if not key.startswith("train.")]),
    st.sampled_from(FOREIGN).map(lambda name: f"train.{name}"),
    st.builds(lambda a, b: f"{a}.{b}", st.sampled_from(sorted(SECTIONS)), texts),
    texts,
)
_likely = st.sampled_from(
    [0, 1, -1, 2, 0.5, 1e-5, 1e30, "auto", "no", "steps", "epoch", "none", "true", "drop", "dpo", "kto",
     "mixture", [], {}, [1], ["a"], {"a": 1}, True, False, None, "1e-4", "adamw_8bit", "cosine", 2**40,
     {1: 2}, [{"name": "dpo", "weight": 1}], "prefs.jsonl", [{"path": "a", "weight": 0}], "~", "/"]
)  # fmt: skip
_value = st.one_of(_likely, _likely, values)


def _put(config: dict[Any, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = config
    for name in parents:
        if not isinstance(here.get(name), dict):
            here[name] = {}
        here = here[name]
    here[last] = value


@st.composite
def _mappings(draw: Any) -> dict[Any, Any]:
    config: dict[Any, Any] = least()
    for _ in range(draw(st.integers(0, 3))):
        _put(config, draw(_key), draw(_value))
    if draw(st.integers(0, 19)) == 0:
        config[draw(st.sampled_from([1, True, None, 1.5]))] = draw(_value)
    if draw(st.integers(0, 19)) == 0:
        config.pop(draw(st.sampled_from(["model", "data", "output"])))
    return config


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
MERGES = "\n".join(
    ["b0: &b0 {x: 1}"] + [f"b{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}]}}" for i in range(1, 40)]
)
TEXTS = (
    BOMB, MERGES, "a: &a [*a]", "a: &a {b: *a}", "\tmodel: x", "model: {base: x}\n\tdata: y", "[1, 2]",
    "model", "", "---\n---\n", "a: 1\na: 2", "? [1, 2]\n: 3", "? {a: 1}\n: 3", "a: !!python/object:os.system x",
    "a: !!binary abc", "a: !!set {x}", "a: 2020-01-01", "a: .nan", "a: 0x" + "f" * 5000, "a: " + "9" * 5000,
    "[" * 3000, "{a: " * 3000, "a: *b", "a: \"\\ud800\"", "a: \"\\0\"", "model: {base: &b x}\noutput: {dir: *b}",
    "<<: {model: {base: x}}", "a: 'unclosed", "%YAML 9.9\n---\na: 1", "m\u043edel: {base: x}", "a: |\n  text",
    "1: 2", "yes: no", "~: 3", "model: ~\ndata: ~", "- a\n- b", "a: b: c", "\ufeffmodel: {base: x}",
    "data: {template_arguments: {1: 2, a: 3}}", "data: {template_arguments: {d: 2020-01-01}}",
)  # fmt: skip


# What is legal, so that many are read and held to be read whole.
LEGAL: dict[str, st.SearchStrategy[Any]] = {
    "lora.rank": st.integers(1, 4096), "lora.alpha": st.floats(1e-3, 1e3), "lora.dropout": st.floats(0, 0.9),
    "lora.rslora": st.booleans(), "lora.targets": st.lists(st.sampled_from(["q_proj", "v_proj"]), min_size=1),
    "data.max_length": st.integers(2, 10**6), "data.eval_fraction": st.floats(0, 0.9),
    "data.seed": st.integers(-(2**40), 2**40), "data.overflow": st.sampled_from(["drop", "error"]),
    "data.columns": st.dictionaries(st.sampled_from(["prompt", "chosen"]), texts.filter(str.isprintable)),
    "train.learning_rate": st.floats(1e-9, 1.0), "train.max_steps": st.integers(1, 10**6),
    "train.weight_decay": st.floats(0, 1), "train.on_nonfinite": st.sampled_from(["stop", "skip"]),
    "train.lr_scheduler_type": st.sampled_from(["linear", "cosine"]), "train.seed": st.integers(0, 2**32 - 1),
    "train.per_device_train_batch_size": st.integers(1, 512), "train.warmup_steps": st.integers(0, 99),
    "objective.beta": st.floats(1e-3, 10), "model.quantisation": st.sampled_from(["nf4", "none", "int8"]),
    "output.samples": st.integers(0, 9),
    "model.base": texts.filter(lambda t: t.isprintable() and bool(t.strip()) and len(t) < 60),
}  # fmt: skip


@st.composite
def _legal(draw: Any) -> dict[Any, Any]:
    config: dict[Any, Any] = least()
    for key in draw(st.lists(st.sampled_from(sorted(LEGAL)), min_size=1, max_size=6, unique=True)):
        _put(config, key, draw(LEGAL[key]))
    return config


@st.composite
def configs(draw: Any) -> Settings:
    """Draw a config."""
    overrides = tuple(
        draw(
            st.lists(
                st.one_of(
                    st.builds(lambda k, v: f"{k}={v!r}", _key, _value),
                    st.builds(lambda k, v: f"{k}={v}", _key, texts),
                    texts,
                    st.sampled_from(TEXTS),
                ),
                max_size=2,
            )
        )
    )
    forms = ["legal", "legal", "mapping", "yaml", "yaml", "text", "shipped"]
    form = draw(st.sampled_from(forms))
    if form == "legal":
        legal = draw(_legal())
        if draw(st.booleans()):
            return Settings(None, legal)
        made = yaml.safe_dump(legal, allow_unicode=draw(st.booleans()))
        return Settings(made.encode(), None)
    if form == "mapping":
        return Settings(None, draw(_mappings()), ())
    if form == "yaml":
        made = yaml.dump(draw(_mappings()), allow_unicode=draw(st.booleans()))
        return Settings(made.encode("utf-8", "surrogatepass"), None, overrides)
    if form == "text":
        parts = draw(st.lists(st.one_of(st.sampled_from(TEXTS), texts), min_size=1, max_size=2))
        return Settings("\n".join(parts).encode("utf-8", "surrogatepass"), None, overrides)
    path = draw(st.sampled_from(sorted((ROOT / "configs").glob("*.yaml"))))
    content, place = path.read_bytes(), draw(st.integers(0, 4000))
    broken = draw(
        st.sampled_from([b"\t", b":", b"\xff", b"\x00", b"&", b"*x ", b"\n", b"- ", b"'"])
    )
    return Settings(content[:place] + broken + content[place:], None, overrides)


def judge(case: Settings, folder: Path) -> str:
    """Read a config; hold that it is read whole or refused by key."""
    environment = dict(os.environ)
    try:
        if case.mapping is not None:
            config = Config.parse(case.mapping)
        else:
            path = folder / "prefs.yaml"
            path.write_bytes(case.text or b"")
            config = Config.load(path, case.overrides)
        check_whole(case, config)
        build_arguments(config.train.further, output_dir=str(folder / "run"), evaluates=True)
    except LoraDpoError as error:
        return refusal(error, (": ",))  # a place, and what is wrong there
    finally:
        for made in folder.iterdir():
            hold(made.name == "prefs.yaml", f"{made.name} was left")
        os.environ.clear()
        os.environ.update(environment)  # some of the library's settings are written there
    return READ


def check_whole(case: Settings, config: Config) -> None:
    """A config reads back as it was written, from YAML too, and nothing given is missing from it."""
    again = Config.parse(config.to_dict())
    hold(again == config, "to_dict does not read back")
    hold(Config.parse(yaml.safe_load(config.to_yaml())) == config, "to_yaml does not read back")
    checkpoint_facts(config.resolved())
    if case.mapping is None:
        return
    whole = config.to_dict()
    for name, section in case.mapping.items():
        if isinstance(section, Mapping):
            missing = [key for key in section if key not in whole[name]]
            hold(not missing, f"{name}: {missing} was ignored")
