"""What is refused before training, by name, because its reference or its merge would be wrong."""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lora_dpo.config import BASE_CHANGING_INITS
from lora_dpo.errors import ModelError
from lora_dpo.policy.facts import base_linears
from lora_dpo.policy.weights import MERGEABLE

CHANGED_BASE = (
    "{where}: init_lora_weights={init!r} rewrites the base weights, so the base with adapters "
    "disabled is not the model that was loaded and the reference would be wrong. Start from an "
    "adapter with the default init, or convert this one with peft (path_initial_model_for_weight_"
    "conversion)."
)


def refuse_lora(config: Any, where: str) -> None:
    if not isinstance(config, peft.LoraConfig):
        raise ModelError(
            f"{where}: is {type(config).__name__}; only LoRA and its variants are trained."
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise ModelError(CHANGED_BASE.format(where=where, init=init))
    if config.bias != "none" or config.lora_bias:
        raise ModelError(
            f"{where}: trains biases (bias={config.bias!r}, lora_bias={config.lora_bias}), which "
            "disabling the adapter does not take back, so the reference would move; use bias='none'."
        )
    for option in ("trainable_token_indices", "target_parameters", "layer_replication"):
        if getattr(config, option, None):
            raise ModelError(f"{where}: {option} is not supported; it has no proven merge here.")


def refuse_spread(base: nn.Module) -> None:
    """Refuse a base that a ``device_map`` has spread: its layers would be fed from the wrong device.

    Token embeddings that wait on the CPU (``model.embeddings_on_cpu``) are no such thing.
    """
    placed = getattr(base, "hf_device_map", None) or {}
    named = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed.values()}
    kept: Any = base.get_input_embeddings() if isinstance(base, PreTrainedModel) else None
    apart = set() if kept is None else {id(parameter) for parameter in kept.parameters()}
    held = {str(p.device) for p in base.parameters() if id(p) not in apart}
    for found in (named, held):
        if len(found) > 1 or found & {"disk", "meta"}:
            raise ModelError(
                f"the base is spread over {', '.join(sorted(found))} (device_map); training needs all of "
                "it on one device. Load it with load_policy(...) or device_map={'': device}; several "
                "cards are several processes, each with the whole base: torchrun --nproc_per_node N."
            )


def refuse_layers(policy: PeftModel, name: str) -> None:
    """Refuse what could be trained here but never be merged and proven."""
    for key, module in policy.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        if not isinstance(layer, MERGEABLE):
            raise ModelError(
                f"{key}: LoRA on {type(layer).__name__} has no proven merge here; adapt linear layers."
            )
        if type(layer).__name__ == "Linear8bitLt" and name in module.lora_variant:
            raise ModelError(f"{key}: DoRA does not work on int8 weights; use nf4 or plain LoRA.")
    outside = [
        key
        for key, parameter in policy.named_parameters()
        if parameter.requires_grad and ".lora_" not in key and ".modules_to_save." not in key
    ]
    if outside:
        raise ModelError(
            f"{outside[0]} and {len(outside) - 1} more weights of the base require gradient; the base "
            "is the reference and stays as it is. Call base.requires_grad_(False) first."
        )


def refuse_unmatched(policy: PeftModel, config: peft.LoraConfig) -> None:
    """A name that fits no layer beside one that does would be ignored."""
    names = [name.split(".base_layer")[0] for name, _ in policy.named_modules()]
    asked = [
        (field, name)
        for field in ("target_modules", "modules_to_save", "exclude_modules")
        if isinstance(given := getattr(config, field), (list, set, tuple))
        for name in given
    ]
    missing = [
        f"{field}: {name!r}"
        for field, name in asked
        if not any(known == name or known.endswith(f".{name}") for known in names)
    ]
    if missing:
        leaves = {
            n.rsplit(".", 1)[-1] for n, m in base_linears(policy) if not n.endswith("base_layer")
        }
        leaves |= {n.split(".")[-2] for n, _ in base_linears(policy) if n.endswith("base_layer")}
        raise ModelError(
            f"lora: no module of this model fits {', '.join(missing)}; its linear layers are "
            f"{', '.join(sorted(leaves))}."
        )


def refuse_tied_head(base: PreTrainedModel, config: peft.LoraConfig) -> None:
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    asked = config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else []
    names = {*asked, *(config.modules_to_save or ())}
    touched = sorted(n for n in names if n.rsplit(".", 1)[-1] in {"lm_head", "embed_tokens", "wte"})
    if tied and touched:
        raise ModelError(
            f"lora: {', '.join(touched)} cannot be trained, because this model ties its head to its "
            "embeddings and a change of one side would break the tie; leave them out."
        )
