"""Loading the base model: 4-bit or not, in the dtype of the hardware, refused by name if unfit."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_dpo.config import ModelConfig
from lora_dpo.errors import ModelError
from lora_dpo.policy.files import (
    as_published,
    check_base_files,
    check_config_files,
    tell_of_code,
)
from lora_dpo.sealing import check_seal
from lora_dpo.showing import bars_on_terminals_only

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MODALITIES = ("vision_config", "audio_config", "speech_config", "image_token_id")


def compute_dtype(asked: str = "auto", device: torch.device | None = None) -> torch.dtype:
    """Return the dtype of computation and of unquantised weights.

    ``auto`` is bfloat16 on a GPU that has it, else float16; on a CPU float32, which the small
    models that run there need and their size allows.
    """
    if asked != "auto":
        return DTYPES[asked]
    device = device or default_device()
    if device.type == "cpu":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def let_segments_grow() -> None:
    """Have torch take a card's memory in segments that grow: rows of all lengths leave holes in fixed ones.

    To be called before the first use of a card, when torch reads this setting; later it changes nothing, nor
    does it where the user has settings of their own.
    """
    own = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not own and not torch.cuda.is_initialized():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def default_device() -> torch.device:
    """Return the current accelerator, or the CPU; of several processes each has its own."""
    if torch.cuda.is_available():
        own = int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device())
        # a launcher may show each process its own card alone
        seen = own < torch.cuda.device_count()
        return torch.device("cuda", own if seen else torch.cuda.current_device())
    return torch.device("cpu")


def check_base(settings: ModelConfig) -> Any:
    """Read the model's config without its weights and refuse what cannot be trained here.

    Returns:
        The ``PretrainedConfig``.

    Raises:
        ModelError: not a model, mixture of experts, multimodal, encoder-decoder, quantised by a
            method other than bitsandbytes, or a quantisation that this machine cannot run.
    """
    where = f"model.base {settings.base!r}"
    if settings.base.startswith((".", "/", "~")) and not Path(settings.base).is_dir():
        raise ModelError(f"{where}: no such folder. Give a folder with config.json, or a hub id.")
    check_base_files(where, settings.base)
    tell_of_code(settings)
    try:
        config = AutoConfig.from_pretrained(
            settings.base, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: no causal language model could be read there ({reason}). Give a folder with "
            "config.json, or a hub id that this machine can reach."
        ) from None
    check_config_files(where, config, settings.attention)
    _refuse_architecture(where, config)
    _refuse_quantisation(where, config, settings)
    if settings.embeddings_on_cpu:
        _refuse_moved_embeddings(config, settings)
    return config


def _refuse_moved_embeddings(config: Any, settings: ModelConfig) -> None:
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        raise ModelError(
            "model.embeddings_on_cpu: this model's embeddings are its head too, which computes on the "
            "device; leave the setting out."
        )
    if settings.quantisation == "none" and not getattr(config, "quantization_config", None):
        raise ModelError(
            "model.embeddings_on_cpu: the trainer moves an unquantised model as a whole; leave the "
            "setting out, or quantise the base."
        )


def load_base(settings: ModelConfig, device: torch.device | None = None) -> PreTrainedModel:
    """Load the base, quantised as the settings say, frozen, with its dropout off."""
    config = check_base(settings)
    if Path(settings.base).is_dir():
        check_seal(Path(settings.base))  # an export of ours, perhaps
    device = device or default_device()
    dtype = compute_dtype(settings.compute_dtype, device)
    options: dict[str, Any] = {"device_map": {"": device}, "dtype": dtype}
    options["config"] = without_dropout(config)
    stored = getattr(config, "quantization_config", None)
    if not stored and settings.quantisation != "none":
        options["quantization_config"] = _quantisation(settings, dtype)
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    try:
        with bars_on_terminals_only(), as_published():
            base = AutoModelForCausalLM.from_pretrained(
                settings.base,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=True,
                **options,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(
            f"model.base {settings.base!r}: the weights did not load: {reason}"
        ) from None
    guard_cpu_kernels(base)
    if stored:
        _set_compute_dtype(base, dtype)
    base.requires_grad_(False)
    if settings.embeddings_on_cpu:
        keep_embeddings_on_cpu(base)
    return base


def keep_embeddings_on_cpu(base: PreTrainedModel) -> None:
    """Look token embeddings up in the memory of the CPU; the model's device gets the vectors."""
    embeddings: Any = base.get_input_embeddings()
    device = next(base.get_output_embeddings().parameters()).device
    embeddings.to("cpu")
    embeddings.forward = partial(_looked_up, embeddings, device)


