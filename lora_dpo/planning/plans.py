"""The plan of a run: bytes by part, how much is recomputed, time at a card's full rate, remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_dpo.planning.cards import GIB, Card
from lora_dpo.planning.lengths import Lengths, largest_micro_batch
from lora_dpo.planning.measuring import Bytes, Setting, measure
from lora_dpo.showing import Told
from lora_dpo.stepping import Batches, batch_tokens, laid_tokens

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Remedy:
    """A change that takes less memory: the setting, the bytes that it spares, and what it costs."""

    change: str
    spared: int
    cost: str

    def __str__(self) -> str:
        return f"{self.change}: {self.spared / GIB:.2f} GiB less; {self.cost}"


@dataclass(frozen=True, repr=False)
class Plan(Told):
    """What a run will take.

    Attributes:
        bytes: by part.
        setting: of the model.
        batches: of the data.
        lengths: of the rows.
        room: bytes that it may take; None where nothing limits it.
        room_is: what limits it, in words.
        recomputed: layers that are recomputed, the first ones.
        offloaded: whether their inputs wait in the memory of the CPU.
        seconds: of an optimiser step at the full rate of the card: a floor, not an estimate; None
            where no rate is known.
        remedies: what to change, the cheapest first, where it does not fit.
    """

    bytes: Bytes
    setting: Setting
    batches: Batches
    lengths: Lengths
    room: int | None
    room_is: str
    recomputed: int
    offloaded: bool = False
    seconds: float | None = None
    remedies: tuple[Remedy, ...] = ()

    @property
    def title(self) -> str:
        """The peak, how it is reached, and whether it fits."""
        how = f"peak {self.peak / GIB:.2f} GiB, {self.recomputed} of {self.bytes.layers} layers recomputed"
        fits = {None: "", True: f", fits {self.room_is}", False: f", does NOT fit {self.room_is}"}
        return how + fits[self.fits]

    @property
    def peak(self) -> int:
        """Predicted most bytes of tensors at one time."""
        return self.bytes.peak(self.recomputed)

    @property
    def fits(self) -> bool | None:
        """Whether the peak stays within the room; None where there is no limit."""
        return None if self.room is None else self.peak <= self.room

    def parts(self) -> dict[str, int]:
        """Return the bytes of the peak by part."""
        b = self.bytes
        waiting = b.waiting_kept if self.recomputed < b.layers else b.waiting
        kept = self.recomputed * b.recomputed + (b.layers - self.recomputed) * b.kept
        return {
            "quantised weights": b.quantised,
            "embeddings": b.embeddings,
            "head": b.head_weight,
            "other weights": b.unquantised - b.embeddings - b.head_weight,
            "adapters": b.adapters,
            "gradients": b.gradients,
            "optimiser": b.optimiser,
            "kept for backward": waiting + kept,
            "in flight at the peak": self.peak - b.static - waiting - kept,
        }

    def lines(self) -> list[str]:
        """Return the plan in sentences."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items() if size)
        layers = f"{self.recomputed} of {self.bytes.layers} layers recomputed"
        layers += " from inputs in the memory of the CPU" if self.offloaded else ""
        found = [
            f"data: {self.lengths.line()}",
            f"plan: peak {self.peak / GIB:.2f} GiB of tensors with {layers}",
            f"plan, GiB: {parts}",
        ]
        if self.seconds is not None:
            found.append(
                f"plan: a step takes at least {self.seconds:.2f} s (every operation at the card's "
                "full rate)"
            )
        if self.fits is not None:
            verdict = "fits" if self.fits else "does NOT fit"
            found.append(f"plan: {verdict} into {self.room_is}, {(self.room or 0) / GIB:.2f} GiB")
        return [*found, *(f"  {remedy}" for remedy in self.remedies)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "peak_bytes": self.peak,
            "parts": self.parts(),
            "layers": self.bytes.layers,
            "recomputed_layers": self.recomputed,
            "offloaded": self.offloaded,
            "lengths": asdict(self.lengths),
            "room_bytes": self.room,
            "room_is": self.room_is,
            "fits": self.fits,
            "seconds_floor": self.seconds,
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }


def make_plan(
    setting: Setting,
    rows: Sequence[Row],
    batches: Batches,
    *,
    room: int | None = None,
    room_is: str = "the memory",
    recompute: bool = True,
    card: Card | None = None,
    remedies: bool = True,
) -> Plan:
    """Measure a step on fake tensors and decide how many layers are recomputed.

    Args:
        setting: the model and how it runs.
        rows: tokenised rows.
        batches: how rows become steps.
        room, room_is: bytes that it may take, and what limits it.
        recompute: whether layers may be recomputed: as few as fit; all where nothing limits it.
        card: whose rates the time is computed with.
        remedies: whether to look for them where it does not fit.
    """
    largest = largest_micro_batch(rows, batches, flat=setting.flat)
    accumulates = batches.accumulated > 1
    found = measure(setting, largest, accumulates=accumulates)
    layers, offloaded = found.layers if recompute else 0, False
    if room is not None and recompute:
        fewest = found.fewest_recomputed(room)
        if fewest is None and setting.fast and setting.keeps_weights:
            # a layer's plain weights are made again for their second use
            setting = replace(setting, keeps_weights=False)
            found = measure(setting, largest, accumulates=accumulates)
            fewest = found.fewest_recomputed(room)
        if fewest is None and setting.fast and card is not None:
            # the inputs of layers wait in the CPU's memory; two of them are on their way
            found = replace(found, waiting=found.waiting + 2 * found.recomputed, recomputed=0)
            offloaded, fewest = True, found.fewest_recomputed(room)
        if fewest is not None:
            layers = fewest if setting.fast else found.layers * (fewest > 0)
    lengths = Lengths.of(rows, batches.micro_batch)
    plan = Plan(found, setting, batches, lengths, room, room_is, layers, offloaded)
    plan = replace(plan, seconds=_seconds(plan, card))
    if plan.fits is not False or not remedies:
        return plan
    return replace(plan, remedies=_remedies(plan, rows))


