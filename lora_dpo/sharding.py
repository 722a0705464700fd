"""The base of a policy dealt out among processes: torch's FSDP2 on what is frozen, and on nothing else.

Each process keeps its share of the large frozen weights of the decoder layers, 4-bit bytes or floats; those
of a layer are gathered for as long as it runs, and again in backward. Adapters, norms, embeddings and head
are whole in every process, so all else is as without: DDP adds up gradients, checkpoints hold the adapter,
and the reference is the same weights with the adapters off. No number depends on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lora_dpo.config import Config
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.heads import causal_lm
from lora_dpo.layers import decoder_layers
from lora_dpo.policy import quant_state
from lora_dpo.ranks import processes, under_deepspeed


def check_sharding(config: Config, among: int) -> None:
    """Refuse a config whose base cannot be dealt out among so many processes, before its weights load.

    Raises:
        ConfigError: one process, or weights that cannot be gathered.
    """
    if not config.train.shard_base:
        return
    problems = []
    if among < 2:
        problems.append(
            "train.shard_base: one process alone needs the whole base; start several (torchrun "
            "--nproc_per_node N -m lora_dpo train ...; lora-dpo plan --cards N), or leave it out."
        )
    if under_deepspeed():
        problems.append(
            "train.shard_base: deals out the base by torch's FSDP2, not beside DeepSpeed; start with torchrun."
        )
    if config.model.quantisation == "int8":
        problems.append(
            "train.shard_base: 8-bit layers of bitsandbytes keep what they need beside their weights, "
            "which nothing gathers; set model.quantisation to nf4 or none."
        )
    if config.model.embeddings_on_cpu:
        problems.append(
            "train.shard_base: with model.embeddings_on_cpu it is not handled; leave one of the two out."
        )
    if problems:
        raise ConfigError(problems)


def shard_base(policy: nn.Module, device: torch.device | None = None) -> str:
    """Deal the frozen weights of a policy's decoder layers out among all processes, in place.

    Called by every process, with the same policy, before a trainer is made of it. From then on a forward
    pass waits for the other processes: all run as many of them, in the same order.

    Args:
        policy: from ``load_policy``, on the CPU where the base is larger than a card.
        device: where it is to compute; where it is, if left out.

    Returns:
        What was done, in a sentence.

    Raises:
        ModelError: one process alone, decoder layers that are not found, or 8-bit ones.
    """
    causal = causal_lm(policy)
    layers = decoder_layers(causal)
    parents = [m for m in causal.modules() if any(list(c) == layers for c in _lists(m))]
    if processes() < 2 or not layers or len(parents) != 1:
        why = "one process alone" if processes() < 2 else "its decoder layers are of their own kind"
        raise ModelError(f"shard_base: {type(causal).__name__} cannot be dealt out: {why}.")
    if any(type(module).__name__ == "Linear8bitLt" for module in causal.modules()):
        raise ModelError("shard_base: 8-bit layers cannot be dealt out; load the base in nf4.")
    if device is not None:
        _move_what_stays(causal, layers, device)
    whole = sum(p.nbytes for layer in layers for p in _large(layer))
    place = device or next(layers[0].parameters()).device
    mesh = init_device_mesh(place.type, (processes(),))
    for layer in layers:
        layer.to(place)  # one at a time: no card holds two of them whole
        for module in layer.modules():
            if type(module).__name__ == "Linear4bit":
                module.quant_state = quant_state(module)  # for the plain bytes that are gathered
        _deal_out(layer, _large(layer), mesh)
    _deal_out(parents[0], set(), mesh)  # fetches the next layer while one runs
    # DDP would send them to every process
    vars(policy)["_ddp_params_and_buffers_to_ignore"] = [
        name for name, p in policy.named_parameters() if isinstance(p, DTensor)
    ]
    own = sum(p.to_local().nbytes for p in causal.parameters() if isinstance(p, DTensor))
    return (
        f"base: {own / 2**20:,.1f} of {whole / 2**20:,.1f} MiB of its layers are in each of "
        f"{processes()} processes"
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether the base of a model is dealt out: a forward pass then needs every process."""
    return any(isinstance(module, FSDPModule) for module in causal_lm(model).modules())


def _deal_out(part: nn.Module, weights: set[nn.Parameter], mesh: DeviceMesh) -> None:
    others = {p for p in part.parameters() if p not in weights}
    fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=others)


def _large(layer: nn.Module) -> set[nn.Parameter]:
    """Return the frozen matrices of a layer, those of adapters left out."""
    return {
        weight
        for name, weight in layer.named_parameters()
        if weight.ndim > 1
        and not weight.requires_grad
        and not any(part.startswith("lora_") for part in name.split("."))
    }


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    return [child for child in module.children() if isinstance(child, nn.ModuleList)]


def _move_what_stays(causal: Any, layers: list[Any], device: torch.device) -> None:
    """Move all but the decoder layers; the libraries are told where the model is."""
    inside = {module for layer in layers for module in layer.modules()}
    for module in causal.modules():
        if module not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)
    if getattr(causal, "hf_device_map", None):
        causal.hf_device_map = {"": device}
