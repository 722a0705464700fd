"""What the lengths of the rows mean for the work: shared prompts, padding that is not computed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
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
    return [_plain(rows[place]) for place in largest_places(rows, batches, flat=flat)]


def largest_places(rows: Sequence[Row], batches: Batches, *, flat: bool = True) -> list[int]:
    """Return where these rows stand."""
    sizes = list(map(laid_tokens if flat else row_length, rows))
    ordered = sorted(range(len(rows)), key=sizes.__getitem__, reverse=True)
    seen: set[tuple[int, ...]] = set()
    again = {place for place in ordered if not _first(tuple(rows[place]["prompt_ids"]), seen)}
    ordered.sort(key=again.__contains__)
    if batches.max_tokens is None:
        return ordered[: batches.micro_batch]
    found = ordered[:1]
    for place in ordered[1:]:
        if len(found) == batches.micro_batch * batches.accumulated:
            break
        if batch_tokens([rows[i] for i in (*found, place)], flat) <= batches.max_tokens:
            found.append(place)
    return found


def compact_rows(rows: Any) -> Sequence[Row]:
    """Return the tokens of a data set's rows in four bytes each, where a list takes some forty.

    Args:
        rows: of a ``Tokenised``; others are returned as they are.
    """
    if not hasattr(rows, "with_format"):
        return list(rows)
    names = [name for name in rows.column_names if name.endswith("_ids")]
    found: list[Row] = []
    for table in rows.with_format("arrow").iter(batch_size=4096):
        columns = [_arrays(table[name]) for name in names]
        found += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return found


def _arrays(column: Any) -> Iterator[array[int]]:
    for chunk in column.chunks:
        ends = chunk.value_lengths().to_numpy(zero_copy_only=False).cumsum().tolist()
        tokens = chunk.flatten().to_numpy(zero_copy_only=False).astype("int32")
        for begin, end in zip([0, *ends], ends, strict=False):
            yield array("i", tokens[begin:end].tobytes())


def _plain(row: Row) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, array) else v for name, v in row.items()}


def _first(prompt: tuple[int, ...], seen: set[tuple[int, ...]]) -> bool:
    new = prompt not in seen
    seen.add(prompt)
    return new
