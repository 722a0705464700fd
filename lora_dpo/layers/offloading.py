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
PIECE = 2**23  # bytes of pinned memory

Key = tuple[int, int]  # a storage, and how often it was changed in place


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


def pinned(size: int) -> Tensor:
    """Return so many bytes of the CPU's memory that a card reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class CardLink:
    """A stream of copies to and from pinned memory.

    Pinned memory is taken in pieces of one size, which torch gives out without rounding them up, and used
    again for whatever comes next. All that reads or writes a piece runs in this one stream, in order, so
    that a piece can be given to the next tensor as soon as the copy that reads it last is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, torch.cuda.Stream(device)
        self.free: list[Tensor] = []

    def send(self, source: Tensor) -> tuple[_Pieces, Any]:
        """See ``Link``."""
        held = _Pieces(self, len(source))
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            for piece, part in zip(held.pieces, source.split(PIECE), strict=True):
                piece[: len(part)].copy_(part, non_blocking=True)
            return held, self.copies.record_event()

    def fetch(self, held: _Pieces) -> tuple[Tensor, Any]:
        """See ``Link``."""
        back = torch.empty(held.size, dtype=torch.uint8, device=self.device)
        # its memory may be what the computation queued before has yet to read
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            for piece, part in zip(held.pieces, back.split(PIECE), strict=True):
                part.copy_(piece[: len(part)], non_blocking=True)
            return back, self.copies.record_event()

    def wait(self, end: Any) -> None:
        """See ``Link``."""
        torch.cuda.current_stream(self.device).wait_event(end)


class _Pieces:
    """Pinned memory of so many bytes, which goes back to its link when nobody holds it."""

    def __init__(self, link: CardLink, size: int) -> None:
        self.link, self.size = link, size
        count = -(-size // PIECE)
        self.pieces = [link.free.pop() for _ in range(min(count, len(link.free)))]
        while len(self.pieces) < count:
            self.pieces.append(pinned(PIECE))

    def __del__(self) -> None:
        self.link.free += self.pieces


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


def has_link(device: torch.device) -> bool:
    """Whether the memory of the CPU is another one than the device's."""
    return device.type == "cuda"


@lru_cache
def link_of(device: torch.device) -> Link:
    """Return the way between a device and the memory of the CPU."""
    return CardLink(device) if has_link(device) else NoLink()


def release(device: torch.device) -> None:
    """Give the pinned memory of a device's link, of which nothing is in use, back to the machine."""
    if not has_link(device):
        return
    link: Any = link_of(device)
    link.free.clear()
    newer = getattr(torch.accelerator, "empty_host_cache", None)  # since torch 2.13
    empty = newer or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


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

    key: Key
    dtype: torch.dtype
    place: tuple[Any, ...]  # offset, size and stride


@dataclass
class _Layer:
    """What autograd saved of one layer: storages that were sent, each once, and those that are back."""

    link: Link
    device: torch.device
    stays: set[int]
    before: _Layer | None
    sent: dict[Key, _Sent] = field(default_factory=dict)
    back: dict[Key, tuple[Tensor, Any]] = field(default_factory=dict)
    asked: bool = False

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        stays = isinstance(tensor, nn.Parameter) or storage._cdata in self.stays
        if stays or storage.nbytes() < SMALL or tensor.device != self.device:
            return tensor
        key = (
            storage._cdata,
            tensor._version,
        )  # as long as its source is held, no other has this number
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

    def _fetch(self, key: Key) -> None:
        self.back[key] = self.link.fetch(self.sent[key].held)

    def let_go(self) -> None:
        """Let the computation go on behind the copies, and give away what was sent."""
        for sent in self.sent.values():
            if sent.source is not None:
                self.link.wait(sent.end)
                sent.source = None

    def __del__(self) -> None:
        for _, end in self.back.values():  # of a pass that failed: its memory is given away now
            self.link.wait(end)


class Offload:
    """What of one batch waits in the memory of the CPU, layer by layer.

    Args:
        link: the way there.
        device: what stands on another one stays where it is.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link, self.device = link, device
        self._last: _Layer | None = None
        self._fresh: _Layer | None = None  # the layer that runs, or has just run
        self._leaving: _Layer | None = None  # the one before it

    @contextmanager
    def layer(self, stays: Iterable[Any] = ()) -> Iterator[None]:
        """Send what autograd saves inside the block, but for ``stays`` and what is small."""
        keys = {value.untyped_storage()._cdata for value in stays if isinstance(value, Tensor)}
        self._last = self._fresh = _Layer(self.link, self.device, keys, self._last)
        hooks = self._last.pack, self._last.unpack
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            yield

    def passed(self) -> None:
        """Behind the forward pass of each layer: what was sent before it is given away."""
        if self._leaving is not None:
            self._leaving.let_go()
        self._leaving, self._fresh = self._fresh, None
