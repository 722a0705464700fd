"""The detectors: from measured numbers to a finding, each a pure function with its rule stated.

Thresholds are chosen so that chance alone seldom crosses them: a rate must differ from its neutral
value by two standard errors as well as by an amount that matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_dpo.diagnostics.findings import Failure, Finding

Array = NDArray[np.float64]

FELL_NATS = 1.0  # an answer; less is within what any run does
SATURATED = 5.0  # a margin beyond it hardly pulls any more: the slope of the logistic loss is 0.7 %

LENGTH_BIAS = Failure(
    "length bias",
    "the objective can lower its loss by preferring longer (or shorter) answers, whatever they say, "
    "and the policy then writes them",
    (
        "objective dpo_norm or simpo: log-probs per token",
        "objective rdpo, ld_dpo or sampo: the length difference is discounted",
        "data: pairs of like length, or data.min_margin to leave out close calls",
    ),
)
DISPLACEMENT = Failure(
    "likelihood displacement",
    "the margin grows because rejected answers sink faster, while the chosen ones sink too: their "
    "probability goes to answers that nobody asked for",
    (
        "objective dpop, which penalises a falling chosen side",
        "objective ipo or apo_zero",
        "objective.nll_weight (0.1 to 1): an SFT term on the chosen side",
        "objective.beta larger, or train.learning_rate smaller",
    ),
)
OVER_OPTIMISATION = Failure(
    "over-optimisation",
    "the policy has gone further from its reference than the preferences support; what held-out "
    "preferences say becomes worse, or samples degrade",
    (
        "fewer steps: train.num_train_epochs, or evaluate and export --checkpoint best",
        "objective.beta larger",
        "objective ipo, whose margin has a finite target; or objective.label_smoothing 0.1",
    ),
)
REFERENCE_MISMATCH = Failure(
    "reference mismatch",
    "the answers are ones that the reference would hardly write, so log-ratios start from noise and "
    "the policy is taught about texts that it does not produce",
    (
        "objective sft on the chosen side first, then start from that adapter (model.adapter)",
        "objective wpo, which weighs pairs by how likely the policy writes them",
        "data: pairs of the model's own samples, ranked",
    ),
)
LABEL_NOISE = Failure(
    "label noise",
    "pairs that stay on the wrong side all through training are often labelled the wrong way round, "
    "and the policy is pulled towards what should be rejected",
    (
        "objective robust, or objective.label_smoothing at the estimated rate",
        "objective dr_dpo or cauchy, which trust outlying pairs less",
        "data: look at the rows listed, and mend or remove them",
    ),
)
NOT_LEARNING = Failure(
    "not learning",
    "the policy is still its reference, so nothing was gained for the time",
    (
        "train.learning_rate higher (LoRA takes 5e-6 to 5e-4)",
        "more steps: train.num_train_epochs",
        "lora.rank higher, or lora.targets: all-linear",
    ),
)
SIMILARITY = Failure(
    "similar pairs",
    "chosen and rejected share most of their tokens, so pushing one down pushes the other down too "
    "(likelihood displacement)",
    (
        "objective dpop, ipo or objective.nll_weight",
        "data: leave out pairs that differ in a few words, if the difference does not matter",
    ),
)
ALL = (LENGTH_BIAS, DISPLACEMENT, OVER_OPTIMISATION, REFERENCE_MISMATCH, LABEL_NOISE, NOT_LEARNING)


@dataclass(frozen=True)
class Answers:
    """Wanted and unwanted answers: of a pair at the same index, or of two classes.

    Args:
        rewards: of wanted and of unwanted answers, in the objective's units; None before training.
        lengths: tokens of the same answers.
        paired: whether equal indices belong to one prompt.
    """

    lengths: tuple[Array, Array]
    rewards: tuple[Array, Array] | None = None
    paired: bool = True


def length_bias(answers: Answers, sampled_lengths: tuple[Array, Array] | None = None) -> Finding:
    """Whether length tells the wanted answers, and the reward or the policy's samples follow it.

    Found if a classifier by length alone is right by more than 0.6, two standard errors clear of
    1/2, and, where there was training, the reward rises or falls with length in the same sense
    (correlation beyond 0.3) or sampled lengths drift that way by a fifth.

    Args:
        answers: of held-out or training rows.
        sampled_lengths: tokens of samples of policy and reference.
    """
    wanted, unwanted = answers.lengths
    longer = _order(wanted, unwanted, answers.paired)
    accuracy, count = max(longer, 1 - longer), min(len(wanted), len(unwanted))
    sense = 1.0 if longer >= 0.5 else -1.0
    clear = accuracy > 0.6 and accuracy - 0.5 > 1 / math.sqrt(max(count, 1))
    difference = float(wanted.mean() - unwanted.mean())
    measured = {
        "accuracy_of_length_alone": accuracy,
        "wanted_is_longer_share": longer,
        "wanted_minus_unwanted_tokens": difference,
    }
    what = (
        f"by length alone {accuracy:.0%} of the preferences are told (wanted answers are "
        f"{abs(difference):.1f} tokens {'longer' if difference >= 0 else 'shorter'})"
    )
    followed = answers.rewards is None
    if answers.rewards is not None:
        reward_accuracy = _order(*answers.rewards, answers.paired)
        correlation = _rank_correlation(
            np.concatenate(answers.rewards), np.concatenate(answers.lengths)
        )
        measured |= {"reward_accuracy": reward_accuracy, "reward_length_correlation": correlation}
        what += f"; the reward tells {reward_accuracy:.0%}, its correlation with length is {correlation:.2f}"
        followed = sense * correlation > 0.3
    if sampled_lengths is not None:
        drift = float(sampled_lengths[0].mean() / max(sampled_lengths[1].mean(), 1.0))
        measured["sampled_length_ratio"] = drift
        what += f"; the policy's samples are {drift:.2f} times as long as the reference's"
        followed = followed or (drift > 1.2 if sense > 0 else drift < 1 / 1.2)
    return LENGTH_BIAS(clear and followed, what, measured)


def displacement(
    logratios: tuple[Array, Array], similarity: Mapping[str, float] | None = None
) -> Finding:
    """Whether wanted answers have become less likely than under the reference.

    Found if their mean log-ratio is below 0 by two standard errors and by 1 nat or more, and it fell
    for at least half of them.

    Args:
        logratios: policy minus reference of wanted and unwanted answers, nats.
        similarity: of wanted and unwanted answers, for the record.
    """
    wanted, unwanted = logratios
    mean, fell = float(wanted.mean()), float((wanted < 0).mean())
    measured = {
        "wanted_logratio_nats": mean,
        "unwanted_logratio_nats": float(unwanted.mean()) if len(unwanted) else math.nan,
        "share_of_wanted_that_fell": fell,
        **(similarity or {}),
    }
    others = f", unwanted ones by {measured['unwanted_logratio_nats']:+.2f}" * bool(len(unwanted))
    what = f"wanted answers moved by {mean:+.2f} nats{others}; {fell:.0%} of the wanted ones fell"
    return DISPLACEMENT(mean + 2 * _error(wanted) < -FELL_NATS and fell >= 0.5, what, measured)


@dataclass(frozen=True)
class Curve:
    """Values of one metric by step."""

    steps: Array
    values: Array


def over_optimisation(
    kl: tuple[Array, Array] | None,
    margins: Array,
    held_out: Mapping[str, Curve],
    training: Mapping[str, Curve],
    rows: int,
) -> Finding:
    """Whether held-out preferences became worse while training ones became better, or the KL is large.

    Found if held-out accuracy fell from its best by 0.03 and two standard errors while training
    accuracy rose; if held-out loss rose by a tenth from its least while training loss fell; or if
    samples are further than 0.5 nats a token from the reference.

    Args:
        kl: of each sample of the policy, its log-ratio to the reference in nats, and its tokens.
        margins: reward margins of held-out rows.
        held_out: ``loss`` and ``accuracy`` by step.
        training: the same of training rows.
        rows: held-out rows behind each value.
    """
    measured: dict[str, float] = {}
    parts, reasons = [], []
    if kl is not None:
        per_token = float(kl[0].sum() / max(kl[1].sum(), 1.0))
        measured |= {"kl_nats_a_sample": float(kl[0].mean()), "kl_nats_a_token": per_token}
        parts.append(
            f"KL {measured['kl_nats_a_sample']:.2f} nats a sample ({per_token:.3f} a token)"
        )
        reasons.append(per_token > 0.5)
    if len(margins):
        share = measured["share_of_saturated_margins"] = float((margins > SATURATED).mean())
        parts.append(f"{share:.0%} of the margins are above {SATURATED:g}")
    if "accuracy" in held_out and len(held_out["accuracy"].values) > 1:
        best, last = (
            float(held_out["accuracy"].values.max()),
            float(held_out["accuracy"].values[-1]),
        )
        measured |= {"best_held_out_accuracy": best, "last_held_out_accuracy": last}
        parts.append(f"held-out accuracy {last:.2f}, at best {best:.2f}")
        error = math.sqrt(best * (1 - best) / max(rows, 1))
        reasons.append(best - last > max(0.03, 2 * error) and rises(training.get("accuracy")))
    if "loss" in held_out and len(held_out["loss"].values) > 1:
        least, last = float(held_out["loss"].values.min()), float(held_out["loss"].values[-1])
        measured |= {"least_held_out_loss": least, "last_held_out_loss": last}
        parts.append(f"held-out loss {last:.3f}, at least {least:.3f}")
        falls = rises(training.get("loss"), sign=-1.0)
        reasons.append(last - least > 0.1 * abs(least) and falls)
    if not reasons:
        return OVER_OPTIMISATION.not_measured("no samples, and no held-out metrics by step")
    return OVER_OPTIMISATION(any(reasons), "; ".join(parts), measured)


def reference_mismatch(wanted: Array, unwanted: Array, own: Array) -> Finding:
    """Whether the data's answers are much less likely under the reference than its own samples.

    Found if wanted answers are 1 nat a token less likely, by three standard errors.

    Args:
        wanted: log-prob a token of wanted answers under the reference, nats.
        unwanted: of unwanted ones.
        own: of the reference's own samples for the same prompts.
    """
    gap = float(own.mean() - wanted.mean())
    error = math.hypot(_error(own), _error(wanted))
    measured = {
        "wanted_nats_a_token": float(wanted.mean()),
        "unwanted_nats_a_token": float(unwanted.mean()) if len(unwanted) else math.nan,
        "own_samples_nats_a_token": float(own.mean()),
    }
    others = f" of an unwanted one {measured['unwanted_nats_a_token']:.2f}," * bool(len(unwanted))
    what = (
        f"under the reference a token of a wanted answer has {wanted.mean():.2f} nats,{others} of its "
        f"own samples {own.mean():.2f}"
    )
    return REFERENCE_MISMATCH(gap > 1.0 and gap > 3 * error, what, measured)


def label_noise(seen: Mapping[str, Sequence[tuple[int, float]]]) -> Finding:
    """Whether some pairs stay strongly on the wrong side.

    Of each row the margins of the later half of the steps count. Strong is a mean beyond the median
    of the positive means, on either side; where a flipped label mirrors the margin, the share of
    strong negatives among all strong ones is the rate of flipped labels. Found if that is at least
    0.08, with three rows or more. After several epochs a policy knows its wrong labels by heart, and
    the estimate is too low.

    Args:
        seen: margins of each row (``file:row``) with the step at which they were seen.
    """
    last = max((step for visits in seen.values() for step, _ in visits), default=0)
    later = {
        row: values
        for row, visits in seen.items()
        if (values := [margin for step, margin in visits if 2 * step > last])
    }
    if len(later) < 20:
        return LABEL_NOISE.not_measured(f"only {len(later)} rows were seen in the later half")
    means = {row: float(np.mean(values)) for row, values in later.items()}
    positive = [mean for mean in means.values() if mean > 0]
    right = len(positive) / len(means)
    if right < 0.6:
        return LABEL_NOISE.not_measured(
            f"the policy tells only {right:.0%} of its training pairs, too few to judge labels by"
        )
    strong = float(np.median(positive))
    wrong = {row: mean for row, mean in means.items() if mean < -strong and max(later[row]) < 0}
    sure = sum(mean > strong for mean in means.values())
    rate = len(wrong) / (len(wrong) + sure)
    rows = sorted(wrong, key=lambda row: wrong[row])
    measured = {"estimated_rate": rate, "rows_strongly_wrong": len(rows), "rows_judged": len(means)}
    what = (
        f"{len(rows)} of {len(means)} training pairs stayed below a margin of {-strong:.2f}; "
        f"estimated rate of wrong labels {rate:.0%}"
    )
    return LABEL_NOISE(rate >= 0.08 and len(rows) >= 3, what, measured, rows)


def not_learning(logratios: Array, adapter_change: float, training: Mapping[str, Curve]) -> Finding:
    """Whether the policy has hardly moved.

    Found if its log-probs moved by less than 0.05 nats in the mean, or the adapter is as it began.

    Args:
        logratios: policy minus reference of held-out answers, nats.
        adapter_change: root mean square of what the adapters add to a weight.
        training: ``grad_norm`` and ``margin`` by step.
    """
    moved = float(np.abs(logratios).mean())
    measured = {"mean_abs_logratio_nats": moved, "adapter_change_rms": adapter_change}
    what = f"log-probs moved by {moved:.3g} nats, weights by {adapter_change:.2g} (rms)"
    for name in ("grad_norm", "margin"):
        if name in training and len(training[name].values):
            first, last = float(training[name].values[0]), float(training[name].values[-1])
            measured |= {f"first_{name}": first, f"last_{name}": last}
            what += f"; {name.replace('_', ' ')} {first:.3g} to {last:.3g}"
    return NOT_LEARNING(moved < 0.05 or adapter_change == 0.0, what, measured)


def similar_pairs(similarity: Mapping[str, float]) -> Finding:
    """Whether chosen and rejected are nearly the same texts.

    Found if they share more than 0.8 of their tokens in order, in the mean.

    Args:
        similarity: ``token_similarity`` in [0, 1], and what else was measured of the pairs.
    """
    shared = similarity["token_similarity"]
    what = f"chosen and rejected share {shared:.0%} of their tokens in order"
    if "hidden_similarity" in similarity:
        what += f"; cosine of their summed hidden states {similarity['hidden_similarity']:.2f}"
    return SIMILARITY(shared > 0.8, what, similarity)


def _order(wanted: Array, unwanted: Array, paired: bool) -> float:
    """Return the share of pairs, or of all couples, in which the wanted value is larger; ties 1/2."""
    differences = wanted - unwanted if paired else wanted[:, None] - unwanted[None]
    return float((np.sign(differences) + 1).mean() / 2)


def _rank_correlation(left: Array, right: Array) -> float:
    from scipy import stats

    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(stats.spearmanr(left, right).statistic)


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def rises(curve: Curve | None, sign: float = 1.0) -> bool:
    """Whether the later half of a curve is above the earlier one."""
    if curve is None or len(curve.values) < 2:
        return False
    half = len(curve.values) // 2
    return bool(sign * (curve.values[half:].mean() - curve.values[:half].mean()) > 0)
