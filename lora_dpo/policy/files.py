"""What the files of a model and of an adapter may be: numbers in safetensors, in their own folder.

They come from other people. A pickle is a program, an index may name files elsewhere, and settings
may name code; none of it is opened.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dpo.config import ModelConfig
from lora_dpo.errors import ModelError

logger = logging.getLogger("lora_dpo")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    "Pickles are programs, and are not opened. Where you trust it, make safetensors of it yourself, in "
    "Python: {how}"
)


def check_base_files(where: str, base: str) -> None:
    """Refuse a folder whose weights are no safetensors of its own; a hub id is left to the hub's client.

    Args:
        where: what the error begins with.
        base: a folder or a hub id.

    Raises:
        ModelError: pickles alone, or an index that names a file elsewhere or of another kind.
    """
    folder = Path(base)
    if not folder.is_dir() or (folder / WEIGHTS).is_file():
        return
    if (folder / INDEX).is_file():
        _check_index(where, folder / INDEX)
        return
    if pickles := _pickles(folder):
        how = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        raise ModelError(
            f"{where}: its weights are pickles ({', '.join(pickles)}), and safetensors are expected. "
            + _CONVERT.format(how=how)
        )


def check_config_files(where: str, config: Any, attention: str = "auto") -> None:
    """Refuse what a model's config makes transformers fetch or open without being asked.

    Args:
        where: what the error begins with.
        config: of the model.
        attention: what the user asked for, which goes before what the config says.

    Raises:
        ModelError: kernels of the hub, or weights in a file of another kind.
    """
    asked = getattr(config, "_attn_implementation", None)
    if attention == "auto" and "/" in str(asked):
        raise ModelError(
            f"{where}: its config.json asks for {asked!r}, which is code on the hub. Give "
            "model.attention: sdpa, or that name if you want it."
        )
    named = getattr(config, "transformers_weights", None)
    if named is not None and named != WEIGHTS:
        raise ModelError(
            f"{where}: its config.json names {named!r} as its weights; {WEIGHTS} or {INDEX} is expected."
        )


def check_adapter_files(folder: Path) -> None:
    """Refuse an adapter without safetensors, before peft looks for other files or on the hub.

    Raises:
        ModelError: there is a pickle, or nothing.
    """
    if (folder / ADAPTER_WEIGHTS).is_file():
        return
    found = (
        f"its weights are pickles ({', '.join(pickles)})" if (pickles := _pickles(folder)) else ""
    )
    how = "PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)"
    raise ModelError(
        f"{folder}: {found or 'no weights there'}; {ADAPTER_WEIGHTS} is expected. "
        + (_CONVERT.format(how=how) if found else "Give the folder that peft or lora-dpo wrote.")
    )


def check_adapter_settings(path: Path, stored: Mapping[str, Any]) -> None:
    """Refuse settings of a saved adapter that make peft import what they name.

    Raises:
        ModelError: another method than LoRA, or Megatron's layers.
    """
    kind = stored.get("peft_type") if isinstance(stored, Mapping) else None
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type is {kind!r}; only LoRA and its variants are trained.")
    if stored.get("megatron_config"):
        raise ModelError(
            f"{path}: megatron_config names a Python module to import; adapters of Megatron's layers are "
            "not supported."
        )


def tell_of_code(settings: ModelConfig) -> None:
    """Name in the log whose code is about to run, where the config asks for that."""
    if not settings.trust_remote_code:
        return
    pinned = f"revision {settings.revision}" if settings.revision else "no revision named"
    logger.warning(
        "model.trust_remote_code: Python code of %s runs in this process (%s)",
        settings.base,
        "this folder's" if Path(settings.base).is_dir() else pinned,
    )


@contextmanager
def as_published() -> Iterator[None]:
    """Keep transformers from having a model on the hub converted by a service, and taking that."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_index(where: str, path: Path) -> None:
    try:
        named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{where}: {path.name} cannot be read ({error!r}).") from None
    for name in named:
        if not (
            isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        ):
            raise ModelError(
                f"{where}: {path.name} names {name!r}; files of the same folder that end in "
                ".safetensors are expected."
            )


def _pickles(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES and p.is_file())[:3]
