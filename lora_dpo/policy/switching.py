"""The reference: one context manager, and the few places where adapters are switched.

The reference is the frozen adapter named ``reference`` where a policy has one (training started
from an adapter), else the base with adapters disabled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_dpo.errors import ModelError

REFERENCE = "reference"

Switch = BaseTunerLayer | AuxiliaryTrainingWrapper


def unwrap(model: nn.Module) -> PeftModel:
    """Return the ``PeftModel`` inside the wrappers of accelerate and torch.

    Raises:
        ModelError: there is none.
    """
    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            raise ModelError(
                f"{type(model).__name__}: a policy is a peft.PeftModel on the base model; use "
                "load_policy(...), or peft.get_peft_model(base, LoraConfig(...))."
            )
        model = inner
    return model


@contextmanager
def reference(policy: nn.Module) -> Iterator[nn.Module]:
    """Make ``policy`` compute the reference inside the block, without gradient and without dropout.

    On exit, by an exception too, the adapters and the mode of every module are what they were on
    entry; ``requires_grad`` is never touched; blocks may be nested.

    Args:
        policy: a ``PeftModel``, bare or as accelerate prepared it. It is yielded again.

    Raises:
        ModelError: the model carries no adapter that can be switched.
    """
    model = unwrap(policy)
    before = _State.of(model)
    try:
        policy.eval()
        for switch, _, _ in before.switches:
            # The two flags that peft's layers read in forward. Its own enable_adapters() and
            # set_adapter() also rewrite requires_grad, unfreezing what the user had frozen.
            if REFERENCE in model.peft_config:
                switch._active_adapter, switch._disable_adapters = [REFERENCE], False
            else:
                switch._disable_adapters = True
        with torch.no_grad():
            yield policy
    finally:
        before.restore(policy)


@contextmanager
def acting(policy: nn.Module, name: str) -> Iterator[nn.Module]:
    """Make ``policy`` compute with one of its adapters inside the block, and what it was on exit.

    ``requires_grad`` is not touched; ``reference(policy)`` may be nested inside.

    Args:
        policy: a ``PeftModel``, bare or as accelerate prepared it. It is yielded again.
        name: of an adapter that it carries.

    Raises:
        ModelError: it carries no adapter of that name.
    """
    model = unwrap(policy)
    if name not in model.peft_config:
        raise ModelError(f"adapter {name!r}: not there; adapters: {', '.join(model.peft_config)}.")
    before = _State.of(model)
    try:
        for switch, _, _ in before.switches:
            switch._active_adapter, switch._disable_adapters = [name], False
        yield policy
    finally:
        before.restore(policy)


@dataclass(frozen=True)
class _State:
    """The flags of every adapter layer and the mode of every module."""

    switches: list[tuple[Any, Any, bool]]
    training: dict[nn.Module, bool]

    @classmethod
    def of(cls, model: PeftModel) -> _State:
        layers: list[Any] = [m for m in model.modules() if isinstance(m, Switch)]
        if not layers:
            raise ModelError("the policy has no adapter layer; give LoRA some target modules.")
        if any(getattr(layer, "merged", False) for layer in layers):
            raise ModelError(
                "the policy's adapters are merged into its base, so there is no reference any more; "
                "call policy.unmerge_adapter() first (exact only on an unquantised base)."
            )
        return cls(
            [(layer, layer.active_adapter, layer.disable_adapters) for layer in layers],
            {module: module.training for module in model.modules()},
        )

    def restore(self, policy: nn.Module) -> None:
        for switch, active, disabled in self.switches:
            switch._active_adapter, switch._disable_adapters = active, disabled
        # train() first: DoRA layers drop the norms that they kept in evaluation mode
        policy.train(any(self.training.values()))
        for module, training in self.training.items():
            module.training = training


def policy_adapter(policy: nn.Module) -> str:
    """Return the name of the one active adapter: the one that is trained.

    Raises:
        ModelError: several are active, or the active one is the frozen reference.
    """
    active = unwrap(policy).active_adapters
    if len(active) != 1 or active[0] == REFERENCE:
        raise ModelError(
            f"active adapters {active}: exactly one is trained, and {REFERENCE!r} is kept for the "
            "frozen starting point. Call policy.set_adapter(name) with one name."
        )
    name: str = active[0]
    return name


@contextmanager
def shaken(policy: nn.Module, std: float = 0.02) -> Iterator[None]:
    """Move the policy's adapters off their values inside the block: a fresh one hides errors."""
    model = unwrap(policy)
    name = policy_adapter(model)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    weights = [layer.lora_B[name].weight for layer in layers if name in layer.lora_B]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight) * std)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def describe_reference(policy: nn.Module) -> str:
    """Say in words what the reference of this policy is."""
    model = unwrap(policy)
    if REFERENCE in model.peft_config:
        return f"the starting adapter, frozen (adapter {REFERENCE!r} on the same base)"
    return "the base model with its adapters disabled"
