"""A policy without values: the real model code on fake tensors, to count bytes before any weight loads."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, masking_utils

from lora_dpo.engine import other_layers
from lora_dpo.layers import Work, attention


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' layer of that name: as many bytes, a plain weight when asked."""

    def __init__(self, plain: nn.Linear, bits: int, double: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.compute_dtype = plain.weight.dtype
        count = plain.weight.numel()
        packed = torch.empty(count * bits // 8, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        for number, size in enumerate(_scales(count, plain.out_features, bits, double)):
            self.register_buffer(f"scale{number}", torch.empty(size, dtype=torch.uint8))
        self.bias = plain.bias

    def plain(self) -> Tensor:
        """Return what dequantisation allocates."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute as bitsandbytes does: backward makes the weight plain again."""
        return _Dequantised.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class Linear8bitLt(Linear4bit):
    """The same for 8 bits; its name keeps the fast layers off it, as in a run."""


def _scales(count: int, outputs: int, bits: int, double: bool) -> tuple[int, ...]:
    """Return the bytes of the quantisation's own tensors."""
    if bits == 8:
        return (4 * outputs,)
    blocks = -(-count // 64)
    if not double:
        return 4 * blocks, 64
    return blocks, 4 * -(-blocks // 256), 64, 1024, 4


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.plain().to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.layer.plain().to(g.dtype), None


def plain_stand_in(layer: Any) -> Tensor:
    """Return what ``policy.plain_weight`` would, for layers of this module."""
    weight: Tensor = layer.plain() if isinstance(layer, Linear4bit) else layer.weight
    return weight


def imagined_policy(
    config: Any, lora: peft.LoraConfig, *, dtype: torch.dtype, quantisation: str, double: bool
) -> peft.PeftModel:
    """Return a policy of this architecture on fake tensors; call it inside a ``FakeTensorMode``."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if quantisation != "none":
            _quantise(model, 8 if quantisation == "int8" else 4, double)
        model.requires_grad_(False)
        own = copy.deepcopy(lora)  # peft resolves its targets in place
        own.inference_mode = False
        policy: Any = peft.get_peft_model(model, own)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _imagine(policy)
    return policy  # type: ignore[no-any-return]


def _imagine(policy: nn.Module) -> None:
    """Put a fake tensor in the place of each one without storage; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in policy.modules():
        tables: Any = (module._parameters, module._buffers)
        for table in tables:
            for name, value in table.items():
                if value is not None:
                    made.setdefault(id(value), _fake_like(value))
                    table[name] = made[id(value)]


def _fake_like(value: Tensor) -> Tensor:
    fake = torch.empty(value.shape, dtype=value.dtype)
    return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake


def _quantise(model: Any, bits: int, double: bool) -> None:
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                kind = Linear8bitLt if bits == 8 else Linear4bit
                setattr(parent, name, kind(child, bits, double))


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that are alive, as operations make them and Python drops them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def watch(self, value: Any) -> None:
        """Count a tensor's storage, once."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            self.watch(value)
        return out


@contextmanager
def imagining() -> Iterator[FakeTensorMode]:
    """Make tensors without values inside the block; real ones that enter lose theirs."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about names of theirs
        yield mode


class _AsToPadding(TorchFunctionMode):
    """Answers what the library asks of values: whether a mask marks no padding. Imagined ones have none."""

    def __init__(self, *, no_padding: bool) -> None:
        super().__init__()
        self.no_padding = no_padding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return self.no_padding
        return func(*args, **(kwargs or {}))


@contextmanager
def masks_as_of(*, no_padding: bool) -> Iterator[None]:
    """Let the library leave a mask out where it would see that no token is padding.

    It looks at the values of the padding mask, which imagined ones have not.
    """
    name = "_ignore_causal_mask_sdpa"
    original = getattr(masking_utils, name, None)
    with _AsToPadding(no_padding=no_padding):
        if not no_padding or original is None:  # another version: the plan counts the mask
            yield
            return
        setattr(masking_utils, name, lambda padding, *args, **kw: original(None, *args, **kw))
        try:
            yield
        finally:
            setattr(masking_utils, name, original)


@contextmanager
def keys_as_of(*, grouped: bool) -> Iterator[None]:
    """Let attention copy keys for each head, as it does on a card without a flash kernel for it."""
    original = attention._takes_groups
    if not grouped:
        attention._takes_groups = lambda *_: False
    try:
        yield
    finally:
        attention._takes_groups = original


def use_stand_ins(work: Work | None) -> None:
    """Let the fast layers of an imagined policy make its weights plain."""
    if work is not None:
        work.make_plain = plain_stand_in


def depths_of(architecture: Any) -> tuple[int, int]:
    """Return two depths between which bytes grow as they do in the whole: layers can be of several kinds."""
    text = architecture.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    if len({*kinds}) < 2 or not other_layers(text):  # attention costs as much with a window
        return 2, 3
    half = len(kinds) // 2
    periods = (p for p in range(2, half + 1) if kinds[p:] == kinds[:-p])
    period = next(periods, None)
    return (period, 2 * period) if period else (half, len(kinds))


def of_depth(architecture: Any, depth: int) -> Any:
    """Return a copy of a model's config with so many layers."""
    config = copy.deepcopy(architecture)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        with suppress(AttributeError):  # where they follow from the number (Bamba)
            text.layer_types = text.layer_types[:depth]
    config.use_cache = False
    return config
