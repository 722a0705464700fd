"""Fast layers, put on the instances of one model and taken off again; exact in policy and reference.

They act only while ``forward`` runs a batch of ours: generation, merging and every other use of the
model go through the library's own layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_dpo.layers.attention import NAME, SEGMENTS
from lora_dpo.layers.linear import obstacle, take_linear
from lora_dpo.layers.mlp import is_gated, take_mlp
from lora_dpo.layers.norm import is_frozen_norm, take_norm
from lora_dpo.layers.recompute import decoder_layers, take_layer
from lora_dpo.layers.work import Work

__all__ = ["NAME", "SEGMENTS", "Taken", "Work", "decoder_layers", "release", "take", "work_of"]

_WORK = "_lora_dpo_work"


@dataclass(frozen=True)
class Taken:
    """What of a model runs on the fast layers, and why not the rest."""

    linears: int
    mlps: int
    norms: int
    layers: int
    obstacles: tuple[str, ...]
    fused: bool

    def __bool__(self) -> bool:
        return bool(self.linears or self.layers)

    def __str__(self) -> str:
        found = [f"{self.linears} LoRA layers"] if self.linears else []
        found += [f"{self.mlps} MLPs"] if self.mlps else []
        found += [f"{self.norms} norms"] if self.norms else []
        found += ["policy and reference in one pass"] if self.fused else []
        found = found or ["recomputation alone"]
        left = f" (not {', '.join(self.obstacles)})" if self.obstacles else ""
        return ", ".join(found) + left


def work_of(causal: nn.Module) -> Work | None:
    """Return what the fast layers of a transformers model share, or None where it has none."""
    return vars(causal).get(_WORK)


def take(policy: PeftModel, *, recomputed: int = 0, skips_last: bool = True) -> Taken:
    """Put the fast layers on a policy, wherever they are right.

    Args:
        policy: a ``PeftModel``.
        recomputed: how many decoder layers, from the first on, keep their input alone.
        skips_last: leave the last projection of an MLP out of a recomputation; right where the
            layer does nothing to its output but add it.
    """
    causal: Any = policy.get_base_model()
    release(causal)
    work = Work()
    layers = decoder_layers(causal)
    if not layers or any("forward" in vars(layer) for layer in layers):
        why = (
            "decoder layers that others have patched"
            if layers
            else "decoder layers of its own kind"
        )
        return Taken(0, 0, 0, 0, (why,), False)
    inside = {module for layer in layers for module in layer.modules()}
    loras: list[Any] = [module for module in causal.modules() if isinstance(module, LoraLayer)]
    reasons = {module: obstacle(module) for module in loras}
    gated = [module for module in inside if is_gated(module)]
    head = causal.get_output_embeddings()  # it is run again by itself where it is trained
    reasons |= {module: "the head" for module in loras if module is head}
    fast = [module for module in loras if not reasons[module]]
    norms = [module for module in causal.modules() if is_frozen_norm(module)]
    for module in norms:
        take_norm(module, work)
    for module in gated:
        take_mlp(module, work)
    for module in fast:
        take_linear(module, work)
    for number, layer in enumerate(layers):
        take_layer(layer, work, (number, number + 1 == len(layers)))
    work.layers = layers
    work.taken = [*norms, *gated, *fast, *layers]
    saved = any(isinstance(module, AuxiliaryTrainingWrapper) for module in causal.modules())
    work.fusable = len(fast) == len(loras) and inside >= set(loras) and not saved
    work.recomputed, work.skips_last = min(recomputed, len(layers)), skips_last
    work.random = any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules()
    )
    vars(causal)[_WORK] = work
    found = dict.fromkeys(reason for reason in reasons.values() if reason)
    return Taken(len(fast), len(gated), len(norms), len(layers), tuple(found), work.fusable)


def release(causal: nn.Module) -> None:
    """Take the fast layers off again."""
    work = vars(causal).pop(_WORK, None)
    for module in work.taken if work is not None else []:
        vars(module).pop("forward", None)
