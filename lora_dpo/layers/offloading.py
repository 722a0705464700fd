"""What backward needs of a layer, waiting in the memory of the CPU and back on the card before its turn.

Copies run beside the computation, on a stream of their own. Two orders keep them right, and neither makes
the CPU wait: a copy begins behind what the computation had queued by then, and the computation goes on
behind a copy before it reads what came back or gives away what was sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SMALL = 2**20  # bytes below which a tensor stays: it takes longer to begin a copy than to hold it


class Link(Protocol):
    """The way between a device and the memory of the CPU; tensors are plain bytes, ``[n]`` of uint8."""

    def send(self, source: Tensor) -> tuple[Any, Any]:
        """Begin to copy bytes of the device; return what holds the copy, and its end to ``wait`` for.

        The caller keeps ``source`` until it has waited.
        """

    def fetch(self, held: Any) -> tuple[Tensor, Any]:
        """Begin to copy them back; return the bytes on the device, and the end to ``wait`` for."""

    def wait(self, end: Any) -> None:
        """Let what the device is given from now on begin behind a copy."""


class CardLink:
    """A stream of copies to and from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, torch.cuda.Stream(device)

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        """See ``Link``."""
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            held = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            held.copy_(source, non_blocking=True)
            return held, self.copies.record_event()

    def fetch(self, held: Tensor) -> tuple[Tensor, Any]:
        """See ``Link``."""
        back = torch.empty(held.shape, dtype=held.dtype, device=self.device)
        # its memory may be what the computation queued before has yet to read
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            back.copy_(held, non_blocking=True)
            end = self.copies.record_event()
        back.record_stream(
            self.copies
        )  # should a pass that failed give it away before its copy ends
        return back, end

    def wait(self, end: Any) -> None:
        """See ``Link``."""
        torch.cuda.current_stream(self.device).wait_event(end)


class NoLink:
    """Where the device is the CPU: a copy in the same memory."""

    def send(self, source: Tensor) -> tuple[Tensor, None]:
        """See ``Link``."""
        return source.clone(), None

    def fetch(self, held: Tensor) -> tuple[Tensor, None]:
        """See ``Link``."""
        return held.clone(), None

    def wait(self, end: Any) -> None:
        """See ``Link``."""


@lru_cache
def link_of(device: torch.device) -> Link:
    """Return the way between a device and the memory of the CPU."""
    return CardLink(device) if device.type == "cuda" else NoLink()


@dataclass
class _Sent:
    held: Any
    end: Any
    source: Tensor | None  # until the computation has waited for the copy
    saved: int = 0  # times that autograd saved a view of it
    due: int = 0  # of which it has yet to ask for so many


@dataclass(frozen=True)
class _View:
    """A tensor by the storage that it is a view of."""

    key: int
    dtype: torch.dtype
    place: tuple[Any, ...]  # offset, size and stride


@dataclass
class _Layer:
    """What autograd saved of one layer: storages that were sent, each once, and those that are back."""

    link: Link
    stays: set[int]
    before: _Layer | None
    sent: dict[int, _Sent] = field(default_factory=dict)
    back: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    asked: bool = False

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if isinstance(tensor, nn.Parameter) or key in self.stays or storage.nbytes() < SMALL:
            return tensor
        if key not in self.sent:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self.sent[key] = _Sent(*self.link.send(source), source)
        self.sent[key].saved += 1
        self.sent[key].due += 1
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return _View(key, tensor.dtype, place)

    def unpack(self, found: Any) -> Tensor:
        if not isinstance(found, _View):
            return found  # type: ignore[no-any-return]
        self.fetch()
        if self.before is not None:
            self.before.fetch()  # on its way while this layer runs backward
        sent = self.sent[found.key]
        if found.key not in self.back:  # a graph that is gone through again
            sent.due = sent.saved
            self._fetch(found.key)
        bytes_, end = self.back[found.key]
        self.link.wait(end)
        sent.due -= 1
        if sent.due == 0:
            del self.back[found.key]
        view = torch.empty(0, dtype=found.dtype, device=bytes_.device)
        return view.set_(bytes_.untyped_storage(), *found.place)

    def fetch(self) -> None:
        """Begin to copy everything back, once."""
        if not self.asked:
            self.asked = True
            for key in reversed(self.sent):  # backward begins with what was saved last
                self._fetch(key)

    def _fetch(self, key: int) -> None:
        self.let_go()
        self.back[key] = self.link.fetch(self.sent[key].held)

    def let_go(self) -> None:
        """Let the computation go on behind the copies, and give away what was sent."""
        for sent in self.sent.values():
            if sent.source is not None:
                self.link.wait(sent.end)
                sent.source = None


class Offload:
    """What of one batch waits in the memory of the CPU, layer by layer.

    Args:
        link: the way there.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._last: _Layer | None = None
        self._fresh: _Layer | None = None  # the layer that runs, or has just run
        self._leaving: _Layer | None = None  # the one before it

    @contextmanager
    def layer(self, stays: Iterable[Any] = ()) -> Iterator[None]:
        """Send what autograd saves inside the block, but for parameters, ``stays`` and what is small."""
        keys = {value.untyped_storage()._cdata for value in stays if isinstance(value, Tensor)}
        self._last = self._fresh = _Layer(self.link, keys, self._last)
        hooks = self._last.pack, self._last.unpack
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            yield

    def passed(self) -> None:
        """Behind the forward pass of each layer: what was sent before it is given away."""
        if self._leaving is not None:
            self._leaving.let_go()
        self._leaving, self._fresh = self._fresh, None
