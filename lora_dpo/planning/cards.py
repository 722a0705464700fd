"""Graphics cards by name: memory, and the rates that a floor of the time is computed from.

Rates are dense matrix products in 16 bits and memory traffic. Those of the H200 were measured on one;
the others are data sheets' or counted from the number of units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lora_dpo.errors import ConfigError, nearest

GIB = 2**30
RESERVED = 0.8 * GIB  # the driver's context, and what the allocator cannot use
LINK = 16e9  # bytes a second between a card and the CPU: two thirds of what PCIe 4.0 promises


@dataclass(frozen=True)
class Card:
    """A card, or a plain amount of memory.

    Args:
        name: for people.
        gib: memory.
        tflops: dense 16-bit rate, None where it is not known.
        gb_per_s: memory traffic.
        bfloat16: whether it computes in bfloat16.
    """

    name: str
    gib: float
    tflops: float | None = None
    gb_per_s: float | None = None
    bfloat16: bool = True

    @property
    def room(self) -> int:
        """Bytes that tensors can take."""
        return int(self.gib * GIB - RESERVED)


CARDS = {
    "t4": Card("T4", 15, 65, 320, bfloat16=False),
    "rtx3060": Card("RTX 3060", 12, 25.5, 360),
    "rtx3090": Card("RTX 3090", 24, 71, 936),
    "rtx4090": Card("RTX 4090", 24, 165.2, 1008),
    "l4": Card("L4", 22.5, 121, 300),
    "a100-40": Card("A100 40 GB", 39.5, 312, 1555),
    "a100-80": Card("A100 80 GB", 79.3, 312, 2039),
    "h100": Card("H100", 79.2, 989, 3350),
    "h200": Card("H200", 139, 790, 4300),
}


def card_of(text: str) -> Card:
    """Read ``rtx4090`` or ``12GiB``.

    Raises:
        ConfigError: neither a known card nor an amount.
    """
    plain = text.strip().lower().replace(" ", "").replace("_", "-")
    if plain in CARDS:
        return CARDS[plain]
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|g)?", plain)
    if amount and float(amount[1]) > 0:
        gib = float(amount[1]) * (1e9 / GIB if amount[2] == "gb" else 1.0)
        return Card(f"{gib:.4g} GiB", gib)
    raise ConfigError(
        f"--gpu {text!r}: expected an amount of memory, as 12GiB, or one of {', '.join(CARDS)}."
        f"{nearest(plain, CARDS)}"
    )


def this_card(device: torch.device | None = None) -> Card | None:
    """Return the card of this machine, or None where there is none."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    facts = torch.cuda.get_device_properties(device or torch.cuda.current_device())
    name = facts.name.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "")
    name = name.replace("tesla", "")
    gib = facts.total_memory / GIB
    known = CARDS.get(name) or next(
        (
            card
            for key, card in CARDS.items()
            if key[0] in "ah" and name.startswith(key.split("-")[0]) and abs(card.gib - gib) < 2
        ),
        None,
    )
    rates = (known.tflops, known.gb_per_s) if known else (None, None)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Card(facts.name, facts.total_memory / GIB, *rates, bfloat16)
