"""Loss and gradient of an objective as curves: the real function, on records that are all but fixed.

What a curve runs over is found by asking the function: where the loss depends on chosen minus
rejected alone, that difference; otherwise each side by itself, the other one held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dpo.objectives import Objective
from lora_dpo.stats import PAIR_NEEDS, AnyStats, LabelledStats, PairStats

POINTS = 181
SIDE = -1.0  # nats (a token) of the answer that stands still, where there is no reference
# The other rows of the step, where rows depend on each other; shares of the range that is shown.
OTHERS = (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5, 0.7)
# Half of what is shown, in nats, where the rule of ``_reach`` shows too little or too much.
REACH = {
    "rebel": 4.0,
    "slic_hf": 4.0,
    "rpo_sq": 30.0,
    "fdpo_forward_kl": 4.0,
    "fdpo_alpha": 8.0,
    "fdpo_js": 12.0,
    "dpop": 8.0,
    "cal_dpo": 1000.0,
    "discopop": 40.0,
    "alpha_dpo": 3.0,
}
# Where the other side stands, in nats; else at its reference, where this loss would be level.
STANDS = {"apo_down": -20.0}
# A draw would make the curve a matter of chance.
SHOWN_WITH = {"beta_dpo": {"rho": 0.0}}


@dataclass(frozen=True)
class Curve:
    """One line of a picture: ``loss`` and its derivative with respect to ``x``, all ``[points]``."""

    name: str
    x: Tensor
    loss: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Curves:
    """The curves of one objective, and in words what they run over and what is held fixed."""

    curves: tuple[Curve, ...]
    axis: str
    held: tuple[str, ...]


def curves_of(row: Objective) -> Curves:
    """Return what is drawn of an objective, with its default hyperparameters."""
    values = {name: h.default for name, h in row.hyperparameters.items()} | SHOWN_WITH.get(
        row.name, {}
    )
    held = _held(row)
    if row.data != "paired" and not row.reference:
        x = torch.linspace(-_reach(row, values), -0.02, POINTS).double()
        alone = _curve(row, values, "", x, (1.0, 0.0))
        return Curves((alone,), "log-prob of the answer, nats a token", held)
    if row.data != "paired":
        reach = _reach(row, values)
        found = tuple(
            _curve(row, values, name, torch.linspace(-reach, reach, POINTS).double(), sides)
            for name, sides in (("wanted answer", (1.0, 0.0)), ("unwanted answer", (0.0, 1.0)))
        )
        return Curves(found, "log-ratio to the reference, nats", held)
    per_token = " a token" if row.logps == "mean" else ""
    if row.reference and row.name != "alpha_dpo":
        return _against_reference(row, values, per_token, held)
    return _without_reference(row, values, per_token, held)


def _against_reference(
    row: Objective, values: dict[str, float | bool], per_token: str, held: tuple[str, ...]
) -> Curves:
    reach = _reach(row, values)
    x = torch.linspace(-reach, reach, POINTS).double()
    if _reads_difference_alone(row, values, reach):
        curve = _curve(row, values, "", x, (0.5, -0.5))
        return Curves((curve,), f"margin of the log-ratios, nats{per_token}", held)
    other = STANDS.get(row.name, 0.0)
    sides = (
        _curve(row, values, "chosen", x, (1.0, 0.0), start=(0.0, other)),
        _curve(row, values, "rejected", x, (0.0, 1.0), start=(other, 0.0)),
    )
    where = f"the other side at a log-ratio of {other:g}" + (
        " (its reference)" if not other else ""
    )
    return Curves(sides, f"log-ratio of one side, nats{per_token}", (where, *held))


def _without_reference(
    row: Objective, values: dict[str, float | bool], per_token: str, held: tuple[str, ...]
) -> Curves:
    reach = _reach(row, values)
    if _reads_difference_alone(row, values, reach):
        x = torch.linspace(-reach, reach, POINTS).double()
        curve = _curve(row, values, "", x, (0.5, -0.5), start=(-reach, -reach))
        name = "log-prob of chosen minus that of rejected"
        return Curves((curve,), f"{name}, nats{per_token}", held)
    x = torch.linspace(-reach, -0.02, POINTS).double()
    sides = tuple(
        _curve(row, values, name, x, ends, start=start)
        for name, ends, start in (
            ("chosen", (1.0, 0.0), (0.0, SIDE)),
            ("rejected", (0.0, 1.0), (SIDE, 0.0)),
        )
    )
    if row.name == "sft":
        sides = sides[:1]
    return Curves(
        sides,
        f"log-prob of one side, nats{per_token}",
        (f"the other side at {SIDE:g} nats{per_token}", *held) if len(sides) > 1 else held,
    )


def _held(row: Objective) -> tuple[str, ...]:
    """Return in words what every record has beside the answer that moves."""
    words = []
    if "scores" in row.needs:
        chosen, rejected = _scores(row)
        words.append(f"scores {chosen:g} and {rejected:g}")
    if {"lengths", "first_logps", "sampled_logps"} & set(row.needs):
        words.append("both answers equally long")
    if "confidences" in row.needs:
        words.append("weight 1 (answers that the policy would write itself)")
    if "kls" in row.needs:
        words.append("token KLs of both sides 0")
    if "mismatched" in row.needs:
        words.append("baseline 0")
    if row.initial_state:
        words.append("state as at the start of training")
    if row.couples_rows:
        words.append(f"{len(OTHERS)} other rows of the step")
    if row.name in SHOWN_WITH:
        words += [f"{key} {value:g}" for key, value in SHOWN_WITH[row.name].items()]
    return tuple(words)


def _scores(row: Objective) -> tuple[float, float]:
    return (0.9, 0.1) if row.name == "sppo" else (1.5, 0.0)


def _reach(row: Objective, values: dict[str, float | bool]) -> float:
    """Return half of the range that shows the objective's bends, nats."""
    if row.name in REACH:
        return REACH[row.name]
    if row.name in ("orpo", "asft") or "beta" not in values:
        return 5.0  # of log-probs a token, which end at 0
    beta = float(values["beta"])
    return 1.0 / beta if row.extremes == "quadratic" else 6.0 / beta


