"""Handing the policy on: its adapter alone, or merged into plain weights, with a proof.

The merge adds the adapter in float32 to the dequantised weights that the policy was trained on and
writes shards tensor by tensor. The folder is then loaded by plain transformers and compared with
the policy; one that is not the policy is not kept.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from lora_dpo.ends import stop_tokens
from lora_dpo.errors import ExportError, OutputError
from lora_dpo.float32 import float32_compute
from lora_dpo.heads import causal_lm
from lora_dpo.policy import Folded, Merged, merged_tensors, save_portable_adapter
from lora_dpo.proving import (
    Behaviour,
    Proof,
    behaviour,
    completion_logits,
    is_8bit,
    mean_kl,
    prove,
)
from lora_dpo.sealing import seal
from lora_dpo.smoking import EXACT, ROUGH, SMOKE_FILE, smoke_record
from lora_dpo.store import new_folder, write_json, write_text

SHARD_BYTES = 2 * 2**30
_NOT_A_SETTING = ("quantization_config",)


def export_adapter(
    policy: nn.Module,
    tokenizer: Any,
    to: Path,
    *,
    card: str | Callable[[Folded], str] = "",
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    base_id: str | None = None,
    revision: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    chat: bool | None = None,
    beside: Callable[[Path, Folded], None] | None = None,
) -> Folded:
    """Write the adapter alone, so that every consumer scales it alike, with tokenizer and card.

    Args:
        policy: its active adapter is written; rsLoRA and patterns of ranks and alphas are folded
            into the tensors, and the result is held against the policy.
        tokenizer: written beside it; None writes none, and no smoke test.
        to: the new folder.
        card: the model card, or a function that makes it.
        overwrite: replace an existing folder, once the new one is whole.
        dtype: of the two factors of each layer.
        base_id: hub id of the base; None names none, so that no folder of this machine does.
        revision: of the base on the hub.
        template_arguments: variables for the chat template, as training had them.
        chat: whether prompts are chats; where the tokenizer has a template if left out.
        beside: writes further files into the folder.

    Raises:
        OutputError: the folder exists and is not empty.
        ExportError: an adapter weight that no layer took, or a change that is not the policy's.
    """
    with new_folder(to, overwrite=overwrite) as work:
        folded = save_portable_adapter(
            policy, work, dtype=dtype, base_id=base_id, revision=revision
        )
        if tokenizer is not None:
            _save_tokenizer(tokenizer, work)
            stops = stop_tokens(causal_lm(policy).generation_config, tokenizer, template_arguments)
            record = _smoke(policy, tokenizer, stops, chat, template_arguments, ROUGH)
            write_json(work / SMOKE_FILE, record)
        write_text(work / "README.md", card if isinstance(card, str) else card(folded))
        if beside is not None:
            beside(work, folded)
        seal(work, "exported adapter")
    return folded


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
    template_arguments: Mapping[str, Any] | None = None,
    chat: bool | None = None,
    beside: Callable[[Path, Proof], None] | None = None,
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
        template_arguments: variables for the chat template, as training had them.
        chat: whether prompts are chats; where the tokenizer has a template if left out.
        beside: writes further files into the folder, and may refuse it.

    Raises:
        OutputError: the folder exists, or the disk is too small.
        ExportError: an adapter weight that was not merged, or a model that is not the policy.
    """
    if not sequences:
        raise ExportError("export: no held-out rows to prove the merged model on; give some.")
    policy = release()
    causal = causal_lm(policy)
    source = str(causal.config._name_or_path)
    check_source(source, revision, base)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    dtype = dtype or _stored_dtype(config)
    original = _checkpoint_lookup(source, revision) if base == "original" else None
    with new_folder(to, overwrite=overwrite) as work:
        _check_disk(causal, dtype, work)
        _write_weights(merged_tensors(policy, original), dtype, work)
        stops = stop_tokens(causal.generation_config, tokenizer, template_arguments)
        _write_settings(causal, config, tokenizer, dtype, stops, work)
        _check_tokenizer(tokenizer, work, template_arguments)
        gated = base == "trained" and not is_8bit(policy)
        before, noise = _behaviour_and_noise(policy, sequences)
        record = _smoke(
            policy, tokenizer, stops, chat, template_arguments, EXACT if gated else ROUGH
        )
        del policy, causal
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        proof = prove(work, sequences, before, noise, gated=gated)
        facts = {"base": base, "dtype": str(dtype), "stop_ids": stops}
        write_json(work / "export_proof.json", {**proof.to_dict(), **facts})
        write_json(work / SMOKE_FILE, record)
        write_text(work / "README.md", card(proof))
        if beside is not None:
            beside(work, proof)
        seal(work, "merged model")
    return proof


