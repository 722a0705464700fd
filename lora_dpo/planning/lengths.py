"""What the lengths of the rows mean for the work: shared prompts, padding that is not computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dpo.stepping import Batches, batch_tokens, laid_tokens, row_length, row_tokens

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a data set, as they are computed on.

    Attributes:
        rows: how many.
        longest, median, ninth: of a row's longest sequence; the last is exceeded by a tenth.
        laid: tokens of all rows laid flat, prompts once.
        sequences: tokens of all sequences, each with its own prompt.
        padded: the same in padded micro-batches, in the order of the file.
        predicted: tokens of all answers.
    """

    rows: int
    longest: int
    median: int
    ninth: int
    laid: int
    sequences: int
    padded: int
    predicted: int

    @classmethod
    def of(cls, rows: Sequence[Row], micro_batch: int) -> Lengths:
        """Count the tokens of tokenised rows."""
        lengths = [row_length(row) for row in rows]
        ordered = sorted(lengths)
        answers = [2 if "chosen_ids" in row else 1 for row in rows]
        padded = sum(
            max(lengths[i : i + micro_batch]) * sum(answers[i : i + micro_batch])
            for i in range(0, len(rows), micro_batch)
        )
        sequences = sum(map(row_tokens, rows))
        prompts = sum(n * len(row["prompt_ids"]) for n, row in zip(answers, rows, strict=True))
        return cls(
            rows=len(rows),
            longest=ordered[-1],
            median=ordered[len(ordered) // 2],
            ninth=ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)],
            laid=sum(map(laid_tokens, rows)),
            sequences=sequences,
            padded=padded,
            predicted=sequences - prompts,
        )

    def line(self) -> str:
        """Return a sentence."""
        return (
            f"{self.rows} rows of {self.median} tokens at the median, {self.longest} at most; "
            f"shared prompts spare {1 - self.laid / self.sequences:.0%} of the tokens, "
            f"no padding another {1 - self.sequences / self.padded:.0%}"
        )


def largest_micro_batch(rows: Sequence[Row], batches: Batches, *, flat: bool = True) -> list[Row]:
    """Return the rows that together take most: the longest ones that can meet in a micro-batch.

    Rows of one prompt share it and take less; they come in where there are too few others.
    """
    ordered = sorted(rows, key=laid_tokens if flat else row_length, reverse=True)
    seen: set[tuple[int, ...]] = set()
    repeated = [id(row) for row in ordered if not _first(tuple(row["prompt_ids"]), seen)]
    again = set(repeated)
    ordered.sort(key=lambda row: id(row) in again)
    if batches.max_tokens is None:
        return ordered[: batches.micro_batch]
    found = ordered[:1]
    for row in ordered[1:]:
        if len(found) == batches.micro_batch * batches.accumulated:
            break
        if batch_tokens([*found, row], flat) <= batches.max_tokens:
            found.append(row)
    return found


def _first(prompt: tuple[int, ...], seen: set[tuple[int, ...]]) -> bool:
    new = prompt not in seen
    seen.add(prompt)
    return new