def _remedies(plan: Plan, rows: Sequence[Row]) -> tuple[Remedy, ...]:
    """Return what makes a plan fit, the cheapest first."""
    setting, batches, now = plan.setting, plan.batches, plan.peak
    found: list[Remedy] = []

    def spare(change: str, cost: str, other: Bytes, recomputed: int | None = None) -> None:
        spared = now - other.peak(recomputed)
        if spared > 0:
            found.append(Remedy(change, spared, cost))

    def measured(few: Sequence[Row], other: Setting = setting) -> Bytes:
        return measure(other, few, accumulates=batches.accumulated > 1)

    if plan.recomputed < plan.bytes.layers:
        cost = "a third more computing"
        spare("train.gradient_checkpointing: true", cost, plan.bytes)
    if batches.micro_batch > 1 or batches.max_tokens:
        one = largest_micro_batch(rows, Batches(1), flat=setting.flat)
        change = "train.per_device_train_batch_size: 1 (and as many more accumulation steps)"
        if batches.max_tokens:
            change = f"train.max_tokens_per_batch: {batch_tokens(one, setting.flat)}"
        spare(change, "no number changes; smaller matrix products", measured(one))
    if not setting.embeddings_on_cpu and not _tied(setting) and plan.bytes.embeddings:
        other = replace(plan.bytes, unquantised=plan.bytes.unquantised - plan.bytes.embeddings)
        cost = "exact; a small copy in every micro-batch"
        spare("model.embeddings_on_cpu: true", cost, other, plan.recomputed)
    if setting.optimiser > 2:
        other = replace(plan.bytes, optimiser=2 * plan.bytes.trained)
        spare(
            "train.optim: adamw_8bit", "an approximation of AdamW's state", other, plan.recomputed
        )
    ordered = sorted(rows, key=laid_tokens)
    nine_tenths = ordered[: max(1, len(ordered) * 9 // 10)]
    if laid_tokens(nine_tenths[-1]) < laid_tokens(ordered[-1]):
        limit = plan.lengths.ninth
        few = largest_micro_batch(nine_tenths, batches, flat=setting.flat)
        cost = (
            f"{len(ordered) - len(nine_tenths)} of {len(ordered)} rows are dropped (data.overflow)"
        )
        spare(f"data.max_length: {limit}", cost, measured(few))
    if setting.lora.r > 8:
        other = _with_less(plan.bytes, 8 / setting.lora.r)
        spare("lora.rank: 8", "fewer weights are trained", other, plan.recomputed)
    return tuple(found)


def _with_less(found: Bytes, share: float) -> Bytes:
    return replace(
        found,
        adapters=int(found.adapters * share),
        gradients=int(found.gradients * share),
        optimiser=int(found.optimiser * share),
    )


def _tied(setting: Setting) -> bool:
    return bool(getattr(setting.architecture.get_text_config(), "tie_word_embeddings", False))


def _seconds(plan: Plan, card: Card | None) -> float | None:
    """Return the time of a mean step at the full rate of a card: every product, every weight's way."""
    if card is None or card.tflops is None or card.gb_per_s is None:
        return None
    setting, found, lengths = plan.setting, plan.bytes, plan.lengths
    text = setting.architecture.get_text_config()
    row_count = plan.batches.micro_batch * plan.batches.accumulated
    tokens = (lengths.laid if setting.flat else lengths.padded) / lengths.rows * row_count
    predicted = lengths.predicted / lengths.rows * row_count
    reference, again = float(setting.with_reference), plan.recomputed / found.layers
    linears = 2 * found.linears * tokens * (2 + reference + again)
    adapters = 2 * found.trained * tokens * (3 + again)
    head = 2 * text.vocab_size * text.hidden_size * predicted * (2 + reference)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    seen = tokens * lengths.median / 2  # a token sees half of its sequence
    attention = (
        4 * width * text.num_attention_heads * found.layers * seen * (3.5 + reference + again)
    )
    passes = 2 if setting.fast and setting.keeps_weights else 4
    traffic = 2.516 * found.linears * passes * plan.batches.accumulated
    work = linears + adapters + head + attention
    return float(work / (card.tflops * 1e12) + traffic / (card.gb_per_s * 1e9))
