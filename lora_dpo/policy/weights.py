"""Weights as plain float tensors: what a merge and its proof read, one layer at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_dpo.errors import ExportError
from lora_dpo.policy.switching import policy_adapter, unwrap


@dataclass(frozen=True)
class Merged:
    """One tensor of the merged model."""

    name: str
    value: Tensor
    adapted: bool


def dequantised(layer: Any) -> Tensor:
    """Return a linear layer's weight in float32, 4-bit and 8-bit ones as the forward sees them."""
    weight = layer.weight
    if not _is_quantised(weight):
        value: Tensor = weight.detach().float()
        return value
    state = quant_state(layer) or getattr(layer, "state", None)
    return dequantize_bnb_weight(weight, state=state).detach().float()


def plain_weight(layer: Any) -> Tensor:
    """Return a linear layer's weight as its forward uses it, ``[outputs, inputs]``, in its dtype.

    A 4-bit one is a new tensor, in the dtype in which it was quantised; a plain one is itself.
    """
    weight, state = layer.weight, quant_state(layer)
    if state is None:
        return weight  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def quant_state(layer: Any) -> Any:
    """Return what beside its bytes tells a 4-bit layer's weight, or None for another layer.

    Weights that are gathered from other processes are plain tensors; the layer keeps it for them.
    """
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _in_its_own_layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """Turn a weight between linear layout and that of a ``Conv1D`` which quantisation replaced."""
    return weight.T if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D) else weight


MERGEABLE = (nn.Linear, Conv1D)

Original = Callable[[str], Tensor]


def merged_tensors(policy: nn.Module, original: Original | None = None) -> Iterator[Merged]:
    """Yield every tensor of the base model with the active adapter added in float32, one by one.

    Names are those of the base without peft's wrappers. Tied tensors come once.

    Args:
        policy: its active adapter is merged; nothing of it is changed.
        original: looks a base weight up by name, to merge into other weights than the policy was
            trained on; None takes those of the policy, dequantised.

    Raises:
        ExportError: an adapter weight that no tensor consumed, or two did; one without proven merge.
    """
    model = unwrap(policy)
    adapter = policy_adapter(model)
    base = model.get_base_model()
    expected = {key for key in _adapter_parameters(model, adapter)}
    consumed: Counter[str] = Counter()
    merged: dict[int, str] = {}
    tied = set(getattr(base, "all_tied_weights_keys", None) or {})
    for name, module in base.named_modules(remove_duplicate=False):
        if _inside_adapter(name):
            continue
        for leaf, value in _own_tensors(module):
            key = f"{name}.{leaf}" if name else leaf
            if key in tied:
                continue
            known = original is not None and leaf in module._parameters
            yield Merged(key, original(key) if original and known else value, adapted=False)
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            _refuse_second_merge(name, module, adapter, merged, tied)
        if isinstance(module, LoraLayer):
            yield from _merged_layer(name, module, adapter, original)
            consumed.update(key for key in expected if key.startswith(f"{name}.lora_"))
        elif isinstance(module, ModulesToSaveWrapper):
            yield from _saved_module(name, module, adapter)
            consumed.update(key for key in expected if key.startswith(f"{name}.modules_to_save."))
    left = sorted(expected - consumed.keys())
    if left:
        raise ExportError(
            f"adapter weights that no layer of the merge took: {', '.join(left[:5])}."
        )
    if twice := sorted(key for key, times in consumed.items() if times > 1):
        raise ExportError(f"adapter weights that were merged twice: {', '.join(twice[:5])}.")


def _refuse_second_merge(
    name: str, module: Any, adapter: str, merged: dict[int, str], tied: set[str]
) -> None:
    """One change is added to one weight: not to two, and not to one side of a tie."""
    if adapter not in getattr(module, "lora_A", getattr(module, "modules_to_save", ())):
        return
    if id(module) in merged:
        raise ExportError(
            f"{name}: shares its adapter with {merged[id(module)]}, and would be merged a second time; a "
            "model with shared layers has no proven merge here. Export the adapter alone."
        )
    if f"{name}.weight" in tied:
        raise ExportError(
            f"{name}: is adapted and tied to another weight, which a merge of one side would leave "
            "behind. Export the adapter alone."
        )
    merged[id(module)] = name


def _merged_layer(
    name: str, layer: Any, adapter: str, original: Original | None
) -> Iterator[Merged]:
    base_layer = layer.get_base_layer()
    if not isinstance(base_layer, MERGEABLE):
        raise ExportError(f"{name}: LoRA on {type(base_layer).__name__} has no proven merge here.")
    weight = dequantised(base_layer)
    if original:
        stored = original(f"{name}.weight").to(weight.device).float()
        weight = _in_its_own_layout(base_layer, stored)
    if adapter not in layer.lora_A:
        pass  # a layer that another adapter of the model has and the trained one leaves alone
    elif adapter in layer.lora_variant:
        weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight).detach().float()
    else:
        weight = weight + layer.get_delta_weight(adapter).detach().float()
    if not torch.isfinite(weight).all():
        raise ExportError(f"{name}: the merged weight holds values that are not finite.")
    value = _in_its_own_layout(base_layer, weight)
    yield Merged(f"{name}.weight", value, adapted=adapter in layer.lora_A)
    if base_layer.bias is not None:
        yield Merged(f"{name}.bias", base_layer.bias.detach(), adapted=False)


def _saved_module(name: str, wrapper: Any, adapter: str) -> Iterator[Merged]:
    adapted = adapter in wrapper.modules_to_save
    module = wrapper.modules_to_save[adapter] if adapted else wrapper.original_module
    for leaf, value in module.state_dict().items():
        yield Merged(f"{name}.{leaf}", value.detach(), adapted=adapted)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf, parameter in module.named_parameters(recurse=False):
        quantised = _is_quantised(parameter)
        plain = _in_its_own_layout(module, dequantised(module)) if quantised else parameter
        yield leaf, plain.detach()
    for leaf, buffer in module.named_buffers(recurse=False):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer.detach()


def _is_quantised(parameter: Tensor) -> bool:
    return type(parameter).__name__ in {"Params4bit", "Int8Params"}


def _inside_adapter(name: str) -> bool:
    parts = name.split(".")
    wrappers = ("base_layer", "modules_to_save", "original_module", "lora_dropout")
    return any(part in wrappers or part.startswith("lora_") for part in parts)


def _adapter_parameters(model: PeftModel, adapter: str) -> Iterator[str]:
    prefix = "base_model.model."
    for key, _ in model.named_parameters(remove_duplicate=False):
        if f".{adapter}" in key and (".lora_" in key or ".modules_to_save." in key):
            yield key.removeprefix(prefix)
