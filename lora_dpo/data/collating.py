"""Rows of token ids to padded tensors. Masks come from lengths, so the pad token may be EOS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lora_dpo.data.records import Origin
from lora_dpo.errors import DataError

if TYPE_CHECKING:
    import torch

Side = Literal["right", "left"]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Pairs as one batch: all chosen rows first, then all rejected rows in the same order."""

    input_ids: torch.Tensor  # [2 * pairs, time] long
    attention_mask: torch.Tensor  # [2 * pairs, time] long, 1 at tokens
    completion_mask: torch.Tensor  # [2 * pairs, time] bool, True at tokens of the answer
    origins: tuple[Origin, ...]  # [pairs]
    chosen_scores: torch.Tensor | None = None  # [pairs] float32, where every row has scores
    rejected_scores: torch.Tensor | None = None
    predicted: torch.Tensor | None = None  # [2, tokens] long: row and column of what predicts each

    @property
    def pairs(self) -> int:
        """How many pairs the batch holds."""
        return len(self.origins)

    def to(self, device: Any) -> PairBatch:
        """Return the batch on a device."""
        return _moved(self, partial(sent, device=device))

    def pin_memory(self) -> PairBatch:
        """Return the batch in pinned memory (torch's DataLoader calls this)."""
        return _moved(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Single answers with their labels."""

    input_ids: torch.Tensor  # [rows, time] long
    attention_mask: torch.Tensor  # [rows, time] long, 1 at tokens
    completion_mask: torch.Tensor  # [rows, time] bool, True at tokens of the answer
    label: torch.Tensor  # [rows] bool, True: wanted
    origins: tuple[Origin, ...]  # [rows]
    mismatched: LabelledBatch | None = None  # the same prompts before other rows' completions
    predicted: torch.Tensor | None = None  # [2, tokens] long: row and column of what predicts each

    @property
    def rows(self) -> int:
        """How many rows the batch holds."""
        return len(self.origins)

    def to(self, device: Any) -> LabelledBatch:
        """Return the batch on a device."""
        return _moved(self, partial(sent, device=device))

    def pin_memory(self) -> LabelledBatch:
        """Return the batch in pinned memory (torch's DataLoader calls this)."""
        return _moved(self, lambda tensor: tensor.pin_memory())


Segment = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class FlatBatch:
    """Rows laid end to end without padding; what the answers to one prompt share stands once.

    A segment is ``(shared, (branch, branch, ...))``: lengths of the tokens that all its rows begin
    with, and of what each goes on with. The last token of an answer predicts nothing and is left out.
    Rows are those of ``PairBatch`` (chosen first, then rejected) or ``LabelledBatch``.
    """

    input_ids: torch.Tensor  # [1, time] long
    position_ids: torch.Tensor  # [1, time] long; a branch goes on counting from what is shared
    places: torch.Tensor  # [tokens] long, where in time each answer's token is predicted
    targets: torch.Tensor  # [tokens] long, the answers' tokens, row by row
    token_rows: torch.Tensor  # [tokens] long, the row of each
    lengths: torch.Tensor  # [rows] long, tokens of each answer
    segments: tuple[Segment, ...]
    origins: tuple[Origin, ...]
    label: torch.Tensor | None = None  # [rows] bool, of labelled rows
    chosen_scores: torch.Tensor | None = None  # [pairs] float32
    rejected_scores: torch.Tensor | None = None
    mismatched: FlatBatch | None = None

    def to(self, device: Any) -> FlatBatch:
        """Return the batch on a device."""
        return _moved(self, partial(sent, device=device))


def flat_pairs(rows: Sequence[Mapping[str, Any]]) -> FlatBatch:
    """Lay pairs end to end: what the answers to one prompt share, then the rest of each answer."""
    batch = _flat(rows, ["chosen_ids", "rejected_ids"])
    chosen, rejected = (_scores(rows, side) for side in _PAIR)
    return replace(batch, chosen_scores=chosen, rejected_scores=rejected)


def flat_labelled(rows: Sequence[Mapping[str, Any]]) -> FlatBatch:
    """Lay labelled rows end to end."""
    import torch

    batch = _flat(rows, ["completion_ids"])
    label = torch.tensor([bool(row["label"]) for row in rows])
    if "mismatched_ids" not in rows[0]:
        return replace(batch, label=label)
    return replace(batch, label=label, mismatched=_flat(rows, ["mismatched_ids"]))


def flat_tokens(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """Return how many tokens a prompt with its answers takes in a flat batch."""
    shared = _shared(answers)
    return len(prompt) + shared + sum(len(answer) - 1 - shared for answer in answers)


def _flat(rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> FlatBatch:
    """Lay the answers of rows end to end: those of one prompt behind it, the same one once."""
    import torch

    groups, answer_of = _by_prompt(rows, sides)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    places: list[list[list[int]]] = []  # of each group, of each answer
    for prompt, answers in groups:
        shared, begin = _shared(answers), len(ids)
        trunk = len(prompt) + shared
        ids += [*prompt, *answers[0][:shared]]
        positions += range(trunk)
        found = []
        for answer in answers:
            start, rest = len(ids), answer[shared:-1]
            ids += rest
            positions += range(trunk, trunk + len(rest))
            in_trunk = range(begin + len(prompt) - 1, begin + trunk)
            found.append([*in_trunk, *range(start, start + len(rest))])
        places.append(found)
        segments.append((trunk, tuple(len(answer) - 1 - shared for answer in answers)))
    lengths = torch.tensor([len(groups[g][1][a]) for g, a in answer_of])
    return FlatBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        places=torch.tensor([place for g, a in answer_of for place in places[g][a]]),
        targets=torch.tensor([token for g, a in answer_of for token in groups[g][1][a]]),
        token_rows=torch.repeat_interleave(torch.arange(len(answer_of)), lengths),
        lengths=lengths,
        segments=tuple(segments),
        origins=_origins(rows),
    )


Group = tuple[tuple[int, ...], list[tuple[int, ...]]]


def _by_prompt(
    rows: Sequence[Mapping[str, Any]], sides: Sequence[str]
) -> tuple[list[Group], list[tuple[int, int]]]:
    """Return prompts with their different answers, and for each row of a batch group and answer."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(tuple(row["prompt_ids"]), []).append(i)
    laid: list[Group] = []
    group_of = [0] * len(rows)
    for prompt, members in by_prompt.items():
        answers = [[tuple(rows[i][side]) for side in sides] for i in members]
        together = list(dict.fromkeys(answer for row in answers for answer in row))
        apart = [list(dict.fromkeys(row)) for row in answers]
        # a pair may share more with itself than with the others of its prompt
        merged = flat_tokens(prompt, together) <= sum(flat_tokens(prompt, row) for row in apart)
        for i in members:
            group_of[i] = len(laid) if merged else len(laid) + members.index(i)
        laid += [(prompt, row) for row in ([together] if merged else apart)]
    # all first answers, then all second ones
    places = [
        (group_of[i], laid[group_of[i]][1].index(tuple(row[side])))
        for side in sides
        for i, row in enumerate(rows)
    ]
    return laid, places


def _shared(answers: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all answers begin with, at most all but one of the shortest."""
    if len(answers) < 2:
        return 0
    most = min(map(len, answers)) - 1
    first = answers[0]
    return next(
        (i for i in range(most) if any(answer[i] != first[i] for answer in answers[1:])), most
    )


def collate_pairs(
    rows: Sequence[Mapping[str, Any]], *, pad_id: int, padding_side: Side = "right"
) -> PairBatch:
    """Pad pairs to the longest row of the batch."""
    sides = [(row["prompt_ids"], row[f"{name}_ids"]) for name in _PAIR for row in rows]
    tensors = _pad(sides, pad_id, padding_side)
    chosen, rejected = (_scores(rows, name) for name in _PAIR)
    places = _predicted(tensors[2])
    return PairBatch(*tensors, _origins(rows), chosen, rejected, places)


def collate_labelled(
    rows: Sequence[Mapping[str, Any]], *, pad_id: int, padding_side: Side = "right"
) -> LabelledBatch:
    """Pad labelled rows to the longest row of the batch."""
    import torch

    tensors = _pad([(r["prompt_ids"], r["completion_ids"]) for r in rows], pad_id, padding_side)
    label = torch.tensor([bool(row["label"]) for row in rows])
    batch = LabelledBatch(*tensors, label, _origins(rows), predicted=_predicted(tensors[2]))
    if "mismatched_ids" not in rows[0]:
        return batch
    other = [(r["prompt_ids"], r["mismatched_ids"]) for r in rows]
    tensors = _pad(other, pad_id, padding_side)
    places = _predicted(tensors[2])
    return replace(
        batch, mismatched=LabelledBatch(*tensors, label, batch.origins, predicted=places)
    )


def _predicted(completion_mask: torch.Tensor) -> torch.Tensor:
    """Return the places that predict a completion token: found here, a device need not be waited for."""
    import torch

    return torch.stack(completion_mask[:, 1:].nonzero(as_tuple=True))


_PAIR = ("chosen", "rejected")
Batch = TypeVar("Batch", PairBatch, LabelledBatch, FlatBatch)


def _pad(
    sides: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, padding_side: Side
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    if not sides:
        raise DataError("a batch without rows cannot be padded; at least one row is expected.")
    if padding_side not in ("right", "left"):
        raise DataError(f"padding_side is {padding_side!r}; expected 'right' or 'left'.")
    time = max(len(prompt) + len(answer) for prompt, answer in sides)
    ids = torch.full((len(sides), time), pad_id, dtype=torch.long)  # [rows, time]
    attention = torch.zeros_like(ids)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(sides):
        length = len(prompt) + len(answer)
        start = 0 if padding_side == "right" else time - length
        ids[i, start : start + length] = torch.tensor([*prompt, *answer], dtype=torch.long)
        attention[i, start : start + length] = 1
        completion[i, start + len(prompt) : start + length] = True
    return ids, attention, completion


def _origins(rows: Sequence[Mapping[str, Any]]) -> tuple[Origin, ...]:
    return tuple(
        Origin(row.get("file", "<memory>"), row.get("row", i + 1)) for i, row in enumerate(rows)
    )


def _scores(rows: Sequence[Mapping[str, Any]], side: str) -> torch.Tensor | None:
    import torch

    values = [row.get(f"{side}_score") for row in rows]
    return None if None in values else torch.tensor(values, dtype=torch.float32)


def sent(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Return a tensor on a device; a card is not waited for, which may be busy with what came before."""
    import torch

    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the next copy is queued behind it


def _moved(batch: Batch, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    import torch

    tensors: dict[str, Any] = {
        k: move(v) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)
    }
    other: Any = getattr(batch, "mismatched", None)
    if other is not None:
        tensors["mismatched"] = _moved(other, move)
    return replace(batch, **tensors)
