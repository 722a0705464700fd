"""When memory runs out: how that is told from other errors, by how much, and passes in less of it."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lora_dpo.errors import TrainingError
from lora_dpo.heads import causal_lm, home_device
from lora_dpo.layers.offloading import release
from lora_dpo.randomness import random_state, restore_random
from lora_dpo.sharding import is_sharded
from lora_dpo.stepping import row_length

logger = logging.getLogger("lora_dpo")

Row = Mapping[str, Any]
Found = TypeVar("Found")
GIB = 2**30
_SIGNS = (
    "DefaultCPUAllocator",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TRIED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a card or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@dataclass(frozen=True)
class Shortage:
    """What is known of a failure: its words, the bytes that were refused, and those that were held."""

    said: str
    tried: int
    held: int | None  # None on a CPU

    @classmethod
    def of(cls, error: BaseException, device: torch.device) -> Shortage:
        """Measure a failure; call it while the error is being handled, for that keeps its tensors."""
        tried = _TRIED.search(str(error))
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        size = int(float(tried[1]) * _UNITS[tried[2]]) if tried else 1
        return cls(" ".join(str(error).split())[:160], max(size, 1), held)

    def missing(self, predicted: int) -> int:
        """Return the bytes that a step lacks whose peak was predicted so.

        What was held could be had. The step would have taken what it asked for on top of it, or its
        predicted peak if that is more.
        """
        if self.held is None:
            return self.tried
        return max(self.held + self.tried, predicted) - self.held


def forget(device: torch.device) -> None:
    """Give back what a failed attempt has left; call it outside of the handler, which keeps it alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    release(device)


@dataclass
class Width:
    """Rows of a forward pass; running out of memory makes them fewer for good."""

    rows: int


def narrowing(
    model: nn.Module,
    rows: Any,
    places: Sequence[int],
    width: Width,
    run: Callable[[list[Row]], Found],
    what: str,
) -> Iterator[tuple[Sequence[int], Found]]:
    """Run rows forward, so many at a time; where memory runs out, half as many from there on.

    Values do not depend on it but for rounding, and what is drawn not at all. Where the base is dealt
    out among processes, all of them run the same passes, so that none can narrow its own.

    Args:
        model: that runs.
        rows: a sequence of rows, read one at a time.
        places: which of them, in the order in which they run.
        width: rows at a time; it is narrowed in place.
        run: what is done with a few rows.
        what: it is, for messages.

    Yields:
        Places, and what was found of their rows.

    Raises:
        TrainingError: one row alone does not fit.
    """
    start, device = 0, home_device(model)
    while start < len(places):
        part, before, found, said = places[start : start + width.rows], random_state(), None, ""
        try:
            found = run([rows[place] for place in part])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or is_sharded(model):
                raise
            said = Shortage.of(error, device).said
        if found is not None:
            start += len(part)
            yield part, found
            continue
        forget(device)  # outside of the handler: its traceback keeps tensors alive
        restore_random(before)
        if len(part) == 1:
            raise TrainingError(_too_large(model, rows[part[0]], what, said))
        width.rows = len(part) // 2
        text = "out of memory in %s (%s); from now on %d rows at a time"
        logger.warning(text, what, said, width.rows)


def _too_large(model: nn.Module, row: Row, what: str, said: str) -> str:
    place = f"{row['file']}:{row['row']}, " if "file" in row else ""
    embeddings = causal_lm(model).get_input_embeddings()
    size = sum(p.nbytes for p in embeddings.parameters()) / GIB
    length = row_length(row)
    return "\n".join(
        [
            f"out of memory in {what}: {said}. One row alone ({place}{length} tokens) does not fit. "
            "Nothing is lost: checkpoints are kept. What takes less:",
            f"model.embeddings_on_cpu: true (exact): {size:.2f} GiB less, where they are not the head too",
            "train.chunk_tokens: 64 (exact): fewer logits at one time",
            f"data.max_length: {max(2, length // 2)}: rows half as long; longer ones are dropped "
            "(data.overflow)",
        ]
    )
