"""An adapter that every consumer scales alike: factors, ranks and patterns folded into its tensors.

Programs that serve adapters read ``lora_alpha`` and ``r`` and little else: rsLoRA and the patterns
of ranks and alphas are left out by some, and the adapter is then too strong or too weak without a
word. With ``B' = scaling * B``, all ranks padded with zeros to the largest, and ``alpha = r``,
nothing is left to be read wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_dpo.errors import ExportError
from lora_dpo.policy.switching import policy_adapter, unwrap

FOLDING_GATE = 1e-6


@dataclass(frozen=True)
class Folded:
    """What became of an adapter.

    Args:
        layers: adapted layers.
        rank: of all of them, after padding; alpha is the same number.
        folded: what the adapter had that others read wrongly, in words.
        dora: whether it is DoRA, whose magnitudes stay as they are.
        saved_modules: modules kept as whole copies (``modules_to_save``).
        dtype: of the factors in the file.
        error: largest error of a layer's change, relative to that change.
    """

    layers: int
    rank: int
    folded: tuple[str, ...]
    dora: bool
    saved_modules: tuple[str, ...]
    dtype: str
    error: float

    def __str__(self) -> str:
        what = f" ({', '.join(self.folded)} folded in)" if self.folded else ""
        return (
            f"adapter of rank {self.rank} on {self.layers} layers{what}, {self.dtype}; its changes are "
            f"the policy's within {self.error:.1e} of their size"
        )


def save_portable_adapter(
    policy: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    base_id: str | None = None,
    revision: str | None = None,
) -> Folded:
    """Write the active adapter with its scaling folded into ``lora_B`` and one rank for all layers.

    Args:
        policy: a ``PeftModel`` with LoRA; nothing of it is changed.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        dtype: of the two factors. Below float32 the error is that of its rounding.
        base_id: what the config names as its base; None names none, and no folder of this machine.
        revision: of that base on the hub.

    Raises:
        ExportError: a tensor of the adapter that no layer took or two did, or, in float32, a layer
            whose change is not the policy's.
    """
    model = unwrap(policy)
    name = policy_adapter(model)
    config: Any = model.peft_config[name]
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    layers = dict(_layers(model, name))
    rank = max((int(layer.r[name]) for layer in layers.values()), default=0)
    tensors, error = {}, 0.0
    for key, layer in layers.items():
        a_key, b_key = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
        if a_key not in state or b_key not in state:
            raise ExportError(f"{key}: the adapter holds no such pair, or two layers share it.")
        first, second = state.pop(a_key), state.pop(b_key)
        a = _padded(first, rank, dim=0).to(dtype)
        b = _padded(second.double() * layer.scaling[name], rank, dim=1).float().to(dtype)
        error = max(error, _error(layer, name, a, b))
        tensors[a_key], tensors[b_key] = a, b
    left = sorted(key for key in state if ".lora_A." in key or ".lora_B." in key)
    if left or not layers:
        raise ExportError(
            f"adapter weights that no layer took: {', '.join(left[:5]) or 'all of them'}."
        )
    if dtype is torch.float32 and not error <= FOLDING_GATE:
        raise ExportError(
            f"the folded adapter is not the policy: a layer's change differs by {error:.1e} of its size, "
            f"and {FOLDING_GATE:.0e} is the most that rounding explains. Please report this."
        )
    tensors |= {key: value.detach().float() for key, value in state.items()}
    folded = tuple(_what_is_folded(config, layers, name))
    _write(config, tensors, folder, rank=rank, base_id=base_id, revision=revision)
    saved = tuple(sorted(config.modules_to_save or ()))
    kind = str(dtype).removeprefix("torch.")
    return Folded(len(layers), rank, folded, bool(config.use_dora), saved, kind, error)


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    for key, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield key, module


def _padded(factor: Tensor, rank: int, *, dim: int) -> Tensor:
    missing = rank - factor.shape[dim]
    shape = [missing, factor.shape[1]] if dim == 0 else [factor.shape[0], missing]
    return torch.cat([factor, factor.new_zeros(shape)], dim).detach().cpu().contiguous()


def _error(layer: Any, name: str, a: Tensor, b: Tensor) -> float:
    """Return how far the product of the written factors is from the layer's change, of its size."""
    a_now, b_now = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    change = (b_now.detach().float() @ a_now.detach().float()).mul_(layer.scaling[name])
    written = b.to(change.device).float() @ a.to(change.device).float()
    size = float(change.norm())
    distance = float(change.sub_(written).norm())
    return distance / size if size else distance


def _what_is_folded(config: Any, layers: dict[str, Any], name: str) -> Iterator[str]:
    if config.use_rslora:
        yield "rsLoRA"
    if len({int(layer.r[name]) for layer in layers.values()}) > 1:
        yield "ranks that differ by layer"
    if config.alpha_pattern:
        yield "alphas that differ by layer"


def _write(
    config: Any,
    tensors: dict[str, Tensor],
    folder: Path,
    *,
    rank: int,
    base_id: str | None,
    revision: str | None,
) -> None:
    fields = {k: v for k, v in config.to_dict().items() if k in config.__dataclass_fields__}
    plain = type(config)(**fields)
    plain.r, plain.lora_alpha, plain.use_rslora = rank, rank, False
    plain.rank_pattern, plain.alpha_pattern = {}, {}
    plain.inference_mode, plain.init_lora_weights = True, True
    plain.base_model_name_or_path = base_id
    plain.revision = revision if base_id else None
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(str(folder))
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