def _looked_up(embeddings: Any, device: torch.device, ids: torch.Tensor) -> torch.Tensor:
    vectors: torch.Tensor = type(embeddings).forward(embeddings, ids.cpu())
    return vectors.to(device, non_blocking=True)


def _set_compute_dtype(base: nn.Module, dtype: torch.dtype) -> None:
    """Give a checkpoint that was quantised before the compute dtype that was asked for here."""
    module: Any
    for module in base.modules():
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            module.compute_dtype = dtype
    for parameter in base.parameters():
        if parameter.dtype in DTYPES.values():
            parameter.data = parameter.data.to(dtype)


def guard_cpu_kernels(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There the first evaluation forward rewrites a ``Linear4bit`` in place for an inference kernel;
    dequantisation, merges and gradients are wrong afterwards (bitsandbytes 0.50, issue 2078).

    Raises:
        ModelError: a layer was repacked before it came here.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError(
                    f"{name}: bitsandbytes has repacked this 4-bit weight for inference on the CPU; "
                    "training on it would be wrong. Load the base again with load_policy(...)."
                )
            module.support_avx512bf16_for_cpu = False


def silence_base_dropout(model: nn.Module) -> list[str]:
    """Turn off every dropout outside the adapters: noise in the policy alone moves the log-ratios.

    Returns:
        The names of the modules that were changed, for the log.
    """
    changed = []
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            changed.append(name)
        for key, value in vars(module).items():  # attention calls dropout with a number of its own
            if _is_dropout(key) and isinstance(value, float) and value > 0:
                setattr(module, key, 0.0)
                changed.append(name)
    return changed


def without_dropout(config: Any) -> Any:
    """Turn off, in place, every dropout that a model's config names, and return the config."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if _is_dropout(key) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def _is_dropout(key: str) -> bool:
    return "dropout" in key or key.endswith("pdrop")


def _quantisation(settings: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if settings.quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantisation,
        bnb_4bit_use_double_quant=settings.double_quantisation,
        bnb_4bit_compute_dtype=dtype,
    )


def _refuse_architecture(where: str, config: Any) -> None:
    text_config = config.get_text_config()
    experts = next((key for key in _EXPERTS if (getattr(text_config, key, None) or 0) > 1), None)
    if experts:
        raise ModelError(
            f"{where}: a mixture-of-experts model ({experts}={getattr(text_config, experts)}), whose "
            "experts bitsandbytes leaves unquantised and LoRA leaves without adapters. Use a dense model."
        )
    modality = next((key for key in _MODALITIES if getattr(config, key, None) is not None), None)
    if modality:
        raise ModelError(
            f"{where}: a multimodal model ({modality} in its config); only text models are handled."
        )
    causal = type(config) in _causal_configs() and not getattr(config, "is_encoder_decoder", False)
    if not causal and not getattr(config, "auto_map", None):
        raise ModelError(
            f"{where}: model type {config.model_type!r} is no causal language model of transformers."
        )


def _causal_configs() -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING


def _refuse_quantisation(where: str, config: Any, settings: ModelConfig) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if str(getattr(method, "value", method)) != "bitsandbytes":
            raise ModelError(
                f"{where}: the checkpoint is quantised by {method}, which cannot be dequantised for a "
                "proven merge; use the unquantised checkpoint or a bitsandbytes one."
            )
        kind = stored_kind(stored)
        if settings.quantisation not in ("nf4", kind):  # nf4 is what nobody has asked for
            raise ModelError(
                f"{where}: the checkpoint is quantised already, to {kind}, and model.quantisation asks "
                f"for {settings.quantisation}; leave the setting out or give {kind}."
            )
    if stored or settings.quantisation != "none":
        _refuse_hardware(settings.quantisation)


def stored_kind(stored: Any) -> str:
    """Return what a checkpoint was quantised to: ``nf4``, ``fp4`` or ``int8``."""
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    return str(values.get("bnb_4bit_quant_type", "fp4"))


def _refuse_hardware(quantisation: str) -> None:
    try:
        import_bitsandbytes()
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model.quantisation {quantisation!r}: bitsandbytes does not work on this machine "
            f"({' '.join(str(error).split())[:200]}). Install it, or set model.quantisation: none."
        ) from None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (6, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise ModelError(
            f"model.quantisation {quantisation!r}: this GPU (compute capability {capability}) is older "
            "than the 4-bit kernels support (6.0); set model.quantisation: none."
        )


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its notice about optional CPU kernels, which nobody can act on."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    return bitsandbytes


def is_local(base: str) -> bool:
    """Whether a model is given as a folder of this machine."""
    return Path(base).is_dir()
