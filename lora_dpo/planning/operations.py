"""The work of a step, counted: a floor of its operations and of the bytes that making weights plain moves.

Each product is counted once, and nothing that a step could do without: elementwise work, the optimiser
and padding beyond a row's own are left out. Causal attention sees half of what it could, and its
backward pass takes two and a half times its forward pass, as in kernels that keep no scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from lora_dpo.data import flat_tokens
from lora_dpo.layers.mlp import is_gated, tile
from lora_dpo.stepping import Batches, answers_of, batch_tokens, laid_tokens, row_length

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """What of a model works on each token, counted in weights.

    Attributes:
        linears: of frozen linear layers beside the head; experts, of which a token meets a few, are
            left out.
        last: of these, the last projections of MLPs, which a recomputation can leave out.
        first: of these, at most those that read what no trained weight has touched: their input needs
            no gradient.
        lora: of the LoRA factors on them.
        head: vocabulary times width.
        attention: layers times heads times the width of a head.
        window: tokens that a token sees at most; None where it sees all before it.
    """

    linears: int
    last: int
    first: int
    lora: int
    head: int
    attention: int
    window: int | None = None

    @classmethod
    def of(cls, architecture: Any, *, linears: int, last: int, lora: int) -> Shape:
        """Return the shape of a model's config, with its weights as ``weights_at_work`` counts them."""
        text = architecture.get_text_config()
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        first = text.hidden_size * width * (heads + 2 * keys)
        kinds = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
        attends = sum("attention" in kind and "linear" not in kind for kind in kinds)
        windows = [getattr(text, n, None) for n in ("sliding_window", "attention_chunk_size")]
        return cls(
            linears=linears,
            last=last,
            first=min(first, linears),
            lora=lora,
            head=text.vocab_size * text.hidden_size,
            attention=attends * heads * width,
            window=min((w for w in windows if w), default=None),
        )


