"""What the fast layers of one model share while a batch of ours runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.layers.offloading import Offload, link_of
from lora_dpo.policy import plain_weight


class Work:
    """The state of one model's fast layers; outside ``running`` they are the library's own.

    Attributes:
        recomputed: how many layers, from the first on, keep their input alone until backward.
        offloaded: whether these inputs wait in the memory of the CPU.
        moved: how many of the layers behind them wait there with all that backward needs of them.
        fusable: whether policy and reference can run together, layer by layer.
        skips_last: whether a recomputation leaves out the last projection of an MLP.
        keeps_weights: whether a layer's plain weights wait for their second use, which costs their
            bytes (of one layer at a time) and spares half of the dequantisations.
        random: whether something in the model draws, as LoRA dropout does.
        layers: the decoder layers, in order.
        taken: the modules whose forward is ours, these among them.
        off: whether batches of ours too go through the library's layers.
        make_plain: returns a linear layer's weight as floats.
        dequantised: how often each weight was made plain, for tests and benchmarks.
    """

    def __init__(self) -> None:
        self.recomputed = 0
        self.offloaded = False
        self.moved = 0
        self.fusable = False
        self.skips_last = False
        self.keeps_weights = True
        self.random = False
        self.layers: list[Any] = []
        self.taken: list[nn.Module] = []
        self.make_plain: Callable[[Any], Tensor] = plain_weight
        self.dequantised: Counter[nn.Module] = Counter()
        self.off = False
        self.running = False
        self.recomputing = False
        self.as_reference = False
        self.fused = False
        self.reference_state: Tensor | None = (
            None  # of the layer that runs, ``[rows, time, hidden]``
        )
        self._weights: dict[nn.Module, Tensor] | None = None
        self._offload: Offload | None = None  # of the batch that runs

    def weight(self, linear: nn.Module) -> Tensor:
        """Return a linear layer's weight as plain floats, made once where it is needed twice."""
        if self._weights is not None and linear in self._weights:
            return self._weights[linear]
        weight = self.make_plain(linear)
        self.dequantised[linear] += 1
        if self._weights is not None:
            self._weights[linear] = weight
        return weight

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Within a batch of ours the layers are ours, unless they are off.

        Recomputation that somebody has asked the library for since is done by them from then on; older
        versions of the library (5.17) would wrap it around them.
        """
        if not self.off:
            for number, layer in enumerate(self.layers, start=1):
                if layer.gradient_checkpointing:
                    self.recomputed = max(self.recomputed, number)
                    layer.gradient_checkpointing = False
        with self.turned(running=not self.off, _offload=None):
            try:
                yield
            finally:  # the last layers, and those of a pass that failed
                self.passed()
                self.passed()

    def offload(self, device: torch.device) -> Offload:
        """Return what of this batch waits in the memory of the CPU."""
        if self._offload is None:
            self._offload = Offload(link_of(device), device)
        return self._offload

    def passed(self) -> None:
        """Behind the forward pass of each layer: what was sent before it is let go."""
        if self._offload is not None:
            self._offload.passed()

    @contextmanager
    def keeping_weights(self) -> Iterator[None]:
        """Within one layer: weights that are made plain stay so until the end of the outermost block."""
        if self._weights is not None or not self.keeps_weights:
            yield
            return
        self._weights = {}
        try:
            yield
        finally:
            self._weights = None

    @contextmanager
    def turned(self, **flags: Any) -> Iterator[None]:
        """Set attributes for the time of the block."""
        before = {name: getattr(self, name) for name in flags}
        vars(self).update(flags)
        try:
            yield
        finally:
            vars(self).update(before)
