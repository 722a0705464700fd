"""Where the tokens of a row stand, whatever rows are beside it.

Two kinds of rotary positions have frequencies that follow the longest row of a batch: transformers look at
its largest position. ``longrope`` takes other frequencies for every row of it as soon as one is longer than
what the model was first trained on; ``dynamic`` grows its frequencies with it, and keeps them until a
shorter batch than that comes by. Beyond that length a row has no log-prob of its own: it depends on what
shares its batch, or ran before it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lora_dpo.errors import ConfigError


def check_positions(config: Any, longest: int) -> None:
    """Hold that no row is so long that it would change the positions of the rows beside it.

    Args:
        config: of a transformers model.
        longest: tokens of the longest sequence.

    Raises:
        ConfigError: it is longer than the model's rotary positions are the same in every batch.
    """
    found = longest_of_its_own(config)
    if found is None or longest <= found[1]:
        return
    kind, most = found
    text = config.get_text_config()
    name = getattr(config, "name_or_path", "") or text.model_type
    raise ConfigError(
        f"data.max_length: the longest row has {longest} tokens, but beyond {most} the rotary positions of "
        f"{name} ({text.model_type}, rope_type {kind}) depend on the longest row of a batch, so that a row's "
        f"log-probs would depend on the rows beside it. Set data.max_length to at most {most} "
        f"(PreferenceTrainer(max_length={most}))."
    )


def longest_of_its_own(config: Any) -> tuple[str, int] | None:
    """Return such a kind of positions and the tokens up to which they are fixed, or None."""
    text = config.get_text_config()
    settings = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    by_layer = [part for part in settings.values() if isinstance(part, dict)]
    found = []
    for part in by_layer or [settings]:
        kind = str(part.get("rope_type", part.get("type", "")))
        if kind == "longrope":
            names = (part, vars(text))
            first = next((d[_FIRST] for d in names if d.get(_FIRST)), text.max_position_embeddings)
            found.append((kind, int(first)))
        elif "dynamic" in kind:
            # a batch of exactly that many does not put back what a longer one has grown
            found.append((kind, int(text.max_position_embeddings) - 1))
    return min(found, key=lambda pair: pair[1]) if found else None


def counted_positions(causal: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return positions counted from each row's first token, ``[rows, time]``, for a model that takes them."""
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}


_FIRST = "original_max_position_embeddings"