@dataclass(frozen=True)
class Tokens:
    """What rows ask of a model: tokens, pairs of tokens that attention compares, predicted tokens."""

    count: float
    seen: float
    predicted: float

    def times(self, share: float) -> Tokens:
        """Return so many times as much."""
        return Tokens(self.count * share, self.seen * share, self.predicted * share)

    @classmethod
    def laid(cls, rows: Iterable[Row], *, together: int = 1, window: int | None = None) -> Tokens:
        """Count rows end to end, each prompt once.

        Args:
            rows: tokenised.
            together: rows that can meet in a micro-batch, where those of one prompt share it.
            window: of the model.
        """
        count = seen = predicted = 0.0
        times: Counter[int] = Counter()  # of prompts, and of answers to them
        lengths: dict[int, tuple[int, int]] = {}
        least: dict[int, int] = {}
        for row in rows:
            prompt, own = row["prompt_ids"], answers_of(row)
            laid, ends = flat_tokens(prompt, own), [len(prompt) + len(a) - 1 for a in own]
            apart = len(prompt) + sum(len(answer) - 1 for answer in own)
            trunk = len(prompt) + (apart - laid) // max(len(own) - 1, 1)
            count += laid
            seen += sum(compared(end, window) for end in ends)
            seen -= (len(own) - 1) * compared(trunk, window)
            predicted += sum(map(len, own))
            if together > 1:
                key = hash(tuple(prompt))
                times[key] += 1
                least[key] = min(trunk, least.get(key, trunk))
                for answer, end in zip(own, ends, strict=True):
                    both = hash((key, tuple(answer)))
                    times[both] += 1
                    lengths[both] = (len(prompt), end)
        for key, found in times.items():
            spared = found - -(-found // together)
            begin, end = lengths.get(key, (0, least.get(key, 0)))
            count -= spared * (end - begin)
            seen -= spared * (compared(end, window) - compared(begin, window))
            predicted -= spared * (end - begin + 1) * (key in lengths)
        return cls(max(count, 0.0), max(seen, 0.0), max(predicted, 0.0))

    @classmethod
    def padded(cls, rows: Iterable[Row], *, window: int | None = None) -> Tokens:
        """Count each sequence by itself, padded to the longest of its row and no further."""
        count = seen = predicted = 0.0
        for row in rows:
            own = answers_of(row)
            count += len(own) * row_length(row)
            seen += sum(compared(len(row["prompt_ids"]) + len(a), window) for a in own)
            predicted += sum(map(len, own))
        return cls(count, seen, predicted)


def compared(length: int, window: int | None = None) -> float:
    """Return the pairs of tokens that causal attention compares in a sequence."""
    if window is None or length <= window:
        return length**2 / 2
    return float(window**2 / 2 + (length - window) * window)


def operations(
    shape: Shape,
    tokens: Tokens,
    *,
    reference: float = 1.0,
    again: float = 0.0,
    skips_last: bool = True,
    int8: bool = False,
) -> float:
    """Return the floating-point operations of forward and backward passes.

    Args:
        shape: of the model.
        tokens: that are trained on.
        reference: passes of the reference a pass of the policy: 1, 0 where its log-probs are
            known, and 1 / epochs where one pass serves several.
        again: share of the layers that are recomputed, 0 to 1.
        skips_last: whether a recomputation leaves out an MLP's last projection.
        int8: whether forward products of frozen weights run in 8 bits, at twice the rate.
    """
    left_out = shape.last / shape.linears if skips_last and shape.linears else 0.0
    forward = 1 + reference + again * (1 - left_out)
    frozen = shape.linears * (forward / (2 if int8 else 1) + 1) - shape.first
    adapters = shape.lora * (3 + again * (1 - left_out))
    head = shape.head * (2 + reference)  # its gradient is a second product, frozen as it is
    attention = 4 * shape.attention * tokens.seen * (3.5 + reference + again)
    return 2 * tokens.count * (frozen + adapters) + 2 * head * tokens.predicted + attention


def plain_bytes(
    shape: Shape,
    *,
    size: int,
    double: bool,
    reference: bool,
    again: float,
    fast: bool,
    keeps_weights: bool,
    skips_last: bool,
    tokens: float = 1.0,
) -> float:
    """Return the bytes that a micro-batch moves to make weights in 4 bits plain: read once, written once.

    Args:
        shape: of the model.
        size: bytes of a plain weight.
        double: whether the scales are quantised too.
        reference: whether the reference runs.
        again: share of the layers that are recomputed.
        fast: whether the layers are ours: policy and reference share what they make plain, and so do
            a recomputation and the backward pass behind it, where ``keeps_weights``.
        keeps_weights, skips_last: see ``layers.Work``.
        tokens: of the micro-batch; where no weight is kept, MLPs make theirs plain for each tile.
    """
    left_out = shape.last / shape.linears if fast and skips_last and shape.linears else 0.0
    shares = fast and keeps_weights
    forward = 1 if shares or not reference else 2
    backward = 1 + (0.0 if shares else again * (1 - left_out))
    spared = 0 if shares and again else shape.first  # a recomputation has made them plain
    weights = shape.linears * (forward + backward) - spared
    if fast and not keeps_weights:  # what is kept of gate and up was made in one piece
        a_tile = 4 + again * (4 if skips_last else 3) + (3 if reference else 0)
        weights += (math.ceil(tokens / tile(keeps_weights=False)) - 1) * a_tile * shape.last
    return weights * (0.5 + (1 / 64 if double else 4 / 64) + size)


def micro_batches(rows: Sequence[Row], batches: Batches, *, flat: bool) -> float:
    """Return how many micro-batches a step of mean length has at least."""
    if batches.max_tokens is None:
        return float(batches.accumulated)
    most = batches.max_tokens
    shares = sum(min(batch_tokens([row], flat), most) / most for row in rows)
    return max(1.0, shares * rows_of_a_step(rows, batches) / len(rows))


def rows_of_a_step(rows: Sequence[Row], batches: Batches) -> int:
    """Return the rows of a step; no more than there are."""
    return min(batches.micro_batch * batches.accumulated, len(rows))


def has_several(rows: Sequence[Row], batches: Batches, *, flat: bool) -> bool:
    """Whether a step can have several micro-batches, so that one meets the gradients of another."""
    if batches.max_tokens is None:
        return batches.accumulated > 1
    longest = sorted(rows, key=laid_tokens if flat else row_length, reverse=True)
    longest = longest[: rows_of_a_step(rows, batches)]
    return len(longest) > 1 and batch_tokens(longest, flat) > batches.max_tokens


def weights_at_work(policy: Any) -> dict[str, int]:
    """Count a policy's weights: frozen linear layers, their MLPs' last ones, LoRA factors, and all.

    Args:
        policy: a ``PeftModel`` as peft made it, without layers of ours.
    """
    causal = policy.get_base_model()
    head = causal.get_output_embeddings()
    inside_head = set() if head is None else set(head.modules())
    last = [module.down_proj for module in policy.modules() if is_gated(module)]
    linears = {
        id(module): module.in_features * module.out_features
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and module not in inside_head
        and ".experts." not in name
        and "lora_" not in name
    }
    inside: Any = [
        module
        for name, module in policy.named_modules()
        if isinstance(module, LoraLayer) and module not in inside_head and ".experts." not in name
    ]
    lora = [
        factor.weight.numel()
        for module in inside
        for factors in (module.lora_A, module.lora_B)
        for factor in factors.values()
        if factor.weight.requires_grad
    ]
    return {
        "linears": sum(linears.values()),
        "last": sum(linears.get(id(_base(module)), 0) for module in last),
        "lora": sum(lora),
    }


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module
