"""What the reference of a policy is, as hashes: all that its numbers depend on, and nothing else.

Rank, targets, seed and training of the adapters are no part of it, unless one of them is the frozen
reference itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lora_dpo.policy.switching import REFERENCE, Switch, unwrap
from lora_dpo.policy.weights import quant_state
from lora_dpo.store import fingerprint

_PIECE = 1 << 26  # bytes that leave the accelerator at one time
_LIBRARIES = ("torch", "transformers", "bitsandbytes")


def reference_identity(policy: nn.Module) -> dict[str, Any]:
    """Return plain values that are equal for two policies if and only if their references are.

    The base is told by the bytes of its tensors, as they are held: a checkpoint loaded twice is one
    base, and the same checkpoint in another quantisation is another. Values of two accelerators of
    a kind are taken for equal, as those of two batch shapes are.
    """
    model = unwrap(policy)
    base: Any = model.get_base_model()
    return {
        "base": _digest_of(dict(_base_tensors(base))),
        "layers": fingerprint(_settings_of_layers(base)),
        "config": fingerprint(_settings_of_model(base)),
        "reference": _adapter(model),
        "attention": str(base.config._attn_implementation),  # the engine's layout among them
        "device": next(model.get_output_embeddings().parameters()).device.type,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def weights_identity(policy: nn.Module, *, with_reference: bool = True) -> str:
    """Return one hash of the base's weights as they are held, and of a frozen reference adapter.

    Args:
        policy: whose they are; the adapter that is trained is no part of it.
        with_reference: without it the base alone is told.
    """
    model = unwrap(policy)
    base: Any = model.get_base_model()
    reference = _adapter(model) if with_reference else ""
    return fingerprint([_digest_of(dict(_base_tensors(base))), reference])


def _base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base under the names that they have without peft's wrappers."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_modules(module.original_module, name)
    elif isinstance(module, Switch):
        yield from _base_modules(module.get_base_layer(), name)
    else:
        yield name, module
        for leaf, child in module._modules.items():
            if child is not None:
                yield from _base_modules(child, f"{name}.{leaf}" if name else leaf)


def _base_tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    module: Any
    for name, module in _base_modules(base):
        for leaf, weight in module._parameters.items():
            if weight is None:
                continue
            yield f"{name}.{leaf}", weight.detach()
            for key, value in _quantisation(module, weight).items():
                if isinstance(value, Tensor):
                    yield f"{name}.{leaf}.{key}", value.detach()
        for leaf, buffer in module._buffers.items():
            # the others follow from the config, and some change with the longest row seen
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield f"{name}.{leaf}", buffer.detach()


def _quantisation(module: Any, weight: Any) -> dict[str, Any]:
    """Return what beside its bytes tells the values of a weight that bitsandbytes quantised."""
    if weight is module._parameters.get("weight") and (state := quant_state(module)) is not None:
        return dict(state.as_dict(packed=False))
    if (state := getattr(module, "state", None)) is not None and hasattr(state, "SCB"):
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        return {"scales": scales, "threshold": float(state.threshold)}
    return {}


def _settings_of_layers(base: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    module: Any
    for name, module in _base_modules(base):
        for leaf, weight in module._parameters.items():
            values = _quantisation(module, weight) if weight is not None else {}
            plain = {k: str(v) for k, v in values.items() if not isinstance(v, Tensor)}
            if values:
                compute = str(getattr(module, "compute_dtype", None))
                found[f"{name}.{leaf}"] = {**plain, "computes in": compute}
    return found


def _settings_of_model(base: Any) -> dict[str, Any]:
    """Return the model's config without what its weights say, and what moves no log-prob."""
    values = _plain(base.config.to_dict())
    return {"class": f"{type(base).__module__}.{type(base).__qualname__}", "config": values}


_NO_MATTER = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_NO_MATTER |= {"quantization_config", "use_cache", "_attn_implementation", "attn_implementation"}
_NO_MATTER |= {"output_attentions", "output_hidden_states", "return_dict", "initializer_range"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _plain(part)
            for key, part in value.items()
            if not (key in _NO_MATTER or "dropout" in str(key) or str(key).endswith("pdrop"))
            and not str(key).endswith("_token_id")
        }
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else str(value)


def _adapter(model: PeftModel) -> str:
    """Return the hash of the frozen reference adapter, or that there is none."""
    if REFERENCE not in model.peft_config:
        return "adapters disabled"
    state = peft.get_peft_model_state_dict(
        model, adapter_name=REFERENCE, save_embedding_layers=False
    )
    scales = {
        name.removeprefix("base_model.model."): float(module.scaling[REFERENCE])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and REFERENCE in module.scaling
    }
    return fingerprint([_digest_of(state), scales])


def _digest_of(tensors: dict[str, Tensor]) -> str:
    """Return one hash of named tensors: of their bytes, shapes and dtypes."""
    # tied tensors are read once
    own = {_place(tensor): tensor for tensor in tensors.values()}
    # those that are dealt out are gathered one at a time, by all processes
    dealt = {place: own.pop(place) for place in list(own) if hasattr(own[place], "full_tensor")}
    digests = {place: _digest(_gathered(tensor)) for place, tensor in dealt.items()}
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads run
        digests |= zip(own, pool.map(_digest, own.values()), strict=True)
    return fingerprint({name: digests[_place(tensor)] for name, tensor in tensors.items()})


def _gathered(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor()
    return whole


def _place(tensor: Tensor) -> tuple[Any, ...]:
    held = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, str(tensor.device)


def _digest(tensor: Tensor) -> str:
    digest = sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(_PIECE):
        digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()


def _version(library: str) -> str:
    """Return major and minor version; what a library fixes in between is taken for equal."""
    try:
        return ".".join(version(library).split(".")[:2])
    except PackageNotFoundError:
        return "none"