def _write_weights(tensors: Iterator[Merged], dtype: torch.dtype, folder: Path) -> None:
    shard: dict[str, Tensor] = {}
    size, total = 0, 0
    names: list[Path] = []
    weight_map: dict[str, int] = {}
    for tensor in tqdm(tensors, desc="merging", unit=" tensors", disable=None):
        value = tensor.value.to(dtype) if tensor.value.is_floating_point() else tensor.value
        if tensor.adapted and not torch.isfinite(value).all():
            raise ExportError(
                f"{tensor.name}: the merged weight is too large for {dtype}; nothing was kept. Choose "
                "--dtype bfloat16 or float32."
            )
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
    causal: Any, config: Any, tokenizer: Any, dtype: torch.dtype, stops: list[int], folder: Path
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
    generation.eos_token_id = stops if len(stops) > 1 else stops[0] if stops else None
    generation.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer with its chat template in both places that programs look for it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if tokenizer.chat_template and path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**values, "chat_template": tokenizer.chat_template})


def _check_tokenizer(
    tokenizer: Any, folder: Path, template_arguments: Mapping[str, Any] | None
) -> None:
    """Hold token ids of texts and of rendered chats against those of the tokenizer that is exported."""
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    turns = [
        ("user", "How are you?"),
        ("assistant", " Fine.\n\n1 + 1 = 2"),
        ("user", "Grüße, 你好 "),
    ]
    chat = [{"role": role, "content": content} for role, content in turns]
    for count in (1, 2, 3):
        text = chat[count - 1]["content"]
        same = again(text)["input_ids"] == tokenizer(text)["input_ids"]
        if same and tokenizer.chat_template:
            mine, theirs = (
                _rendered(one, chat[:count], template_arguments) for one in (tokenizer, again)
            )
            same = mine == theirs
        if not same:
            raise ExportError(
                f"the exported tokenizer reads {text!r} as other tokens than the one that was trained "
                "with; nothing was kept. Please report this with the name of the base model."
            )


def _rendered(tokenizer: Any, chat: list[dict[str, str]], arguments: Any) -> Any:
    """Return text and token ids of a chat; a template that refuses it says the same words twice."""
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **(arguments or {})
        )
    except Exception as error:  # a template is a program that came with the model
        return str(error)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def check_source(source: str, revision: str | None, base: str) -> None:
    """Refuse a base that could not be merged into, by what its config says.

    Args:
        source: the base, a folder or a hub id.
        revision: of it on the hub.
        base: ``trained`` or ``original``.

    Raises:
        ExportError: a model with code of its own, or quantised weights where the original are asked for.
    """
    settings, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    if settings.get("auto_map"):
        raise ExportError(
            f"{source}: a model with code of its own; plain transformers could not load a merge of it. "
            "Export the adapter alone."
        )
    if base == "original" and settings.get("quantization_config"):
        raise ExportError(f"{source}: the checkpoint itself is quantised; use base='trained'.")


def _behaviour_and_noise(policy: nn.Module, sequences: Sequence[Any]) -> tuple[Behaviour, float]:
    with float32_compute(policy):
        before = behaviour(policy, sequences)
        return before, mean_kl(before.logits, completion_logits(policy, sequences, batched=True))


def _smoke(
    policy: nn.Module,
    tokenizer: Any,
    stops: list[int],
    chat: bool | None,
    template_arguments: Mapping[str, Any] | None,
    tolerance: float,
) -> dict[str, Any]:
    was_training = policy.training
    policy.eval()
    try:
        with float32_compute(policy):
            return smoke_record(
                policy,
                tokenizer,
                stops,
                chat=bool(tokenizer.chat_template) if chat is None else chat,
                tolerance=tolerance,
                template_arguments=template_arguments,
            )
    finally:
        policy.train(was_training)


def _checkpoint_lookup(source: str, revision: str | None) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of the original checkpoint by its name."""
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
