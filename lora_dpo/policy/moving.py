"""A reference that follows the policy (TR-DPO): one more adapter on the same base, moved now and then.

The reference is ``base + D_ref``, the policy ``base + D``, with ``D = scaling * B @ A``. Three rules:

- ``hard``: the factors are copied, so the reference is the policy of that step, exactly.
- ``soft``: ``D_ref <- w * D + (1 - w) * D_ref``, on the products. The sum of two low-rank matrices has
  the sum of their ranks, so the reference's adapter has twice the policy's; the first move is exact,
  and later ones keep the largest singular values and report what they left out.
- ``factors``: ``A_ref <- w * A + (1 - w) * A_ref`` and the same for B. It keeps the rank, and is
  another thing: it differs from ``soft`` by ``w * (1 - w) * (B - B_ref) @ (A - A_ref)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dpo.errors import ModelError
from lora_dpo.policy.adapters import snapshot_reference
from lora_dpo.policy.bases import guard_cpu_kernels
from lora_dpo.policy.switching import REFERENCE, policy_adapter, unwrap

ReferenceUpdate = Literal["none", "hard", "soft", "factors"]
UPDATES: tuple[str, ...] = get_args(ReferenceUpdate)
MOVING_FILE = "moving_reference.safetensors"


def let_reference_move(policy: nn.Module, update: ReferenceUpdate) -> None:
    """Give the policy a reference of its own that can be moved; it is what the reference was.

    Raises:
        ModelError: DoRA adapters with another rule than ``hard``: their change is no product alone.
    """
    model = unwrap(policy)
    name = policy_adapter(model)
    config: Any = model.peft_config[name]
    if update != "hard" and config.use_dora:
        raise ModelError(
            f"train.reference_update is {update!r}, and the adapter is DoRA, whose change is no product "
            "of two factors; use hard."
        )
    if REFERENCE not in model.peft_config:
        snapshot_reference(model)  # of a fresh adapter: its B is 0, so this is the base
    held: Any = model.peft_config[REFERENCE]
    if update == "soft" and held.r == config.r:
        _widen(model, config)


def move_reference(policy: nn.Module, update: ReferenceUpdate, weight: float) -> float:
    """Move the reference to the policy; return the largest relative error of a layer's product.

    Args:
        policy: one whose reference can move.
        update: ``hard``, ``soft`` or ``factors``; the error is not 0 for ``soft`` alone.
        weight: of the policy, in (0, 1] (arXiv:2404.09656, Eq. 3); ``hard`` does not read it.
    """
    model = unwrap(policy)
    if update == "soft":
        return _move_products(model, weight)
    mine, fixed = (_state(model, name) for name in (policy_adapter(model), REFERENCE))
    share = 1.0 if update == "hard" else weight
    moved = {key: torch.lerp(fixed[key], mine[key], share) for key in mine}
    _set(model, mine if share == 1.0 else moved)
    return 0.0


def write_reference(policy: nn.Module, folder: Path) -> None:
    """Write the tensors of the reference into a checkpoint."""
    tensors = {key: value.contiguous() for key, value in _state(unwrap(policy), REFERENCE).items()}
    save_file(tensors, folder / MOVING_FILE)


def read_reference(policy: nn.Module, folder: Path) -> None:
    """Give the reference the tensors that ``write_reference`` wrote."""
    _set(unwrap(policy), load_file(folder / MOVING_FILE))


def _state(model: PeftModel, name: str) -> dict[str, Tensor]:
    found = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach() for key, value in found.items()}


def _set(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    # a copy each: the library may keep what it is given
    copies = {key: value.clone() for key, value in state.items()}
    peft.set_peft_model_state_dict(model, copies, adapter_name=REFERENCE)


def _widen(model: PeftModel, config: Any) -> None:
    """Replace the reference's adapter by one of twice the rank and scaling 1 with the same product."""
    products = {layer: _factors(layer, REFERENCE) for layer in _layers(model)}
    rank = 2 * max(int(layer.r[REFERENCE]) for layer in products)
    copies = {
        wrapper: {k: v.clone() for k, v in wrapper.modules_to_save[REFERENCE].state_dict().items()}
        for wrapper in _wrappers(model)
    }
    name = policy_adapter(model)
    model.delete_adapter(REFERENCE)
    wide = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        inference_mode=True,
    )
    model.add_adapter(REFERENCE, wide)
    model.set_adapter(name)
    guard_cpu_kernels(model)
    for layer, (down, up) in products.items():
        _assign(layer, down, up)
    for wrapper, state in copies.items():
        wrapper.modules_to_save[REFERENCE].load_state_dict(state)
    for key, parameter in model.named_parameters():
        if f".{REFERENCE}" in key:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()


def _move_products(model: PeftModel, weight: float) -> float:
    name = policy_adapter(model)
    errors = [0.0]
    with torch.no_grad():
        for layer in _layers(model):
            (down, up), (fixed_down, fixed_up) = _factors(layer, name), _factors(layer, REFERENCE)
            downs = torch.cat([down, fixed_down])  # [ranks, in]
            ups = torch.cat([weight * up, (1 - weight) * fixed_up], dim=1)  # [out, ranks]
            best_down, best_up, error = _truncated(downs, ups, int(layer.r[REFERENCE]))
            _assign(layer, best_down, best_up)
            errors.append(error)
        for wrapper in _wrappers(model):
            mine, fixed = (wrapper.modules_to_save[key] for key in (name, REFERENCE))
            for ours, theirs in zip(mine.parameters(), fixed.parameters(), strict=True):
                theirs.data.lerp_(ours.data.to(theirs.dtype), weight)
    return max(errors)


def _truncated(downs: Tensor, ups: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of ``ups @ downs`` of a rank, and the relative error in Frobenius norm."""
    left, left_core = torch.linalg.qr(ups)
    right, right_core = torch.linalg.qr(downs.T)
    u, sizes, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    whole = float(sizes.norm())
    error = float(sizes[kept:].norm()) / whole if whole else 0.0
    return root[:, None] * (v[:kept] @ right.T), (left @ u[:, :kept]) * root, error


def _layers(model: PeftModel) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LoraLayer) and REFERENCE in m.scaling]


def _wrappers(model: PeftModel) -> list[Any]:
    found = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return [m for m in found if REFERENCE in m.modules_to_save]


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return ``A [rank, in]`` and ``scaling * B [out, rank]`` of one adapter, float32."""
    if name in layer.lora_A:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return down.detach().float(), up.detach().float() * layer.scaling[name]


def _assign(layer: Any, down: Tensor, up: Tensor) -> None:
    """Give the reference's adapter, of scaling 1, these factors; rows beyond their rank become 0."""
    if REFERENCE in layer.lora_A:
        to_down, to_up = layer.lora_A[REFERENCE].weight, layer.lora_B[REFERENCE].weight
    else:
        to_down, to_up = layer.lora_embedding_A[REFERENCE], layer.lora_embedding_B[REFERENCE]
    for target in (to_down.data, to_up.data):
        target.zero_()
    to_down.data[: len(down)] = down.to(to_down.dtype)
    to_up.data[:, : up.shape[1]] = up.to(to_up.dtype)
