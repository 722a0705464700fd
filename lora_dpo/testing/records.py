"""Records of statistics that hold what an objective declares, for checks of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_dpo.objectives import Objective
from lora_dpo.stats import PAIR_NEEDS, AnyStats, LabelledStats, PairStats


def make_stats(
    row: Objective,
    policy: tuple[list[float], list[float]],
    fixed: tuple[list[float], list[float]],
    *,
    dtype: torch.dtype = torch.float64,
    needs: frozenset[str] | None = None,
    reference: bool = True,
) -> AnyStats:
    """Return a record with given summed log-probs, and all that the objective declares beside.

    Args:
        row: the objective, which says whether the record is of pairs or of labelled rows.
        policy: log-probs of chosen (wanted) and rejected (unwanted) answers, nats.
        fixed: the same under the reference.
        dtype: of the log-probs.
        needs: other needs than the declared ones.
        reference: whether the record has one.
    """
    wanted = frozenset(row.needs) if needs is None else needs
    chosen, rejected, fixed_chosen, fixed_rejected = (
        torch.tensor(values, dtype=dtype) for values in (*policy, *fixed)
    )
    if row.data != "paired":
        return _labelled(
            (chosen, rejected),
            (fixed_chosen, fixed_rejected),
            wanted,
            reference=reference,
            all_wanted=row.data == "demonstrations",
        )
    count = len(chosen)
    fields = {
        "policy_chosen_logps": chosen,
        "policy_rejected_logps": rejected,
        "chosen_lengths": torch.full((count,), 7),
        "rejected_lengths": torch.full((count,), 11),
    }
    if reference:
        fields |= {
            "reference_chosen_logps": fixed_chosen,
            "reference_rejected_logps": fixed_rejected,
        }
    steps = torch.linspace(0.1, 0.4, count, dtype=dtype)
    for need in wanted - {"lengths"}:
        for name in PAIR_NEEDS[need]:
            if need in ("first_logps", "sampled_logps"):
                fields[name] = 0.5 * fields[name.replace(need, "logps")]  # half of the tokens
            elif need == "scores":
                fields[name] = 0.5 + steps if "chosen" in name else 0.5 - steps
            elif need == "confidences":
                fields[name] = -steps
            else:
                fields[name] = steps if "chosen" in name else 2 * steps
    return PairStats(**fields)


def _labelled(
    policy: tuple[Tensor, Tensor],
    fixed: tuple[Tensor, Tensor],
    needs: frozenset[str],
    *,
    reference: bool,
    all_wanted: bool,
) -> LabelledStats:
    ours, theirs = torch.cat(policy), torch.cat(fixed)
    labels = torch.cat([torch.ones(len(policy[0])), torch.zeros(len(policy[1]))]).bool()
    labels |= all_wanted
    fields = {"policy_logps": ours, "lengths": torch.full((len(ours),), 7), "labels": labels}
    if reference:
        fields["reference_logps"] = theirs
    if "mismatched" in needs:
        steps = torch.linspace(0.1, 0.4, len(ours), dtype=ours.dtype)
        fields |= {"policy_mismatched_logps": theirs + steps, "reference_mismatched_logps": theirs}
    return LabelledStats(**fields)


def random_stats(row: Objective, *, seed: int = 0, nats: float = 40.0, **options: Any) -> AnyStats:
    """Return a record of six rows whose log-probs are drawn from -1 down to ``-1 - nats``.

    Further options are those of ``make_stats``.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (-torch.rand(4, 6, generator=generator, dtype=torch.float64) * nats - 1).tolist()
    return make_stats(row, (values[0], values[1]), (values[2], values[3]), **options)
