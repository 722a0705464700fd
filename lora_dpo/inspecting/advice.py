"""From what was counted and measured to advice: each a pure function with its rule stated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_dpo.diagnostics.findings import Failure, Finding
from lora_dpo.inspecting.measures import Count, Readiness

UNLIKELY_BELOW = -3.0  # nats a token: a perplexity of 20
ENDS_ABOVE = 0.1

EMPTY = Failure(
    "empty rows",
    "they were left out here; 'train' stops at them, because they often mean a broken export",
    ("mend the rows, or set data.empty: drop",),
)
LEAKING = Failure(
    "leaking rows",
    "the policy is trained on prompts that it is evaluated on, so held-out figures are too good",
    (
        "leave the rows out of one of the files",
        "give one file alone: it is split by prompt, so that none is on both sides",
    ),
)
UNLIKELY = Failure(
    "unlikely answers",
    "a base that would hardly write the wanted answers is taught about texts that it does not "
    "produce; DPO moves probability between answers, and does not teach to write",
    (
        "objective sft on the chosen side first, then start from that adapter (model.adapter)",
        "objective orpo, which learns to write the chosen side meanwhile and needs no reference",
    ),
)
ENDLESS = Failure(
    "answers without an end",
    "the base does not expect the answer to end where it ends, so the end token's log-prob drowns "
    "the preference, and samples run on",
    (
        "objective sft on the chosen side first, then start from that adapter (model.adapter)",
        "objective orpo, or objective.nll_weight (0.1 to 1), which teach the end token meanwhile",
    ),
)
# What may be wrong with how rows are written for the model, before anything is trained.
FORMS = {
    "chat": "another template (data.chat_template), if the base was tuned on one that this is not",
    "texts for a chat model": (
        "give messages: the tokenizer has a chat template, and these rows are plain texts, to which "
        "no template is applied"
    ),
    "texts": "",
}


def empty_rows(counts: Sequence[Count]) -> Finding:
    """Whether there are rows without a prompt or without an answer."""
    found = sum(count.count for count in counts)
    rows = [where for count in counts for where, _ in count.examples]
    return EMPTY(
        found > 0, f"rows without a prompt or an answer: {found}", {"rows": found}, rows[:5]
    )


def leaking_rows(leaks: Count | None, rows: int) -> Finding:
    """Whether prompts stand in the training file and in the held-out one."""
    if leaks is None:
        return LEAKING.not_measured("no held-out file was given (--eval FILE)")
    what = f"{leaks.count} of {rows} rows have a prompt that is held out too"
    places = [f"{where} ({detail})" for where, detail in leaks.examples]
    return LEAKING(leaks.count > 0, what, {"rows": leaks.count}, places)


def unlikely_answers(found: Readiness | None, reason: str, *, form: str) -> Finding:
    """Whether wanted answers are unlikely under the base: below -3 nats a token.

    Args:
        found: what was measured.
        reason: why nothing was, where it was not.
        form: of the rows, one of ``FORMS``.
    """
    if found is None:
        return UNLIKELY.not_measured(reason)
    nats = found.wanted_nats_a_token
    what = f"a token of a wanted answer has {nats:.2f} nats (perplexity {math.exp(-nats):.3g})"
    measured = {"wanted_nats_a_token": nats}
    if not math.isnan(found.unwanted_nats_a_token):
        what += f", of an unwanted one {found.unwanted_nats_a_token:.2f}"
        measured["unwanted_nats_a_token"] = found.unwanted_nats_a_token
    return _with_form(UNLIKELY, form)(nats < UNLIKELY_BELOW, f"{what}; {found.rows} rows", measured)


def endless_answers(found: Readiness | None, reason: str, *, form: str) -> Finding:
    """Whether the base hardly ends wanted answers: probability of the end token below 0.1.

    Arguments as in ``unlikely_answers``.
    """
    if found is None:
        return ENDLESS.not_measured(reason)
    if math.isnan(found.end_probability):
        return ENDLESS.not_measured("every answer was cut before its end")
    what = (
        f"behind a wanted answer the base gives its end, {found.end_token}, a probability of "
        f"{found.end_probability:.3g} (median of {found.rows} rows)"
    )
    low = found.end_probability < ENDS_ABOVE
    measured = {"end_probability": found.end_probability}
    return _with_form(ENDLESS, form)(low, what, measured)


def _with_form(failure: Failure, form: str) -> Failure:
    remedies = (
        (*failure.remedies, FORMS[form]) if form == "chat" else (FORMS[form], *failure.remedies)
    )
    return Failure(failure.name, failure.why, tuple(filter(None, remedies)))
