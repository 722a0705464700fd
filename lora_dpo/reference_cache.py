"""Log-probs of the reference, computed once and kept beside the rows.

The reference of a run does not move, so one pass over the data serves every epoch, and every run
with the same base, starting adapter, quantisation and data: a sweep over objectives, betas or
learning rates pays for the reference once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.data import Tokenised
from lora_dpo.engine import collate
from lora_dpo.errors import TrainingError
from lora_dpo.forward import completion_logps
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.policy import reference

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "paired": ("reference_chosen_logps", "reference_rejected_logps"),
    "unpaired": ("reference_logps",),
}


def with_reference_logps(
    policy: nn.Module, data: Tokenised, *, batch_size: int = 8, chunk: int = CHUNK_TOKENS
) -> Tokenised:
    """Return the rows with their log-probs under the reference, which then need not run in training.

    Args:
        policy: whose reference it is; the result is right for any policy with the same one, and
            the trainer proves on its first rows that it is.
        data: tokenised rows.
        batch_size: rows of a forward pass; 16-bit arithmetic moves a log-prob by some 0.1 nats
            between batch shapes.
        chunk: positions whose logits exist at one time.
    """
    device = next(policy.parameters()).device
    columns = COLUMNS[data.kind]
    order = sorted(range(len(data)), key=lambda i: sum(map(len, _token_lists(data.rows[i]))))
    table = torch.empty(len(data), len(columns), dtype=torch.float64)
    with reference(policy):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collate(policy, [data.rows[i] for i in places]).to(device)
            logps = completion_logps(policy, batch, chunk=chunk).double().cpu()
            table[places] = logps.reshape(len(columns), len(places)).T
    rows = data.rows.remove_columns([c for c in columns if c in data.rows.column_names])
    for name, column in zip(columns, table.T.tolist(), strict=True):
        rows = rows.add_column(name, column)
    return replace(data, rows=rows)


def has_known_reference(data: Tokenised) -> bool:
    """Whether the rows carry log-probs of the reference."""
    return set(COLUMNS[data.kind]) <= set(data.rows.column_names)


def known_reference(rows: Sequence[Mapping[str, Any]], device: Any) -> Tensor | None:
    """Return the kept log-probs of a batch, ``[rows]`` in the order of its collation, or None."""
    for columns in COLUMNS.values():
        if all(name in row for row in rows for name in columns):
            values = [row[name] for name in columns for row in rows]
            return torch.tensor(values, dtype=torch.float32, device=device)
    return None


def without_known_reference(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without kept log-probs, so that the reference runs on it."""
    kept = {name for columns in COLUMNS.values() for name in columns}
    return {name: value for name, value in row.items() if name not in kept}


def check_known_reference(rows: Sequence[Mapping[str, Any]], computed: Tensor) -> None:
    """Hold that kept log-probs are those of this reference.

    Raises:
        TrainingError: they are another reference's, or of other rows.
    """
    kept = known_reference(rows, computed.device)
    if kept is None:
        return
    away = float((kept - computed.float()).abs().max())
    allowed = 0.1 + 1e-2 * float(computed.abs().max())  # 16 bits differ by batch shape
    if away > allowed:
        raise TrainingError(
            f"reference log-probs kept with the rows differ by {away:.3g} nats from those of this "
            f"policy's reference on the first rows (allowed {allowed:.2g}). Compute them again: "
            "with_reference_logps(policy, data)."
        )


def _token_lists(row: Mapping[str, Any]) -> list[Sequence[int]]:
    return [value for name, value in row.items() if name.endswith("_ids")]
