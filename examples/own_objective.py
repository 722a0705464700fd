"""Register an objective of your own, check that it keeps the contract, and train with it by name.

python examples/own_objective.py [steps]
"""

from __future__ import annotations

import sys
import tempfile

from torch import Tensor

from lora_dpo import Config, PairStats, objectives, train
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.testing import check_objective


@objectives.objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    smooth=False,
    paper="Statistical Rejection Sampling Improves Preference Optimization (Liu et al., 2023)",
    arxiv="2309.06657",
    equation="the hinge loss on normalised likelihoods",
)
def my_hinge(stats: PairStats, *, beta: objectives.Positive = 0.1) -> Tensor:
    """Hinge loss on the margin: ``max(0, 1 - beta * margin)``.

    Args:
        stats: log-probs of a batch of pairs, nats; a reference is required.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        1 where the policy equals the reference; 0 above the margin ``1 / beta``.

    Source:
        arXiv:2309.06657.
    """
    return (1 - beta * stats.margins).clamp(min=0)


def main(steps: int = 5) -> float:
    """Check the objective, train for a few steps and return the held-out accuracy."""
    check_objective("my_hinge")
    print("my_hinge keeps the contract of objectives")
    with tempfile.TemporaryDirectory() as folder:
        config = Config.load(
            "configs/quickstart.yaml",
            [
                "objective={name: my_hinge, beta: 0.5}",
                f"train.max_steps={steps}",
                f"output.dir={folder}/run",
                "output.diagnose=false",
                "output.samples=0",
            ],
        )
        run = train(config)
        accuracy: float = run.results["held_out"]["mean_low_high"]["rewards/accuracies"][0]
        print(f"held-out accuracy {accuracy:.3f}")
        return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