def _reads_difference_alone(row: Objective, values: dict[str, float | bool], reach: float) -> bool:
    x = torch.linspace(-0.5, 0.5, 7).double() * reach
    start = (-reach, -reach)
    here = _curve(row, values, "", x, (0.5, -0.5), start=start).loss
    there = _curve(row, values, "", x, (0.5, -0.5), start=(start[0] - 1, start[1] - 1)).loss
    return torch.allclose(here, there, rtol=1e-9, atol=1e-12)


def _curve(
    row: Objective,
    values: dict[str, float | bool],
    name: str,
    x: Tensor,
    sides: tuple[float, float],
    start: tuple[float, float] = (0.0, 0.0),
) -> Curve:
    """Return a row's loss as its two sides go from ``start`` by ``x`` times ``sides``."""
    span = float(x.abs().max())
    # rows that do not depend on each other go through the function together
    parts = x.split(1) if row.couples_rows else (x,)
    found = [_points(row, values, part, sides, start, span) for part in parts]
    loss, gradient = (torch.cat(values) for values in zip(*found, strict=True))
    return Curve(name, x, loss, gradient)


def _points(
    row: Objective,
    values: dict[str, float | bool],
    x: Tensor,
    sides: tuple[float, float],
    start: tuple[float, float],
    span: float,
) -> tuple[Tensor, Tensor]:
    moved = x.clone().requires_grad_()
    chosen, rejected = (at + share * moved for at, share in zip(start, sides, strict=True))
    stats = _record(row, chosen, rejected, wanted=sides[0] > 0, span=span)
    state = [dict(row.initial_state)] if row.initial_state else []
    loss = row.loss(stats, *state, **values)
    # of a step that shares one loss, that loss; else of what all of its rows feel
    felt = loss.mean() if row.name == "dr_dpo" else loss.sum()
    (gradient,) = torch.autograd.grad(felt, moved)
    return loss[: len(x)].detach(), gradient


def _record(
    row: Objective, chosen: Tensor, rejected: Tensor, *, wanted: bool, span: float
) -> AnyStats:
    """Return a record whose first rows have these log-ratios (log-probs, where none is subtracted)."""
    fixed = torch.tensor(OTHERS if row.couples_rows else (), dtype=torch.float64) * span
    if row.data != "paired":
        moved = chosen if wanted else rejected
        ours = torch.cat([moved, fixed])
        zeros = torch.zeros_like(ours)
        labels = torch.cat([torch.full_like(moved, wanted).bool(), fixed > 0])
        fields = {"policy_logps": ours, "labels": labels}
        if row.reference:
            fields["reference_logps"] = zeros
        if "mismatched" in row.needs:
            fields |= {"policy_mismatched_logps": zeros, "reference_mismatched_logps": zeros}
        return LabelledStats(lengths=torch.ones(len(ours), dtype=torch.long), **fields)
    left, right = torch.cat([chosen, fixed / 2]), torch.cat([rejected, -fixed / 2])
    zeros, ones = torch.zeros_like(left), torch.ones(len(left), dtype=torch.long)
    fields = {
        "policy_chosen_logps": left,
        "policy_rejected_logps": right,
        "chosen_lengths": ones,
        "rejected_lengths": ones,
    }
    if row.reference:
        fields |= {"reference_chosen_logps": zeros, "reference_rejected_logps": zeros}
    for need in set(row.needs) - {"lengths"}:
        for name in PAIR_NEEDS[need]:
            if need in ("first_logps", "sampled_logps"):
                fields[name] = fields[name.replace(need, "logps")]
            elif need == "scores":
                fields[name] = torch.full_like(zeros, _scores(row)["rejected" in name])
            else:
                fields[name] = zeros
    return PairStats(**fields)
