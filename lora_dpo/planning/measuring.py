"""How many bytes a step takes: measured on fake tensors, with the very code that will run.

A step is run on models of two and of three layers of the real width. Every part is affine in the number
of layers, so two depths give all of them; no weight is needed, only the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

import peft
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_dpo.engine import lay_out
from lora_dpo.forward import both_logps, completion_logps
from lora_dpo.layers import NAME, take, work_of
from lora_dpo.planning.imagined import (
    Ledger,
    Linear4bit,
    depths_of,
    imagined_policy,
    imagining,
    keys_as_of,
    masks_as_of,
    of_depth,
    use_stand_ins,
)
from lora_dpo.planning.operations import weights_at_work

Row = Mapping[str, Any]
GATHERED = 3  # layers whose dealt out weights are there at one time: that which runs, and the next on its way


@dataclass(frozen=True)
class Setting:
    """All that decides how many bytes a step takes, beside its rows.

    Args:
        architecture: the base's config.
        lora: peft's config of the adapters.
        dtype: of computation and of what is not quantised.
        quantisation: ``nf4``, ``fp4``, ``int8`` or ``none``.
        double: whether the quantisation's scales are quantised too.
        flat: rows end to end with shared prompts, or padded.
        fast: our layers, or the library's.
        skips_last: see ``layers.take``.
        keeps_weights: see ``layers.Work``.
        with_reference: whether the reference runs in training.
        chunk: positions whose logits exist at one time.
        optimiser: bytes of the optimiser's state for each trained weight.
        embeddings_on_cpu: whether the input embeddings are elsewhere.
        beside: frozen adapters that are the reference, in sizes of the trained one: 1 where training
            starts from one or the reference moves, 2 where it moves softly.
        shards: processes among which the quantised weights are dealt out.
        grouped: whether heads of attention share one of the keys without a copy of it for each, as
            all but cards without a flash kernel for these numbers do.
    """

    architecture: Any
    lora: peft.LoraConfig
    dtype: torch.dtype = torch.bfloat16
    quantisation: str = "nf4"
    double: bool = True
    flat: bool = True
    fast: bool = True
    skips_last: bool = True
    keeps_weights: bool = True
    with_reference: bool = True
    chunk: int = 256
    optimiser: float = 8.0
    embeddings_on_cpu: bool = False
    beside: float = 0.0
    shards: int = 1
    grouped: bool = True

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return int(self.architecture.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class Found:
    """Bytes of one step at one depth."""

    static: int  # weights, adapters included
    embeddings: int
    head: int
    adapters: int
    trained: int  # weights that are trained, counted, not bytes
    base: int  # weights of the base, counted
    linears: int  # those of ``operations.weights_at_work``
    last: int
    lora: int
    quantised: int
    kept: int  # what waits for backward at the end of the forward pass
    forward: int  # most beyond the static ones, in the forward pass
    peak: int  # in the whole step


@dataclass(frozen=True)
class Bytes:
    """Bytes of a step, by part; those of a layer hold for each one.

    Attributes:
        quantised: linear layers in 4 or 8 bits.
        unquantised: embeddings, head, norms, and linear layers that stay plain.
        adapters, gradients, optimiser: of what is trained.
        waiting: what waits for backward beside the layers (the head's gradients, positions).
        waiting_kept: the same where layers are not recomputed.
        recomputed: kept of a layer that is run again in backward.
        kept: kept of a layer that is not.
        head: most beyond what is kept when the forward pass ends.
        in_flight: most beyond what is kept while a recomputed layer runs backward.
        in_flight_kept: the same of a layer that is not recomputed.
        layers: how many there are.
        base, trained: weights of the base and trained ones, counted.
        linears, last, lora: weights that work on each token, as in ``operations.Shape``.
        crossing: of the input of a recomputed layer, where it waits in the memory of the CPU.
    """

    quantised: int
    unquantised: int
    embeddings: int
    head_weight: int
    adapters: int
    gradients: int
    optimiser: int
    waiting: int
    waiting_kept: int
    recomputed: int
    kept: int
    head: int
    in_flight: int
    in_flight_kept: int
    layers: int
    base: int
    trained: int
    linears: int
    last: int
    lora: int
    crossing: int = 0

    @property
    def static(self) -> int:
        """What is there all the time: weights, adapters, their gradients and optimiser state."""
        weights = self.quantised + self.unquantised + self.adapters
        return weights + self.gradients + self.optimiser

    def moments(self, recomputed: int, moved: int = 0) -> dict[str, dict[str, int]]:
        """Return the bytes beyond the static ones when most are there, by moment and by part.

        Args:
            recomputed: layers that are, the first ones.
            moved: layers behind them that wait in the memory of the CPU with all that they keep.
        """
        kept = self.layers - recomputed - moved
        checkpoints = {"checkpoints": recomputed * self.recomputed}
        waiting = {**checkpoints, "kept activations": kept * self.kept}
        waiting["beside the layers"] = self.waiting_kept if kept + moved else self.waiting
        found = {"the head": {**waiting, "head in flight": self.head}}
        if kept:
            found["a kept layer's backward"] = {**waiting, "layer in flight": self.in_flight_kept}
        if moved:  # it is back, and that before it on its way
            back = {"activations on their way": min(moved, 2) * self.kept}
            beside = {
                "beside the layers": self.waiting_kept,
                "layer in flight": self.in_flight_kept,
            }
            found["a moved layer's backward"] = {**checkpoints, **back, **beside}
        if recomputed:  # those that were kept have run backward by then
            beside = {"beside the layers": self.waiting, "layer in flight": self.in_flight}
            found["a recomputed layer's backward"] = {**checkpoints, **beside}
        if not self.gradients:
            found["the end of backward"] = {"gradients": 4 * self.trained}
        return found

    def at_the_peak(self, recomputed: int, moved: int = 0) -> tuple[str, dict[str, int]]:
        """Return the moment of ``moments`` that takes most, with its parts."""
        moments = self.moments(recomputed, moved)
        return max(moments.items(), key=lambda found: sum(found[1].values()))

    def activations(self, recomputed: int, moved: int = 0) -> int:
        """Most bytes beyond the static ones; arguments as in ``moments``."""
        return sum(self.at_the_peak(recomputed, moved)[1].values())

    def peak(self, recomputed: int | None = None, moved: int = 0) -> int:
        """Most bytes at one time in a step, with so many layers recomputed; all, if left out."""
        layers = self.layers if recomputed is None else recomputed
        return self.static + self.activations(layers, moved)

    def fewest_recomputed(self, room: int, least: int = 0) -> int | None:
        """Return how few layers must be recomputed to stay within ``room`` bytes; None: too many.

        Args:
            room: bytes.
            least: layers that are recomputed in any case.
        """
        return next((n for n in range(least, self.layers + 1) if self.peak(n) <= room), None)

    def fewest_moved(self, room: int, most: int, below: int) -> tuple[int, int] | None:
        """Return how many layers to recompute and to move, fewer recomputed than ``below``; None: none.

        Args:
            room: bytes on the device.
            most: bytes in the memory of the CPU.
            below: layers that are recomputed where none is moved.
        """
        most_layers = most // self.kept if self.kept else 0
        for recomputed in range(below):
            for moved in range(1, min(most_layers, self.layers - recomputed) + 1):
                if self.peak(recomputed, moved) <= room:
                    return recomputed, moved
        return None

    def sent(self, recomputed: int, moved: int) -> int:
        """Bytes that a micro-batch sends to the memory of the CPU, and has back."""
        return recomputed * self.crossing + moved * self.kept

    def offloaded(self) -> Bytes:
        """Return the same with the inputs of recomputed layers in the memory of the CPU.

        Two of them are on their way at any time, whether all layers are recomputed or some.
        """
        way = 2 * self.recomputed
        waiting, kept = self.waiting + way, self.waiting_kept + way
        further = {"recomputed": 0, "crossing": self.recomputed}
        return replace(self, waiting=waiting, waiting_kept=kept, **further)


def measure(
    setting: Setting,
    rows: Sequence[Row],
    *,
    accumulates: bool = True,
    recomputes: bool | None = None,
) -> Bytes:
    """Return the bytes of a step whose largest micro-batch is ``rows``.

    Args:
        setting: the model and how it runs.
        rows: tokenised rows of one micro-batch.
        accumulates: whether a step has several micro-batches, so that gradients of the earlier ones
            are there while the last one runs.
        recomputes: measure but one way, in half of the time: what is said of the other is not right.
    """
    small, large = depths = depths_of(setting.architecture)
    asked = _Asked(_told(setting, rows), setting, rows)
    ways = (True, False) if recomputes is None else (recomputes, recomputes)
    again, once = ({d: _run_once(asked, d, recomputes=way) for d in depths} for way in ways)

    def slope(name: str, found: dict[int, Found]) -> int:
        values = [getattr(found[depth], name) for depth in depths]
        return int((values[1] - values[0]) // (large - small))

    def at_depth(name: str) -> int:
        of_small = getattr(again[small], name)
        return int(of_small + slope(name, again) * (setting.layers - small))

    recomputed, kept = slope("kept", again), slope("kept", once)
    moved = again[small].embeddings if setting.embeddings_on_cpu else 0
    gradients = 4 * at_depth("trained") if accumulates else 0
    quantised, adapters = at_depth("quantised"), at_depth("adapters")
    gathered = GATHERED * slope("quantised", again) if setting.shards > 1 else 0
    frozen = int(adapters * setting.beside)
    return Bytes(
        quantised=quantised // setting.shards + gathered,
        unquantised=at_depth("static") - quantised - adapters - moved,
        embeddings=again[small].embeddings - moved,
        head_weight=again[small].head,
        adapters=adapters + frozen,
        gradients=gradients,
        optimiser=int(setting.optimiser * at_depth("trained")),
        waiting=again[small].kept - small * recomputed,
        waiting_kept=once[small].kept - small * kept,
        recomputed=recomputed,
        kept=kept,
        head=again[large].forward - again[large].kept,
        in_flight=again[large].peak - again[large].kept,
        in_flight_kept=once[large].peak - once[large].kept,
        layers=setting.layers,
        **{name: at_depth(name) for name in ("base", "trained", "linears", "last", "lora")},
    )


@dataclass(frozen=True)
class _Asked:
    """A setting and rows, equal to others by all that a run of them depends on."""

    told: str
    setting: Setting = field(compare=False)
    rows: Sequence[Row] = field(compare=False)


def _told(setting: Setting, rows: Sequence[Row]) -> str:
    others = {f.name: repr(getattr(setting, f.name)) for f in fields(setting)}
    others["architecture"] = setting.architecture.to_json_string(use_diff=False)
    lora: Any = setting.lora
    others |= {"lora": repr(lora.to_dict())}
    others |= {"attention": str(setting.architecture._attn_implementation)}
    # what is left to the sums, and to no run
    for name in ("optimiser", "beside", "shards", "embeddings_on_cpu"):
        del others[name]
    return repr((others, [{k: v for k, v in row.items() if k.endswith("_ids")} for row in rows]))


@lru_cache(maxsize=64)  # a plan tries one setting with other batches, optimisers and room
def _run_once(asked: _Asked, depth: int, *, recomputes: bool) -> Found:
    return run(asked.setting, asked.rows, depth, recomputes=recomputes)


def run(setting: Setting, rows: Sequence[Row], depth: int, *, recomputes: bool) -> Found:
    """Run one forward and backward pass on an imagined model of so many layers."""
    batch: Any = lay_out(rows, flat=setting.flat)
    no_padding = not setting.flat and bool(batch.attention_mask.all())
    as_it_runs = (masks_as_of(no_padding=no_padding), keys_as_of(grouped=setting.grouped))
    with imagining(), as_it_runs[0], as_it_runs[1]:
        policy = imagined_policy(
            of_depth(setting.architecture, depth),
            setting.lora,
            dtype=setting.dtype,
            quantisation=setting.quantisation,
            double=setting.double,
        ).train()
        weights = _weights(policy)
        _prepare(policy, setting, depth if recomputes else 0)
        ledger = Ledger()
        for tensor in [*policy.parameters(), *policy.buffers()]:
            ledger.watch(tensor)
        static = ledger.now
        ledger.peak = ledger.now
        half = setting.dtype != torch.float32
        with ledger, torch.autocast("cpu", setting.dtype) if half else nullcontext():
            if setting.with_reference:
                ours, theirs = both_logps(policy, batch, chunk=setting.chunk)
                loss = (ours - theirs).sum()
            else:
                loss = completion_logps(policy, batch, chunk=setting.chunk).sum()
            kept, forward = ledger.now - static, ledger.peak - static
            loss.backward()
        return Found(
            **weights,
            static=static,
            kept=kept,
            forward=forward,
            peak=ledger.peak - static,
        )


def _prepare(policy: Any, setting: Setting, recomputed: int) -> None:
    causal = policy.get_base_model()
    if setting.flat:
        causal.config._attn_implementation = NAME
    if setting.fast:
        take(policy, recomputed=recomputed, skips_last=setting.skips_last)
        work = work_of(causal)
        use_stand_ins(work)
        if work is not None:
            work.keeps_weights = setting.keeps_weights
    elif recomputed:
        causal._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        causal.enable_input_require_grads()


def _weights(policy: Any) -> dict[str, int]:
    causal = policy.get_base_model()
    trained = [p for p in policy.parameters() if p.requires_grad]
    embeddings, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    packed = [m for m in policy.modules() if isinstance(m, Linear4bit)]
    return {
        "embeddings": _bytes(embeddings),
        "head": 0 if head.weight is embeddings.weight else _bytes(head),
        "adapters": sum(p.nbytes for p in trained),
        "trained": sum(p.numel() for p in trained),
        "base": sum({k: n for m in causal.modules() for k, n in _counted(m).items()}.values()),
        "quantised": sum(_bytes(module) for module in packed),
        **weights_at_work(policy),
    }


def _counted(module: Any) -> dict[int, int]:
    """Count a module's own frozen weights, packed ones as what they stand for; shared ones once."""
    own = module.parameters(recurse=False)
    found = {id(p): p.numel() for p in own if not p.requires_grad}
    if isinstance(module, Linear4bit):
        found[id(module.weight)] = module.in_features * module.out_features
    return found


def _bytes(module: nn.Module) -> int:
    """Return the bytes that do not move; a copy that is trained (modules_to_save) is an adapter."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad)
