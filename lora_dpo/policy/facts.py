"""What a policy consists of, for people to read before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_dpo.policy.switching import describe_reference, policy_adapter, unwrap


@dataclass(frozen=True)
class PolicyFacts:
    """What a policy consists of, for people to read before training."""

    reference: str
    trainable: int
    total_layers: dict[str, int]
    adapted: tuple[str, ...]
    unadapted: tuple[str, ...]
    compute_dtype: str
    unquantised: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return a few sentences."""
        weights = ", ".join(f"{count} {kind}" for kind, count in sorted(self.total_layers.items()))
        return [
            f"linear layers: {weights}; everything else in {self.compute_dtype}"
            + (f" (unquantised: {', '.join(self.unquantised)})" if self.unquantised else ""),
            f"trained: {self.trainable:,} weights in float32 on {', '.join(self.adapted)}"
            + (f"; without adapter: {', '.join(self.unadapted)}" if self.unadapted else ""),
            f"reference: {self.reference}",
        ]


def describe_policy(policy: nn.Module) -> PolicyFacts:
    """Count quantised and adapted layers of a policy by the last part of their names."""
    model = unwrap(policy)
    kinds: dict[str, int] = {}
    adapted: set[str] = set()
    unadapted: set[str] = set()
    unquantised: set[str] = set()
    quantised_model = getattr(model.get_base_model(), "is_quantized", False)
    for name, module in base_linears(model):
        kind = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}.get(
            type(module).__name__, "unquantised"
        )
        kinds[kind] = kinds.get(kind, 0) + 1
        leaf = name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        (adapted if name.endswith(".base_layer") else unadapted).add(leaf)
        if kind == "unquantised" and quantised_model:
            unquantised.add(leaf)
    saved = [m for m in model.modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    adapted |= {f"{len(saved)} full copies (modules_to_save)"} if saved else set()
    return PolicyFacts(
        reference=describe_reference(model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_layers=kinds,
        adapted=tuple(sorted(adapted)),
        unadapted=tuple(sorted(unadapted - adapted)),
        compute_dtype=str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        unquantised=tuple(sorted(unquantised)),
    )


def base_linears(model: PeftModel) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and "modules_to_save" not in name
    ]


def adapter_change(policy: nn.Module) -> float:
    """Return the root mean square of the change that the adapters make to a weight."""
    model = unwrap(policy)
    name, changes, count = policy_adapter(model), 0.0, 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            layer: Any = module
            up, down = (getattr(layer, f"lora_{k}")[name].weight.detach().float() for k in "BA")
            squared = ((up.T @ up) * (down @ down.T)).sum()  # |B A|^2 without the large product
            changes += layer.scaling[name] ** 2 * float(squared)
            count += down.shape[1] * up.shape[0]
    return float((max(changes, 0.0) / max(count, 1)) ** 0.5)
