"""Handing the policy on: its adapter alone, or merged into plain weights, with a proof.

The merge adds the adapter in float32 to the dequantised weights that the policy was trained on and
writes shards tensor by tensor. The folder is then loaded by plain transformers and compared with
the policy; one that is not the policy is not kept.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig

from lora_dpo.errors import ExportError, OutputError
from lora_dpo.heads import causal_lm
from lora_dpo.policy import Merged, merged_tensors, save_adapter
from lora_dpo.proving import (
    Proof,
    behaviour,
    completion_logits,
    float32_compute,
    is_8bit,
    mean_kl,
    prove,
)
from lora_dpo.store import new_folder, write_json, write_text

SHARD_BYTES = 2 * 2**30
_NOT_A_SETTING = ("quantization_config",)


def export_adapter(
    policy: nn.Module, tokenizer: Any, to: Path, *, card: str = "", overwrite: bool = False
) -> Path:
    """Write the adapter alone, as peft loads it, with tokenizer and card.

    Raises:
        OutputError: the folder exists and is not empty.
    """
    with new_folder(to, overwrite=overwrite) as work:
        save_adapter(policy, work)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, work)
        write_text(work / "README.md", card)
    return to


def export_merged(
    release: Callable[[], nn.Module],
    tokenizer: Any,
    to: Path,
    *,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    base: Literal["trained", "original"] = "trained",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    card: Callable[[Proof], str] = str,
    overwrite: bool = False,
) -> Proof:
    """Write the merged model and prove it.

    Args:
        release: hands the policy over; no reference to it may be kept, so that its memory is free
            before the merged model is loaded.
        sequences: held-out ``(prompt ids, completion ids)`` on which both are compared.
        base: ``trained`` merges into the weights the policy was trained on, dequantised, and is
            gated; ``original`` into those of the checkpoint, and is reported. So is an 8-bit
            policy, which rounds its activations too.
        dtype: of the files; that of the checkpoint if left out.
        revision: of the base on the hub.
        card: makes the model card from the proof.

    Raises:
        OutputError: the folder exists, or the disk is too small.
        ExportError: an adapter weight that was not merged, or a model that is not the policy.
    """
    if not sequences:
        raise ExportError("export: no held-out rows to prove the merged model on; give some.")
    policy = release()
    causal = causal_lm(policy)
    source = str(causal.config._name_or_path)
    if getattr(causal.config, "auto_map", None):
        raise ExportError(
            f"{source}: a model with code of its own; plain transformers could not load a merge of it. "
            "Export the adapter alone."
        )
    config = AutoConfig.from_pretrained(source, revision=revision)
    dtype = dtype or _stored_dtype(config)
    original = _checkpoint_lookup(source, revision, config) if base == "original" else None
    with new_folder(to, overwrite=overwrite) as work:
        _check_disk(causal, dtype, work)
        _write_weights(merged_tensors(policy, original), dtype, work)
        _write_settings(causal, config, tokenizer, dtype, work)
        gated = base == "trained" and not is_8bit(policy)
        with float32_compute(policy):
            before = behaviour(policy, sequences)
            noise = mean_kl(before.logits, completion_logits(policy, sequences, batched=True))
        del policy, causal
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        proof = prove(work, sequences, before, noise, gated=gated)
        write_json(work / "export_proof.json", {**asdict(proof), "base": base, "dtype": str(dtype)})
        write_text(work / "README.md", card(proof))
    return proof


def _write_weights(tensors: Iterator[Merged], dtype: torch.dtype, folder: Path) -> None:
    shard: dict[str, Tensor] = {}
    size, total = 0, 0
    names: list[Path] = []
    weight_map: dict[str, int] = {}
    for tensor in tqdm(tensors, desc="merging", unit=" tensors", disable=None):
        value = tensor.value.to(dtype) if tensor.value.is_floating_point() else tensor.value
        value = value.cpu().contiguous()
        if shard and size + value.nbytes > SHARD_BYTES:
            names.append(_flush(shard, folder, len(names)))
            size = 0
        shard[tensor.name] = value
        weight_map[tensor.name] = len(names)
        size, total = size + value.nbytes, total + value.nbytes
    names.append(_flush(shard, folder, len(names)))
    _name_shards(folder, names, weight_map, total)


def _flush(shard: dict[str, Tensor], folder: Path, number: int) -> Path:
    path = folder / f"shard-{number}.safetensors"
    save_file(
        {k: v.clone() if v.is_shared() else v for k, v in shard.items()}, path, {"format": "pt"}
    )
    shard.clear()
    return path


def _name_shards(folder: Path, paths: list[Path], weight_map: dict[str, int], total: int) -> None:
    if len(paths) == 1:
        paths[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
    index = {key: names[number] for key, number in weight_map.items()}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )


def _write_settings(
    causal: Any, config: Any, tokenizer: Any, dtype: torch.dtype, folder: Path
) -> None:
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_A_SETTING}
    plain = type(config).from_dict(values)
    plain.dtype = dtype
    plain.architectures = [type(causal).__name__]
    plain.save_pretrained(folder)
    generation = GenerationConfig.from_dict(causal.generation_config.to_dict())
    if not generation.do_sample and any(
        getattr(generation, key, None) is not None for key in ("temperature", "top_p", "top_k")
    ):
        generation.do_sample = True  # the sampling settings mean something only then
    generation.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer with its chat template in both places that programs look for it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if tokenizer.chat_template and path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**values, "chat_template": tokenizer.chat_template})


def _checkpoint_lookup(source: str, revision: str | None, config: Any) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of the original checkpoint by its name."""
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{source}: the checkpoint itself is quantised; use base='trained'.")
    from transformers.utils.hub import cached_file

    index = cached_file(
        source,
        "model.safetensors.index.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    names = json.loads(Path(index).read_text())["weight_map"] if index else None

    def look_up(name: str) -> Tensor:
        shard = names.get(name, "model.safetensors") if names else "model.safetensors"
        file = cached_file(source, shard, revision=revision)
        with safe_open(file, framework="pt") as stream:
            if name not in stream.keys():  # noqa: SIM118 (not a dict)
                raise ExportError(
                    f"{source}: the checkpoint has no tensor {name!r}; use base='trained'."
                )
            value: Tensor = stream.get_tensor(name)
            return value

    return look_up


def _check_disk(causal: Any, dtype: torch.dtype, folder: Path) -> None:
    width = torch.empty(0, dtype=dtype).element_size()
    needed = int(causal.num_parameters() * width * 1.02)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent}: the merged model needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free. Make room, or export to another disk."
        )


def _stored_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
