"""What a pair takes at least: floating-point operations, and bytes of a step, by formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Group = tuple[int, Sequence[int]]  # tokens of a prompt, and of each of its answers


@dataclass(frozen=True)
class Way:
    """How a run goes through its pairs, as far as its operations are concerned.

    Args:
        shared: whether a prompt is laid down once, and not once for each answer.
        recomputed: share of the layers that backward runs again, 0 to 1.
        skips_last: whether that leaves out a layer's last projection.
        reference: passes of the reference a pair: 1, or 1 over the epochs that share a stored one.
        head_again: whether backward builds the logits again, as TRL's head does.
        rank: of the LoRA layers.
    """

    shared: bool
    recomputed: float = 0.0
    skips_last: bool = False
    reference: float = 1.0
    head_again: bool = False
    rank: int = 16

    @classmethod
    def measured(cls, run: dict[str, Any], name: str, epochs: int, rank: int) -> Way:
        """Return the way that a run reports of itself, by its ``layout``."""
        side, *variant = name.split("+")
        laid = run["layout"]
        return cls(
            shared=laid["shared_prompts"],
            recomputed=laid["recomputed_layers"] / laid["layers"],
            skips_last=laid["skips_last"],
            reference=1 / epochs if {"precompute", "cached"} & set(variant) else 1.0,
            head_again=side == "trl",
            rank=rank,
        )


@dataclass(frozen=True)
class Sizes:
    """A model's sizes as the formulas name them; query and keys are the widths of these products."""

    width: int
    inner: int
    layers: int
    query: int
    keys: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Read them from a config."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            heads * head_dim,
            config.num_key_value_heads * head_dim,
            config.vocab_size,
        )

    @property
    def linears(self) -> int:
        """Weights of all linear layers but the head."""
        attention = 2 * self.width * (self.query + self.keys)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def last(self) -> int:
        """Those of the last projections among them."""
        return self.layers * self.width * self.inner

    def lora(self, rank: int) -> int:
        """Weights of LoRA layers on all linear layers."""
        # a layer's inputs and outputs: q and o, k and v, gate and up and down
        attention = 2 * (self.width + self.query) + 2 * (self.width + self.keys)
        return self.layers * rank * (attention + 3 * (self.width + self.inner))


def flop(config: Any, groups: Iterable[Group], way: Way) -> float:
    """Return the floating-point operations of one epoch of pairs, each product counted once.

    The head is computed at answer positions alone. Causal attention sees half of what it could.
    Padding, optimiser and elementwise work are left out.

    Args:
        config: the model's.
        groups: prompts and their answers, in tokens.
        way: how the run goes through them.
    """
    size = Sizes.of(config)
    again, lora = way.recomputed, size.lora(way.rank)
    products = again * (1 - way.skips_last * size.last / size.linears)
    total = 0.0
    for prompt, answers in groups:
        spared = (len(answers) - 1) * way.shared
        tokens = prompt * (len(answers) - spared) + sum(answers)
        seen = sum((prompt + answer) ** 2 / 2 for answer in answers) - spared * prompt**2 / 2
        attention = 4 * size.query * seen * size.layers
        total += 2 * size.linears * tokens * (2 + way.reference + products)
        total += attention * (3.5 + way.reference + again) + 2 * lora * tokens * (3 + again)
        head = 2 + way.reference + way.head_again
        total += 2 * size.vocabulary * size.width * sum(answers) * head
    return total


def groups_of(pairs: Iterable[dict[str, list[int]]]) -> list[Group]:
    """Return pairs of token ids as lengths."""
    names = ("chosen_ids", "rejected_ids")
    return [(len(p["prompt_ids"]), [len(p[name]) for name in names]) for p in pairs]


def activation_bytes(
    config: Any, groups: Iterable[Group], *, recomputed: int, element: int, chunk: int
) -> int:
    """Return the bytes that the performance study counts beside weights, adapters and optimiser.

    Prompts are laid down once. A recomputed layer keeps its input; another keeps the inputs of its
    products, gate and up. To that comes the greater of two moments: one layer in flight with its
    largest plain weight, or one chunk of logits with the head's gradients.

    Args:
        config: the model's.
        groups: of one micro-batch.
        recomputed: layers that backward runs again.
        element: bytes of a number of the computation.
        chunk: positions whose logits exist at one time.
    """
    size = Sizes.of(config)
    laid = list(groups)
    tokens = sum(prompt + sum(answers) for prompt, answers in laid)
    predicted = sum(sum(answers) for _, answers in laid)
    kept = element * (4 * size.width + 2 * size.query + 2 * size.keys + 2 * size.inner)
    # until backward
    waiting = tokens * (recomputed * element * size.width + (size.layers - recomputed) * kept)
    in_flight = tokens * element * 2 * (size.width + size.inner)
    in_flight += tokens * kept * (recomputed > 0) + element * size.width * size.inner
    head = min(chunk, predicted) * size.vocabulary * (element + 4)
    head += 2 * predicted * size.width * element
    return waiting + max(in_flight, head)
