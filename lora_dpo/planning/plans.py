"""The plan of a run: bytes by part, how much is recomputed, time at a card's full rate, remedies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lora_dpo.planning.cards import GIB, LINK, Card
from lora_dpo.planning.lengths import Lengths, largest_micro_batch
from lora_dpo.planning.measuring import Bytes, Setting, measure
from lora_dpo.planning.operations import (
    Shape,
    Tokens,
    has_several,
    micro_batches,
    operations,
    plain_bytes,
    rows_of_a_step,
)
from lora_dpo.showing import Told
from lora_dpo.stepping import Batches, batch_tokens

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Remedy:
    """A change that takes less memory.

    Attributes:
        change: the setting.
        spared: bytes, with as many layers recomputed as before (where they can be, all).
        cost: in words.
        lost: share of the time of a step that it costs, as far as rates are known; negative where
            the room that it makes lets more layers be kept.
        dropped: rows that are no longer trained on.
        fits: whether it makes the step fit by itself.
    """

    change: str
    spared: int
    cost: str
    lost: float | None = None
    dropped: int = 0
    fits: bool = False

    def __str__(self) -> str:
        enough = "fits by itself" if self.fits else "not enough by itself"
        return f"{self.change}: {self.spared / GIB:.2f} GiB less; {self.cost}; {enough}"


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
        together: which of them make it fit, where none does alone.
        recompute: whether layers may be recomputed.
        card: whose rates the time is computed with.
        step: tokens of a mean step, and ``pieces``, its micro-batches.
        engine: why layers and layout are what they are, where that is decided from the config alone.
        moved: layers behind the recomputed ones that wait in the memory of the CPU with all that
            backward needs of them.
        widest: tokens of the micro-batch whose bytes these are.
        offloads: whether anything may wait in the memory of the CPU.
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
    together: str = ""
    recompute: bool = True
    card: Card | None = None
    step: Tokens = field(default_factory=lambda: Tokens(0, 0, 0))
    pieces: float = 1.0
    engine: str = ""
    moved: int = 0
    widest: int = 0
    offloads: bool = True

    @property
    def title(self) -> str:
        """The peak, how it is reached, and whether it fits."""
        how = f"peak {self.peak / GIB:.2f} GiB, {self.recomputed} of {self.bytes.layers} layers recomputed"
        how += f", {self.moved} in the memory of the CPU" if self.moved else ""
        fits = {None: "", True: f", fits {self.room_is}", False: f", does NOT fit {self.room_is}"}
        return how + fits[self.fits]

    @property
    def peak(self) -> int:
        """Predicted most bytes of tensors at one time."""
        return self.bytes.peak(self.recomputed, self.moved)

    @property
    def fits(self) -> bool | None:
        """Whether the peak stays within the room; None where there is no limit."""
        return None if self.room is None else self.peak <= self.room

    @property
    def operations(self) -> float:
        """Floating-point operations of a mean step, as few as can be."""
        s, again = self.setting, self.recomputed / self.bytes.layers
        skips, int8 = s.fast and s.skips_last, s.quantisation == "int8"
        how: Any = {"reference": float(s.with_reference), "again": again}
        return operations(shape_of(s, self.bytes), self.step, skips_last=skips, int8=int8, **how)

    def parts(self) -> dict[str, int]:
        """Return the bytes of the peak by part."""
        b = self.bytes
        found = {
            "quantised weights": b.quantised,
            "embeddings": b.embeddings,
            "head": b.head_weight,
            "other weights": b.unquantised - b.embeddings - b.head_weight,
            "adapters": b.adapters,
            "gradients": b.gradients,
            "optimiser": b.optimiser,
        }
        for name, size in b.at_the_peak(self.recomputed, self.moved)[1].items():
            found[name] = found.get(name, 0) + size
        return found

    def moments(self) -> dict[str, int]:
        """Return the bytes at each moment of a step that can be the peak, in words."""
        found = self.bytes.moments(self.recomputed, self.moved)
        return {name: self.bytes.static + sum(parts.values()) for name, parts in found.items()}

    def lines(self) -> list[str]:
        """Return the plan in sentences."""
        found = [
            f"data: {self.lengths.line()}",
            f"model: {self.bytes.base:,} weights, and {self.bytes.trained:,} that are trained",
        ]
        if self.engine:
            layers = "fast layers" if self.setting.fast else "the library's layers"
            rows = "rows end to end, prompts shared" if self.setting.flat else "padded rows"
            found.append(f"engine: {layers}, {rows} ({self.engine})")
        layers = f"{self.recomputed} of {self.bytes.layers} layers recomputed"
        layers += " from inputs in the memory of the CPU" if self.offloaded else ""
        layers += (
            f", {self.moved} whole in {self._sent} of the memory of the CPU" if self.moved else ""
        )
        found.append(f"plan: peak {self.peak / GIB:.2f} GiB of tensors with {layers}")
        found.append(f"plan, GiB: {_sizes(self.parts())}")
        found.append(f"plan, GiB at each moment that can be the peak: {_sizes(self.moments())}")
        if self.seconds is not None:
            found.append(
                f"plan: a step takes at least {self.seconds:.2f} s ({self.operations / 1e12:.4g} "
                "TFLOP at the card's full rate, and every weight's way)"
            )
        found += self._instead()
        if self.fits is not None:
            verdict = "fits" if self.fits else "does NOT fit"
            found.append(f"plan: {verdict} into {self.room_is}, {(self.room or 0) / GIB:.2f} GiB")
        found += [f"  {remedy}" for remedy in self.remedies]
        return [*found, f"  {self.together}"] if self.together else found

    @property
    def _sent(self) -> str:
        return f"{self.bytes.sent(self.recomputed, self.moved) / GIB:.2f} GiB"

    def _instead(self) -> list[str]:
        from lora_dpo.planning.moving import moved_instead

        other = moved_instead(self)
        if other is None:
            return []
        time = "" if other.seconds is None else f" (at least {other.seconds:.2f} s a step)"
        return [
            f"plan: or {other.moved} layers wait in {other._sent} of the CPU's memory, and "
            f"{other.recomputed} are recomputed{time}: train times both and takes the faster"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "peak_bytes": self.peak,
            "parameters": {"base": self.bytes.base, "trained": self.bytes.trained},
            "engine": {
                "layers": "fast" if self.setting.fast else "library",
                "rows": "flat" if self.setting.flat else "padded",
                "why": self.engine,
            },
            "parts": self.parts(),
            "moments": self.moments(),
            "layers": self.bytes.layers,
            "recomputed_layers": self.recomputed,
            "moved_layers": self.moved,
            "offloaded": self.offloaded,
            "sent_bytes": self.bytes.sent(self.recomputed, self.moved),
            "keeps_weights": self.setting.keeps_weights,
            "batches": asdict(self.batches),
            "lengths": asdict(self.lengths),
            "room_bytes": self.room,
            "room_is": self.room_is,
            "fits": self.fits,
            "seconds_floor": self.seconds,
            "operations_floor": self.operations,
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "together": self.together,
        }


def _sizes(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)


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
    least: int = 0,
    offloaded: bool = False,
    engine: str = "",
    brief: bool = False,
    offloads: bool = True,
    change: Callable[[Bytes], Bytes] = lambda found: found,
) -> Plan:
    """Measure a step on fake tensors and decide how many layers are recomputed.

    Args:
        setting: the model and how it runs.
        rows: tokenised rows.
        batches: how rows become steps.
        room, room_is: bytes that it may take, and what limits it.
        recompute: whether layers may be recomputed. Fast ones: as few as fit; all where nothing
            limits it. The library's: all.
        card: whose rates the time is computed with.
        remedies: whether to look for them where it does not fit.
        least: layers that are recomputed in any case.
        offloaded: whether inputs of layers wait in the CPU's memory in any case.
        engine: why layers and layout are what they are.
        brief: measure, where there is nothing to choose, that way alone, in half of the time.
        offloads: whether inputs of layers may, where nothing else makes it fit.
        change: what to make of the bytes that were measured.
    """
    from lora_dpo.planning.remedies import remedied

    largest = largest_micro_batch(rows, batches, flat=setting.flat)
    several = has_several(rows, batches, flat=setting.flat)
    way = None if setting.fast and not (brief and room is None) else recompute

    def measured(setting: Setting) -> Bytes:
        found = change(measure(setting, largest, accumulates=several, recomputes=way))
        return found.offloaded() if offloaded else found

    if recompute and room is not None and setting.fast:
        aside = card is not None and not offloaded and offloads
        setting, found, layers, moved = _as_few_as_fit(setting, measured, room, least, aside=aside)
        offloaded = offloaded or moved
    else:
        found = measured(setting)
        layers = found.layers if recompute else least
    lengths = Lengths.of(rows, batches.micro_batch)
    how = (found, setting, batches, lengths, room, room_is, layers, offloaded)
    plan = Plan(
        *how,
        recompute=recompute,
        card=card,
        step=_mean_step(rows, batches, setting, shape_of(setting, found).window),
        pieces=micro_batches(rows, batches, flat=setting.flat),
        engine=engine,
        widest=batch_tokens(largest, setting.flat),
        offloads=offloads,
    )
    plan = replace(plan, seconds=seconds_floor(plan))
    return remedied(plan, rows) if remedies and plan.fits is False else plan


def _as_few_as_fit(
    setting: Setting, measured: Callable[[Setting], Bytes], room: int, least: int, *, aside: bool
) -> tuple[Setting, Bytes, int, bool]:
    """Return how fast layers fit into a room: setting, bytes, layers recomputed, whether offloaded."""
    found = measured(setting)
    fewest = found.fewest_recomputed(room, least)
    if fewest is None and setting.keeps_weights:
        # a layer's plain weights are made again for their second use
        setting = replace(setting, keeps_weights=False)
        found = measured(setting)
        fewest = found.fewest_recomputed(room, least)
    moved = fewest is None and aside
    if moved:  # the inputs of layers wait in the CPU's memory
        found = found.offloaded()
        fewest = found.fewest_recomputed(room, least)
    return setting, found, found.layers if fewest is None else fewest, moved


def _mean_step(
    rows: Sequence[Row], batches: Batches, setting: Setting, window: int | None
) -> Tokens:
    """Return the tokens of a step of mean length, as few as they can be."""
    count = rows_of_a_step(rows, batches)
    if not setting.flat:
        return Tokens.padded(rows, window=window).times(count / len(rows))
    meet = batches.micro_batch if batches.max_tokens is None else count
    return Tokens.laid(rows, together=meet, window=window).times(count / len(rows))


def shape_of(setting: Setting, found: Bytes) -> Shape:
    """Return what of a measured model works on each token."""
    counted = {"linears": found.linears, "last": found.last, "lora": found.lora}
    return Shape.of(setting.architecture, **counted)


def seconds_floor(plan: Plan) -> float | None:
    """Return the time of a mean step at the full rate of a card: every product, every weight's way.

    What waits in the memory of the CPU is sent and fetched meanwhile, one after the other.
    """
    card, setting = plan.card, plan.setting
    if card is None or card.tflops is None or card.gb_per_s is None:
        return None
    moved = 0.0
    if setting.quantisation in ("nf4", "fp4"):  # what is not packed is read as it is multiplied
        moved = plan.pieces * plain_bytes(
            shape_of(setting, plan.bytes),
            size=setting.dtype.itemsize,
            double=setting.double,
            reference=setting.with_reference,
            again=plan.recomputed / plan.bytes.layers,
            fast=setting.fast,
            keeps_weights=setting.keeps_weights,
            skips_last=setting.skips_last,
            tokens=plan.step.count / plan.pieces,
        )
    computed = plan.operations / (card.tflops * 1e12) + moved / (card.gb_per_s * 1e9)
    sent = plan.bytes.sent(plan.recomputed, plan.moved) * plan.step.count / max(plan.widest, 1)
    return float(max(computed, 2 * sent / LINK))
