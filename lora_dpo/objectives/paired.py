"""Objectives on preference pairs that read a reference.

The losses are functions of the log-ratios against the reference, so a policy that equals its
reference has margin 0 whatever the data.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.objectives._table import Positive, Smoothing, objective
from lora_dpo.stats import PairStats


def scaled_logratios(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logratio`` of both sides (arXiv:2305.18290, section 4)."""
    return beta * stats.chosen_logratios, beta * stats.rejected_logratios


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper="Direct Preference Optimization (Rafailov et al., 2023)",
    arxiv="2305.18290",
    equation="Eq. 7",
)
def dpo(stats: PairStats, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Logistic loss on the margin of the log-ratios; with label smoothing, conservative DPO.

    ``-(1 - eps) * log sigmoid(beta * margin) - eps * log sigmoid(-beta * margin)``

    Args:
        stats: log-probs of a batch of pairs, nats, each ``[batch]``; a reference is required.
        beta: strength of the pull to the reference, per nat, in (0, inf). 0.1 is usual; 0.01 to
            0.05 is often better for 7B models, 0.5 for short answers.
        label_smoothing: ``eps``, the share of pairs believed to be labelled the wrong way round,
            in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference, whatever beta and eps. For eps = 0: 0 as the
        margin goes to plus infinity, ``beta * |margin|`` as it goes to minus infinity. For
        eps > 0 the least value stands at ``beta * margin = log((1 - eps) / eps)``.

    Source:
        arXiv:2305.18290 Eq. 7; label smoothing: Mitchell, "A note on DPO with noisy preferences
        and relationship to IPO" (2023), Eq. 3 (conservative DPO).

    Differs from:
        TRL 0.29 and later, where ``label_smoothing`` is accepted with the sigmoid loss and has no
        effect.
    """
    z = beta * stats.margins
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
