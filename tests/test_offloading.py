"""Activations that wait in the memory of the CPU: no number changes, whenever the copies run.

A card's copies run beside its computation. Here their link is a queue whose copies run as early as they
may, or as late: not before something waits for them. What a wait forgets would be read as no number, and
what is given away before its copy is found missing. This says nothing of a card's own streams.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_pairs, flat_pairs
from lora_dpo.engine import choose_engine
from lora_dpo.forward import both_logps
from lora_dpo.layers import decoder_layers, offloading, work
from lora_dpo.planning.imagined import Ledger
from lora_dpo.policy import load_policy
from tests.helpers import fast_work, move_adapter
from tests.test_engine import ROWS, SHAPES, _gradient, _model

LAYERS = 4
NAN = 255  # every byte of it: no number in any floating-point format


class Queue:
    """A link whose copies run in order, at once or when they are waited for.

    Attributes:
        sent: bytes, in all.
        copies: what was done, in order: ``send`` or ``fetch``.
        sources: where what was sent stood.
    """

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.queue: deque[tuple[int, Any]] = deque()
        self.count = self.sent = self.waited = 0
        self.copies: list[str] = []
        self.on_their_way: list[int] = []
        self.sources: set[int] = set()

    def _add(self, copy: Any) -> int:
        self.count += 1
        self.queue.append((self.count, copy))
        self.on_their_way.append(len(self.queue))
        if not self.late:
            self.wait(self.count)
        return self.count

    def send(self, source: Tensor) -> tuple[Any, int]:
        assert source.dtype == torch.uint8 and source.dim() == 1
        held = np.full(source.numel(), NAN, dtype=np.uint8)  # no tensor: not memory of the device
        there = weakref.ref(source)

        def copy() -> None:
            tensor = there()
            assert tensor is not None, "given away before it was copied"
            held[:] = tensor.numpy()

        self.sent += held.nbytes
        self.sources.add(source.data_ptr())
        self.copies.append("send")
        return held, self._add(copy)

    def fetch(self, held: Any) -> tuple[Tensor, int]:
        back = torch.full((held.nbytes,), NAN, dtype=torch.uint8)
        there = weakref.ref(back.untyped_storage())

        def copy() -> None:
            storage = there()
            if storage is not None:  # else nobody reads it any more
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(torch.from_numpy(held))

        self.copies.append("fetch")
        return back, self._add(copy)

    def wait(self, end: int) -> None:
        self.waited += 1
        while self.queue and self.queue[0][0] <= end:
            self.queue.popleft()[1]()


@pytest.fixture(params=["early", "late"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    queue = Queue(late=request.param == "late")
    monkeypatch.setattr(work, "link_of", lambda device: queue)
    monkeypatch.setattr(offloading, "SMALL", 0)
    yield queue
    assert queue.count


def _policy(kind: str = "llama", **lora: Any) -> PeftModel:
    model = _model(kind, num_hidden_layers=LAYERS)
    policy = load_policy(model, lora=LoraConfig(rank=4, **lora)).train()
    move_adapter(policy)
    choose_engine(policy, ROWS, 9, "auto", chunk=64)
    return policy


WAYS = [  # layers that are recomputed, those whose inputs wait, those that wait whole
    (0, False, LAYERS), (0, False, 1), (1, False, 2), (2, True, 1), (LAYERS, True, 0), (1, True, 3),
]  # fmt: skip


@pytest.mark.parametrize(("recomputed", "offloaded", "moved"), WAYS)
@pytest.mark.parametrize("flat", [True, False])
def test_layers_that_wait_elsewhere_change_no_bit(
    link: Queue, recomputed: int, offloaded: bool, moved: int, flat: bool
) -> None:
    policy = _policy()
    state = fast_work(policy)
    if not flat:
        policy.get_base_model().config._attn_implementation = "sdpa"
    batch: Any = flat_pairs(ROWS) if flat else collate_pairs(ROWS, pad_id=0)
    results = []
    for way in ((recomputed, False, 0), (recomputed, offloaded, moved)):
        state.recomputed, state.offloaded, state.moved = way
        ours, theirs = both_logps(policy, batch, chunk=64)
        results.append((ours.detach(), theirs, _gradient(policy, ours)))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
    # what is sent comes back once, and while a layer runs that before it is on its way
    assert link.copies.count("send") == link.copies.count("fetch")
    assert not (recomputed + moved > 1 and link.late) or max(link.on_their_way) > 1


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_model_gives_the_same_bits(link: Queue, kind: str) -> None:
    policy = _policy(kind)
    state, found = fast_work(policy), []
    flat = policy.get_base_model().config._attn_implementation != "sdpa" and kind != "gemma2"
    batch: Any = flat_pairs(ROWS) if flat else collate_pairs(ROWS, pad_id=0)
    for moved in (0, LAYERS - 1):
        state.recomputed, state.moved = 0, moved
        ours, _ = both_logps(policy, batch, chunk=64)
        found.append(_gradient(policy, ours))
    assert torch.equal(*found)


def test_several_batches_before_a_backward_pass_and_three_passes_through_one_graph(
    link: Queue,
) -> None:
    policy = _policy()
    state = fast_work(policy)
    batches = [flat_pairs(ROWS[:2]), flat_pairs(ROWS[2:])]
    found = []
    for moved in (0, LAYERS):
        state.recomputed, state.moved = 0, moved
        total = sum(both_logps(policy, batch, chunk=64)[0].sum() for batch in batches)
        assert isinstance(total, Tensor)
        for keeps in (True, True, False):
            policy.zero_grad()
            total.backward(retain_graph=keeps)
            found.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    first, *others = found
    # each pass has everything back once, and keeps none of it for the next
    assert link.copies.count("fetch") == 3 * link.copies.count("send")
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


def test_dropout_and_what_else_is_left_to_the_library_waits_too(link: Queue) -> None:
    policy = _policy(dropout=0.3)
    state, found = fast_work(policy), []
    for moved in (0, LAYERS):
        state.recomputed, state.moved = 0, moved
        torch.manual_seed(3)
        found.append(_gradient(policy, both_logps(policy, flat_pairs(ROWS), chunk=64)[0]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4, targets=["q_proj", "v_proj"]),
        LoraConfig(rank=4, dropout=0.3),
        LoraConfig(rank=4, targets=["q_proj"], modules_to_save=["mlp"]),
    ],
)
def test_no_weight_is_sent_and_nothing_that_stands_elsewhere(link: Queue, lora: LoraConfig) -> None:
    """A frozen linear layer of the library saves a view of its weight, which is no parameter itself."""
    model = _model("llama", num_hidden_layers=LAYERS)
    policy = load_policy(model, lora=lora, quantisation="none").train()
    choose_engine(policy, ROWS, 9, "auto", chunk=64)
    state = fast_work(policy)
    state.recomputed, state.moved = 0, LAYERS
    _gradient(policy, both_logps(policy, flat_pairs(ROWS), chunk=64)[0])
    weights = {tensor.data_ptr() for tensor in [*policy.parameters(), *policy.buffers()]}
    assert link.sources and not link.sources & weights
    offload = offloading.Offload(link, torch.device("meta"))
    before, x = len(link.copies), torch.rand(64, requires_grad=True)
    with offload.layer():
        out = (x * torch.rand(64)).sum()
    out.backward()  # type: ignore[no-untyped-call]
    assert len(link.copies) == before


def test_what_is_changed_in_place_between_two_saves_crosses_as_both(link: Queue) -> None:
    offload = offloading.Offload(link, torch.device("cpu"))
    x, y = (torch.rand(8, requires_grad=True) for _ in range(2))
    factor = torch.full((8,), 2.0)
    with offload.layer():
        first = (x * factor).sum()
        offload.passed()
        offload.passed()  # the first copy has been made
        factor.mul_(3)
        second = (y * factor).sum()
    (first + second).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and y.grad is not None
    assert set(x.grad.tolist()) == {2.0} and set(y.grad.tolist()) == {6.0}


def test_two_layers_at_most_are_on_the_device_however_many_wait(link: Queue) -> None:
    policy = _policy()
    state = fast_work(policy)
    batch = flat_pairs(ROWS * 4)

    def peak(moved: int) -> tuple[int, int]:
        state.recomputed, state.moved = 0, moved
        ledger = Ledger()
        for tensor in [*policy.parameters(), *policy.buffers()]:
            ledger.watch(tensor)
        before = ledger.now
        with ledger:
            values = both_logps(policy, batch, chunk=64)[0]
            kept = ledger.now - before
            values.sum().backward()
        policy.zero_grad()
        return kept, ledger.peak - before

    kept, peaks = zip(*map(peak, range(LAYERS + 1)), strict=True)
    layer = kept[1] - kept[2]
    assert layer > 0
    # behind the forward pass nothing of them is there
    assert [a - b for a, b in pairwise(kept[1:])] == [layer] * (LAYERS - 1)
    assert peaks[LAYERS] < peaks[0] - (LAYERS - 3) * layer
    assert peaks[LAYERS] == peaks[LAYERS - 1]  # the layer in flight and that before it


def test_what_is_small_or_of_all_layers_or_a_parameter_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = Queue(late=True)
    monkeypatch.setattr(offloading, "SMALL", 100)
    offload = offloading.Offload(queue, torch.device("cpu"))
    weight = torch.nn.Parameter(torch.rand(64))
    shared, small, large = torch.rand(64), torch.rand(8), torch.rand(64)
    x = torch.rand(64, requires_grad=True)
    with offload.layer([shared]):
        out = (x * shared).sum() + (x[:8] * small).sum() + (x * large).sum() + (x * weight).sum()
    del large
    offload.passed()
    # x stands in one product whose other factor is trained; it is sent once, and so is ``large``
    assert queue.copies == ["send"] * 2 and queue.sent == 2 * 64 * 4
    expected = torch.autograd.grad((x * shared).sum() + (x * weight).sum(), [x, weight])
    found = torch.autograd.grad(out, [x, weight])
    torch.testing.assert_close(found[1], expected[1])
    assert torch.isfinite(found[0]).all()


def test_views_of_one_storage_cross_once_with_their_strides() -> None:
    queue = Queue(late=False)
    offload = offloading.Offload(queue, torch.device("cpu"))
    whole = torch.rand(6, 8)
    turned, part = whole.t()[2:5], whole[1:4, ::2].expand(3, 4)
    saved: list[Tensor] = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(turned, part)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            saved.extend(ctx.saved_tensors)
            return g

    x = torch.rand(1, requires_grad=True)
    before, offloading.SMALL = offloading.SMALL, 0
    try:
        with offload.layer():
            out = Keep.apply(x)
    finally:
        offloading.SMALL = before
    out.backward()  # type: ignore[no-untyped-call]
    assert queue.copies == ["send", "fetch"]
    for found, expected in zip(saved, (turned, part), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_a_step_that_fails_on_its_way_leaves_nothing_for_the_next(
    tiny_model: Path, link: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy()
    state = fast_work(policy)
    state.recomputed, state.moved = 0, LAYERS
    batch = flat_pairs(ROWS)
    expected = _gradient(policy, both_logps(policy, batch, chunk=64)[0])
    last = decoder_layers(policy.get_base_model())[-1]
    forward = last.mlp.forward

    def fails(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    last.mlp.forward = fails
    with pytest.raises(torch.OutOfMemoryError):
        both_logps(policy, batch, chunk=64)
    last.mlp.forward = forward
    assert torch.equal(_gradient(policy, both_logps(policy, batch, chunk=64)[0]), expected)


class _Stream:
    """A stream that does everything at once."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self) -> None:
        pass


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 100])
def test_a_cards_link_cuts_bytes_into_pieces_and_uses_them_again(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic of the pieces alone: what streams do is for a card to show."""
    made: list[Tensor] = []

    def pinned(size: int) -> Tensor:
        made.append(torch.zeros(size, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(offloading, "PIECE", 16)
    monkeypatch.setattr(offloading, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    link = offloading.CardLink(torch.device("cpu"))
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(3)]
    held = [link.send(source)[0] for source in sources]
    pieces = -(-size // 16)
    assert len(made) == 3 * pieces and not link.free
    assert all(torch.equal(link.fetch(h)[0], s) for h, s in zip(held, sources, strict=True))
    del held
    assert len(link.free) == 3 * pieces
    again, _ = link.send(sources[0])
    assert len(made) == 3 * pieces and len(link.free) == 2 * pieces
    assert torch.equal(link.fetch(again)[0], sources[0])
