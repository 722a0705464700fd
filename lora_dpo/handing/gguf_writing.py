"""GGUF through the ``gguf`` package, for the architectures and tokenizers named here and no others.

What differs between model files and GGUF for these: names (the package has the table), the order of
rows of two projections in Llama's family, and the tokenizer's way of cutting text. Everything else
is refused, with llama.cpp's own converter as the way out.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lora_dpo.ends import end_of_turn
from lora_dpo.errors import ConfigError, ExportError

PACKAGE_KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
# model type -> architecture in GGUF, and whether rows of q_proj and k_proj are interleaved there
ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
# the pattern that cuts text before byte-pair encoding -> its name in GGUF, and `ignore_merges`
_DIGITS_1_TO_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: Mapping[str, tuple[str, bool]] = {
    _DIGITS_1_TO_3: ("llama-bpe", True),
    _DIGITS_1_TO_3.replace("{1,3}", ""): ("qwen2", False),
}
_OTHERWISE = "Give --llama-cpp with a checkout of llama.cpp, whose converter knows more."


def gguf_package() -> Any:
    """Import ``gguf``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError(
            "gguf: the package gguf is not installed; pip install 'lora-dpo[gguf]'."
        ) from None


def check_convertible(config: Any, tokenizer: Any) -> None:
    """Refuse a model or a tokenizer that is not certain to come out right, before any weight is read.

    Raises:
        ExportError: one that is not in the short list of this file.
    """
    _architecture(config)
    _cut(tokenizer)


def write_by_package(
    folder: Path, target: Path, kind: str, template_arguments: Mapping[str, Any] | None = None
) -> None:
    """Write a GGUF file from a folder of merged weights.

    Args:
        folder: with config, tokenizer and safetensors.
        target: the file.
        kind: one of ``PACKAGE_KINDS``; of all matrices whose rows it can hold.
        template_arguments: variables for the chat template, as training had them.
    """
    gguf = gguf_package()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_convertible(config, tokenizer)
    architecture, _ = _architecture(config)
    writer = gguf.GGUFWriter(target, architecture, use_temp_file=True)
    _write_settings(writer, config, architecture)
    writer.add_file_type(gguf.LlamaFileType[_file_type(kind)])
    end = end_of_turn(tokenizer, template_arguments)
    _write_tokenizer(writer, gguf, tokenizer, config, end)
    for name, value in expected_tensors(folder, config):
        data = value.float().numpy()
        stored = storage(gguf, kind, name, data.shape)
        writer.add_tensor(name, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def expected_tensors(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what a GGUF file of this folder must hold: name and values, before any rounding.

    Raises:
        ExportError: a tensor that has no name in GGUF.
    """
    gguf = gguf_package()
    architecture, interleaved = _architecture(config)
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, value in stored_tensors(folder):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ExportError(f"gguf: {name} has no name in GGUF for {architecture}. {_OTHERWISE}")
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads
            if "k_proj" in name:
                heads = config.num_key_value_heads
            value = interleave(value, heads)
        yield theirs, value


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder of safetensors, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a dict)
                yield name, stream.get_tensor(name)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Reorder a projection's rows: rotary pairs stand half a head apart there, side by side in GGUF."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def storage(gguf: Any, kind: str, name: str, shape: tuple[int, ...]) -> Any:
    """Return how a tensor is stored: vectors plainly, the vocabulary in 8 bits where others have 4."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or kind == "f32":
        return kinds.F32
    if kind in ("q8_0", "q4_0"):
        if shape[-1] % 32:
            return kinds.F16
        if name in ("token_embd.weight", "output.weight"):
            return kinds.Q8_0
    return kinds[kind.upper()]


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def _architecture(config: Any) -> tuple[str, bool]:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"gguf: model type {kind!r} is none of {', '.join(ARCHITECTURES)}, which are written here. "
            f"{_OTHERWISE}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    odd = {
        "rope scaling": rope.get("rope_type", "default") != "default",
        "partial rotary embeddings": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a sliding window": _windows(config),
        "biases": bool(
            getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        ),
        f"activation {config.hidden_act}": config.hidden_act != "silu",
    }
    if found := [name for name, there in odd.items() if there]:
        raise ExportError(
            f"gguf: this model has {' and '.join(found)}, which is not written here. {_OTHERWISE}"
        )
    return ARCHITECTURES[kind]


def _windows(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return bool(window and used and window < config.max_position_embeddings)


def _write_settings(writer: Any, config: Any, architecture: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(f"{architecture} by lora_dpo")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf_package().GGML_QUANT_VERSION)


def _cut(tokenizer: Any) -> str:
    """Return the name in GGUF of how a byte-level tokenizer cuts text."""
    core = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model, before = core.get("model") or {}, core.get("pre_tokenizer") or {}
    normaliser = (core.get("normalizer") or {}).get("type")
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        merges = bool(model.get("ignore_merges"))
        if before.get("type") == "ByteLevel" and not before.get("add_prefix_space"):
            if before.get("use_regex", True) and not merges and normaliser is None:
                return "gpt-2"
        elif before.get("type") == "Sequence" and len(before["pretokenizers"]) == 2:
            split, level = before["pretokenizers"]
            pattern = (split.get("pattern") or {}).get("Regex")
            name, expected = _CUTS.get(str(pattern), ("", False))
            plain = level.get("type") == "ByteLevel" and not level.get("add_prefix_space")
            normal = normaliser is None or (name == "qwen2" and normaliser == "NFC")
            whole = split.get("behavior") == "Isolated" and not split.get("invert")
            if name and merges is expected and plain and normal and whole:
                return name
    raise ExportError(
        "gguf: this tokenizer cuts text in a way that is not written here (byte-level BPE as GPT-2, "
        f"Llama 3 and Qwen 2 have it is). {_OTHERWISE}"
    )


def _write_tokenizer(writer: Any, gguf: Any, tokenizer: Any, config: Any, end: int | None) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    tokens, types = [], []
    for i in range(config.vocab_size):
        tokens.append(texts.get(i, f"[PAD{i}]"))
        if i in added:
            types.append(kinds.CONTROL if added[i].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if i in texts else kinds.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["merges"]])
    first = (tokenizer("a")["input_ids"] or [None])[0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    for name, value in {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": end,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(int(value))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def rounding(gguf: Any, stored: Any, value: Tensor) -> Tensor:
    """Return by how much each value of a tensor may differ once stored so, elementwise."""
    kinds, size = gguf.GGMLQuantizationType, value.abs()
    if stored == kinds.F32:
        return torch.zeros_like(size)
    if stored == kinds.F16:
        return size * 2**-11 + 2.0**-25
    if stored == kinds.BF16:
        return size * 2**-8
    # a block of 32 shares a scale of 16 bits; half a step, and a whole one where 4 bits clip
    largest = size.reshape(*size.shape[:-1], -1, 32).amax(-1, keepdim=True)
    steps = {kinds.Q8_0: 1 / 254 + 2**-11, kinds.Q4_0: 1 / 8 + 2**-8}
    blocks = (largest * steps[stored] + 2.0**-24 * 128).expand(*largest.shape[:-1], 32)
    return blocks.reshape(size.shape)
