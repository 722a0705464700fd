"""Models and pairs for the benchmarks: real shapes with random NF4 weights, nothing downloaded."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

# class, and the sizes as in the published config.json files
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "Llama",
        {
            "vocab_size": 32000,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
    ),
    "llama3-8b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ),
    "mistral-7b": (
        "Mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
    ),
    "qwen2.5-7b": (
        "Qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
        },
    ),
}
_WIDE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def preset_config(preset: str, layers: int | None = None, width: float = 1.0) -> Any:
    """Return the config of a preset, with fewer layers or another width if asked.

    Args:
        preset: its name.
        layers: how many; those of the preset if left out.
        width: times that of the preset: more or fewer heads of the same size, the MLP in proportion.
    """
    kind, sizes = PRESETS[preset]
    sizes = dict(sizes)
    if layers:
        sizes["num_hidden_layers"] = layers
    for name in _WIDE:
        sizes[name] = max(1, round(sizes[name] * width))
    if theta := sizes.pop("rope_theta", None):
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    cls = getattr(importlib.import_module("transformers"), f"{kind}Config")
    return cls(**sizes, **SPECIAL, tie_word_embeddings=False, use_cache=False)


def _nf4(dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_folder(folder: str, device: Any, dtype: Any) -> Any:
    """Load a model folder in NF4."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=_nf4(dtype), dtype=dtype, device_map={"": device}
    )


def build_nf4(config: Any, device: Any, dtype: Any, seed: int = 0) -> Any:
    """Build a causal model of random weights on the device, all linears but the head in NF4.

    One weight at a time is drawn and quantised, so no copy of the whole model ever exists.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(shape: Any) -> Any:
        values = torch.empty(shape, device=device, dtype=dtype)
        return values.normal_(0.0, 0.02, generator=generator)

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, _linear4bit(module, draw, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # embeddings, head, norms
            shape = parameter.shape
            value = draw(shape) if len(shape) > 1 else torch.ones(shape, device=device, dtype=dtype)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    for name, module in list(model.named_modules()):  # rotary tables are no parameters
        if any(b is not None and b.is_meta for b in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config).to(device))
    quantisation = _nf4(dtype)
    model.config.quantization_config = quantisation
    model.quantization_method = quantisation.quant_method
    model.is_loaded_in_4bit = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    model.generation_config = model.generation_config or GenerationConfig()
    model.requires_grad_(False)
    return model


def _linear4bit(module: Any, draw: Any, device: Any, dtype: Any) -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    new = Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = Params4bit(
        draw((module.out_features, module.in_features)),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        module=new,
    ).to(device)
    if module.bias is not None:
        zeros = torch.zeros(module.out_features, device=device, dtype=dtype)
        new.bias = nn.Parameter(zeros, requires_grad=False)
    new.source_cls = nn.Linear
    return new


# ---- pairs ---------------------------------------------------------------------------------------


def random_pairs(
    count: int, vocab: int, prompt: int, response: int, jitter: float, seed: int
) -> list[dict[str, list[int]]]:
    """Return pairs of random ids; ``jitter`` j draws each length from [(1 - j) x length, length]."""
    rng = random.Random(seed)

    def ids(longest: int, end: bool) -> list[int]:
        length = max(2, rng.randint(math.ceil((1 - jitter) * longest), longest))
        drawn = [rng.randrange(3, vocab) for _ in range(length - end)]
        return drawn + [SPECIAL["eos_token_id"]] * end

    return [
        {
            "prompt_ids": ids(prompt, False),
            "chosen_ids": ids(response, True),
            "rejected_ids": ids(response, True),
        }
        for _ in range(count)
    ]


def real_pairs(
    file: Path, tokenizer: str, vocab: int, count: int, max_length: int, seed: int
) -> list[dict[str, list[int]]]:
    """Return real pairs as ids, shuffled; the file is gone through again where it is too short."""
    from transformers import AutoTokenizer

    from lora_dpo import load_preferences, tokenise

    found = AutoTokenizer.from_pretrained(tokenizer)
    if found.chat_template is None:
        found.chat_template = (
            "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant\n{% endif %}"
        )
    data = tokenise(load_preferences(file), found, max_length=max_length)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: list(row[name]) for name in names} for row in data.rows]
    largest = max(max(row[name]) for row in rows for name in names)
    if largest >= vocab:
        raise SystemExit(
            f"--tokenizer gives id {largest}, but the model has {vocab} tokens; give the "
            "tokenizer of the model, or one with a smaller vocabulary."
        )
    random.Random(seed).shuffle(rows)
    return [rows[i % len(rows)] for i in range(count)]


def usual_tokens(pair: dict[str, list[int]]) -> int:
    """Return the tokens of a pair in the usual layout: the prompt twice, and no padding."""
    return 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])


def read_pairs(file: Path) -> list[dict[str, list[int]]]:
    """Return the pairs that another process wrote, one JSON object a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
