"""Log-probs of the reference, computed once and kept beside the rows.

The reference of a run does not move, so one pass over the data serves every epoch, and every run
with the same base, starting adapter, quantisation and data: a sweep over objectives, betas or
learning rates pays for the reference once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.data import Tokenised, sent
from lora_dpo.engine import collate
from lora_dpo.errors import TrainingError
from lora_dpo.forward import completion_logps
from lora_dpo.heads import home_device
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.policy import reference
from lora_dpo.shortage import Width, narrowing
from lora_dpo.showing import bar

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "paired": ("reference_chosen_logps", "reference_rejected_logps"),
    "unpaired": ("reference_logps",),
    "demonstrations": ("reference_logps",),
}

NAMED = 10  # rows in a sentence


def with_reference_logps(
    policy: nn.Module, data: Tokenised, *, batch_size: int = 8, chunk: int = CHUNK_TOKENS
) -> Tokenised:
    """Return the rows with their log-probs under the reference, which then need not run in training.

    Args:
        policy: whose reference it is; the result is right for any policy with the same one, and
            the trainer proves on its first rows that it is.
        data: tokenised rows.
        batch_size: rows of a forward pass, fewer where memory runs out; 16-bit arithmetic moves a
            log-prob by some 0.1 nats between batch shapes.
        chunk: positions whose logits exist at one time.
    """
    table = torch.empty(len(data), len(COLUMNS[data.kind]), dtype=torch.float64)
    with bar("reference log-probs", len(data), "rows") as advance:
        for places, logps in reference_batches(
            policy, data, range(len(data)), batch_size=batch_size, chunk=chunk
        ):
            table[places] = logps
            advance(len(places))
    return with_columns(data, table)


def reference_batches(
    policy: nn.Module, data: Tokenised, places: Sequence[int], *, batch_size: int, chunk: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Run the reference on these rows, short ones first.

    Yields:
        The places of a batch, and its log-probs ``[rows, columns]``, float64, on the CPU.
    """
    device = home_device(policy)
    columns = len(COLUMNS[data.kind])
    order = sorted(places, key=lambda i: sum(map(len, _token_lists(data.rows[i]))))

    def run(rows: list[Mapping[str, Any]]) -> Tensor:
        batch = collate(policy, rows).to(device)
        with reference(policy):  # not around the yield: the caller may be gone for good
            logps = completion_logps(policy, batch, chunk=chunk)
        return logps.double().cpu().reshape(columns, len(rows)).T

    what, width = "the reference's log-probs", Width(batch_size)
    for part, found in narrowing(policy, data.rows, order, width, run, what):
        if len(part) > 1 and not bool(torch.isfinite(found).all()):
            # what is no number may reach rows beside it, which are not to blame
            yield from reference_batches(policy, data, part, batch_size=1, chunk=chunk)
        else:
            yield list(part), found


def with_columns(data: Tokenised, table: Tensor) -> Tokenised:
    """Return the rows with these log-probs ``[rows, columns]`` of the reference.

    Raises:
        TrainingError: names rows whose log-prob is not a finite number.
    """
    columns = COLUMNS[data.kind]
    check_finite_reference(data.rows, table)
    rows = data.rows.remove_columns([c for c in columns if c in data.rows.column_names])
    for name, column in zip(columns, table.T.tolist(), strict=True):
        rows = rows.add_column(name, column)
    return replace(data, rows=rows)


def check_finite_reference(rows: Any, table: Tensor) -> None:
    """Hold that the reference gives every answer some probability, so that a log-ratio exists.

    Args:
        rows: with file and row.
        table: log-probs of the reference ``[rows, columns]``.

    Raises:
        TrainingError: names the rows.
    """
    bad = (~torch.isfinite(table)).any(1).nonzero().flatten().tolist()
    if not bad:
        return
    values = table[bad[0]]
    raise TrainingError(
        f"{row_places([rows[i] for i in bad])}: the log-prob of an answer under the reference is "
        f"{float(values[~torch.isfinite(values)][0])}, so no log-ratio exists. Nothing was trained. Remove "
        "these rows, or use model.compute_dtype: float32 if the base is sound in it."
    )


def row_places(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return where rows stand, in words: file and line of the first ones."""
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(f"{row['file']}:{row['row']}" for row in rows[:NAMED]) + more


def has_known_reference(data: Tokenised) -> bool:
    """Whether the rows carry log-probs of the reference."""
    return set(COLUMNS[data.kind]) <= set(data.rows.column_names)


def known_reference(rows: Sequence[Mapping[str, Any]], device: Any) -> Tensor | None:
    """Return the kept log-probs of a batch, ``[rows]`` in the order of its collation, or None."""
    for columns in COLUMNS.values():
        if all(name in row for row in rows for name in columns):
            values = [row[name] for name in columns for row in rows]
            return sent(torch.tensor(values, dtype=torch.float32), device)
    return None


def without_known_reference(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without kept log-probs, so that the reference runs on it."""
    kept = {name for columns in COLUMNS.values() for name in columns}
    return {name: value for name, value in row.items() if name not in kept}


def check_known_reference(
    rows: Sequence[Mapping[str, Any]], computed: Tensor, dtype: torch.dtype
) -> list[str]:
    """Hold that kept log-probs are those of this reference; return a sentence on how near they are.

    Args:
        rows: that carry them.
        computed: log-probs of these rows now, nats, in the order of their collation.
        dtype: of the computation: 16 bits differ more from one batch shape to another.

    Raises:
        TrainingError: they are another reference's, or of other rows; or one computed now is not a
            finite number.
    """
    check_finite_reference(rows, computed.reshape(-1, len(rows)).T)
    kept = known_reference(rows, computed.device)
    if kept is None:
        return []
    away = float((kept - computed.float()).abs().max())
    fixed, share = (0.1, 1e-2) if dtype in (torch.bfloat16, torch.float16) else (1e-2, 1e-4)
    allowed = fixed + share * float(computed.abs().max())
    if not away <= allowed:
        raise TrainingError(
            f"reference log-probs kept with the rows differ by {away:.3g} nats from those of this "
            f"policy's reference on the first rows (allowed {allowed:.2g}). Compute them again: "
            "with_reference_logps(policy, data), or in another train.reference_cache_dir."
        )
    return [
        f"reference log-probs kept with the rows: on the first {len(rows)} they differ by {away:.2g} "
        f"nats from those computed now (allowed {allowed:.2g}: batch shape moves arithmetic)"
    ]


def _token_lists(row: Mapping[str, Any]) -> list[Sequence[int]]:
    return [value for name, value in row.items() if name.endswith("_ids")]
