"""What to make of a curve: how it is read, and what the run's diagnostics say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_dpo.reporting.reading import Recorded

FALL = 1.0  # nats an answer, as in diagnostics.detectors.displacement
FALL_A_TOKEN = 0.1  # nats; a long answer may lose more in all

READING = {
    "loss": (
        "Held-out loss that rises while training loss falls says that the run has gone on too long: "
        "take the best checkpoint."
    ),
    "rewards/margins": "Reward of the chosen minus that of the rejected answer: it should rise.",
    "rewards/accuracies": (
        "Share of pairs in the right order; a tie counts half, so a policy that is its reference "
        "has 0.5. Training far above held-out: pairs are learnt by heart."
    ),
    "rewards/chosen": (
        "May fall: the objective rewards the margin alone. How far that is normal, "
        "logratios/chosen tells."
    ),
    "rewards/rejected": "Should fall faster than rewards/chosen.",
    "logratios/chosen": (
        "Policy minus reference, of a whole answer. Below 0 is normal as long as an answer has lost "
        "less than 1 nat, or less than 0.1 nats a token; beyond, its probability goes to answers that "
        "nobody asked for. A dashed line marks that point where a curve comes near it."
    ),
    "logratios/rejected": "Policy minus reference, of a whole answer: it should fall.",
    "kl": "Estimated from mismatched answers; the objective's zero point.",
    "grad_norm": "Before clipping. A peak that stays, or 0, is a sign to look at the learning rate.",
    "learning_rate": "As scheduled.",
    "tokens_per_second": "Tokens that the model goes through, between two log lines.",
    "memory/peak_gib": "The most so far: allocated on a GPU, resident on a CPU.",
}
# Where a finding, or a note of the run itself, stands.
CONCERNS = {
    "loss": ("over-optimisation", "not at the reference"),
    "rewards/margins": ("not learning", "runaway margins"),
    "rewards/accuracies": ("label noise", "memorising"),
    "rewards/chosen": ("likelihood displacement", "chosen falls a little"),
    "logratios/chosen": ("reference mismatch",),
    "lengths/chosen": ("length bias",),
}
NORMAL = {"chosen falls a little"}


@dataclass(frozen=True)
class Note:
    """A sentence beside a chart; ``state`` is ``ok``, ``found`` or empty."""

    text: str
    state: str = ""
    kind: str = ""


def notes_on(metric: str, runs: Sequence[Recorded]) -> list[Note]:
    """Return how a metric is read, and what is known of it in each run."""
    found = [Note(READING[metric])] if metric in READING else []
    concerns = CONCERNS.get(metric, ())
    for run in runs:
        if metric == "logratios/chosen":
            found += _chosen(run)
        for finding in run.findings:
            if finding.get("name") in concerns and finding.get("state") == "found":
                text = f"{run.name}: {finding.get('name')}: {finding.get('what')}"
                found.append(Note(text, "found"))
        found += [note for note in run_notes(run) if note.kind in concerns]
    return found


def run_notes(run: Recorded) -> list[Note]:
    """Return what was noted while the run went on."""
    return [
        Note(
            f"{run.name}, step {note.get('step')}: {note.get('kind')}: {note.get('text')}",
            "" if note.get("kind") in NORMAL else "found",
            str(note.get("kind")),
        )
        for note in run.notes
    ]


def chosen_limit(runs: Sequence[Recorded]) -> float:
    """Return the log-ratio of chosen answers below which no run is normal any more, nats."""
    return min(map(_limit, runs))


def _limit(run: Recorded) -> float:
    tokens = run.last("eval_lengths/chosen") or run.last("lengths/chosen") or 0.0
    return -max(FALL, FALL_A_TOKEN * tokens)


def _chosen(run: Recorded) -> list[Note]:
    """Say whether the chosen answers' log-ratio is where it is normal."""
    limit = _limit(run)
    for key, rows in (("eval_logratios/chosen", "held-out"), ("logratios/chosen", "training")):
        value = run.last(key)
        if value is None:
            continue
        begun = f"{run.name}: {rows} chosen answers are at {value:+.3g} nats against the reference"
        if value >= 0:
            return [Note(f"{begun}, at least as likely as under it", "ok")]
        if value > limit:
            return [Note(f"{begun}, which is normal (above {limit:.3g})", "ok")]
        todo = (
            "objective dpop or ipo, objective.nll_weight, a larger beta or a smaller learning rate"
        )
        return [Note(f"{begun}, which is NOT normal (below {limit:.3g}): {todo}", "found")]
    return []
