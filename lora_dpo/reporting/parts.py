"""Parts of the page, each from one file of a run; a file in another form is a problem, not an end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_dpo.before_and_after import at_the_reference
from lora_dpo.reporting.curves import HELD_OUT
from lora_dpo.reporting.reading import Recorded, is_number
from lora_dpo.reporting.tables import Cell, Table, cell, flat, interval, setting, size, table

Part = TypeVar("Part")
MOST_ANSWERS = 40  # of a comparison


@dataclass(frozen=True)
class Finding:
    """One finding of ``diagnostics.json``."""

    name: str
    state: str
    what: str
    why: str
    remedies: tuple[str, ...]
    rows: tuple[str, ...]
    measured: Table


@dataclass(frozen=True)
class Sample:
    """What models write for one prompt: when, and texts by the models' names."""

    when: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Comparison:
    """What ``lora-dpo compare`` found last: figures of each model, sentences, answers."""

    heading: str
    figures: Table
    findings: tuple[str, ...]
    remarks: tuple[str, ...]
    answers: tuple[Sampled, ...]
    left_out: int


@dataclass(frozen=True)
class Sampled:
    """The samples of one prompt, the newest first."""

    prompt: str
    samples: tuple[Sample, ...]


def read_part(
    name: str, runs: Sequence[Recorded], make: Callable[[Recorded], Part], problems: list[str]
) -> dict[str, Part]:
    """Make a part of every run that has it.

    A file that somebody else wrote, or another version, may be JSON and in another form.
    """
    found = {}
    for run in runs:
        try:
            part = make(run)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            problems.append(
                f"{run.name}: {name}: not in the form that we write ({reason}); left out"
            )
            continue
        if part:
            found[run.name] = part
    return found


def findings(run: Recorded) -> tuple[Finding, ...]:
    """Return the run's findings, what was found first."""
    order = ("found", "not found", "not measured")
    made = [
        Finding(
            str(f["name"]),
            str(f["state"]),
            str(f["what"]),
            str(f["why"]),
            tuple(map(str, f["remedies"])),
            tuple(map(str, f["rows"])),
            table("Measured", ("what", "value"), f["measured"].items()),
        )
        for f in run.findings
    ]
    return tuple(sorted(made, key=lambda f: order.index(f.state) if f.state in order else 3))


def held_out(run: Recorded) -> dict[str, tuple[Cell, Cell]]:
    """Return of each held-out metric what it was at the reference, and what it became."""
    found = run.results.get("held_out")
    if not found:
        return {}
    metrics: Mapping[str, Any] = found["mean_low_high"]
    start = next((x for x in run.history if x["step"] == 0 and f"{HELD_OUT}loss" in x), None)
    objective, moves = run.objective_name, run.reference_moves
    rows = {}
    for name, values in metrics.items():
        mean, low, high = values
        before = (
            start.get(f"{HELD_OUT}{name}")
            if start
            else at_the_reference(name, metrics, objective=objective, moves=moves)
        )
        rows[name] = (cell(before), interval(mean, low, high))
    return rows


def held_out_table(parts: Mapping[str, Mapping[str, tuple[Cell, Cell]]]) -> Table:
    """Return the held-out metrics of all runs, before and after; the runs of one metric together."""
    names = list(dict.fromkeys(name for part in parts.values() for name in part))
    several = len(parts) > 1
    rows = (
        [name, *([run] if several else []), *part[name]]
        for name in names
        for run, part in parts.items()
        if name in part
    )
    heads = ("held out", *(["run"] if several else []), "reference", "policy [95 % interval]")
    remark = (
        "Held-out rows. Of the reference: evaluated at step 0 if that was logged; else what holds by "
        "definition where policy and reference are one, log-probs as the policy's less the log-ratio."
    )
    return table("Before and after", heads, rows, remark, grouped=several)


def sampled(run: Recorded) -> tuple[Sampled, ...]:
    """Return the samples of ``samples.jsonl`` by prompt."""
    by_prompt: dict[str, list[Sample]] = {}
    for line in run.samples:
        texts = tuple((name, str(line.get(name, ""))) for name in ("policy", "reference"))
        sample = Sample(f"step {line['step']}", texts)
        by_prompt.setdefault(as_text(line["prompt"]), []).append(sample)
    return tuple(Sampled(p, tuple(reversed(found))) for p, found in by_prompt.items())


def as_text(prompt: Any) -> str:
    """Return a prompt, a text or messages, as text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def comparison(run: Recorded) -> Comparison | None:
    """Return what ``comparison.json`` holds."""
    found = run.comparison
    if not found:
        return None
    models = found["models"]
    names = list(dict.fromkeys(name for model in models for name in model["measures"]))
    rows = (
        [name.replace("_", " "), str(model["name"]), *_measured(model["measures"][name])]
        for name in names
        for model in models
        if name in model["measures"]
    )
    heads = ("measured", "model", "mean [95 % interval]", "change", "p")
    judge = f", judged by {found['judge']}" if found.get("judge") else ""
    each = "1 answer" if found["samples"] == 1 else f"{found['samples']} answers"
    return Comparison(
        heading=(
            f"{found['prompts']} prompts, {each} each of at most "
            f"{found['max_new_tokens']} tokens, seed {found['seed']}{judge}"
        ),
        figures=table("Comparison", heads, rows, grouped=True),
        findings=tuple(map(str, found["findings"])),
        remarks=(
            *map(str, found["tests"]),
            *(f"{m['name']}: {note}" for m in models for note in m.get("notes", ())),
        ),
        answers=tuple(
            Sampled(
                as_text(row["prompt"]),
                (Sample("", tuple((str(k), str(v)) for k, v in row["texts"].items())),),
            )
            for row in found["answers"][:MOST_ANSWERS]
        ),
        left_out=max(len(found["answers"]) - MOST_ANSWERS, 0),
    )


def _measured(found: Mapping[str, Any]) -> list[Cell]:
    change = interval(*found["change"]) if found.get("change") else cell(None)
    return [interval(*found["mean_low_high"]), change, cell(found.get("p_value"))]


def versions(run: Recorded) -> dict[str, str]:
    """Return the versions and the machine that the run's results depend on."""
    return {str(name): str(found) for name, found in run.results.get("versions", {}).items()}


def plans(run: Recorded) -> tuple[Table, ...]:
    """Return what the planner said against what was measured, and its bytes by part."""
    plan = run.plan
    if not plan:
        return ()
    measured = plan.get("measured") or {}
    seconds, took = plan.get("seconds_floor"), measured.get("seconds_a_step")
    peak, most = plan.get("peak_bytes"), measured.get("peak_bytes")
    rows = [
        ["peak memory", size(peak), size(most), _ratio(most, peak)],
        ["seconds a step", cell(seconds), cell(took), _ratio(took, seconds)],
    ]
    if "pairs_per_second" in measured:
        rows.append(["pairs a second", None, measured["pairs_per_second"], None])
    heads = ("", "planned", "measured", "measured / planned")
    both = table("Planned and measured", heads, rows, _plan_in_words(plan))
    if "parts" not in plan:
        return (both,)
    parts = ([name, size(found)] for name, found in plan["parts"].items() if found)
    return both, table("Planned peak by part", ("part", "size"), parts)


def _plan_in_words(plan: Mapping[str, Any]) -> str:
    whole = (
        ""
        if plan.get("measured")
        else "Nothing is measured yet: that is written when training ends. "
    )
    if "not_planned" in plan:
        return f"{whole}Not planned: {plan['not_planned']}."
    fits = {True: "fits into", False: "does NOT fit into"}.get(plan["fits"])
    room = f"; {fits} {plan['room_is']}, {size(plan['room_bytes'])}" if fits else ""
    return (
        f"{whole}Planned: {plan['recomputed_layers']} of {plan['layers']} layers recomputed{room}. The "
        "planned seconds are a floor: every operation at the card's full rate. The measured peak is "
        "the GPU allocator's."
    )


def _ratio(measured: Any, planned: Any) -> Cell:
    if not (is_number(measured) and is_number(planned) and planned):
        return cell(None)
    return cell(float(f"{measured / planned:.3g}"))


def exports(run: Recorded) -> tuple[tuple[Cell, ...], ...]:
    """Return the figures of each export, in the order of ``EXPORT_FIGURES``."""
    return tuple(tuple(map(cell, _export(line))) for line in run.exports)


def exports_table(parts: Mapping[str, Sequence[tuple[Cell, ...]]]) -> Table:
    """Return all exports side by side."""
    columns = [(run, figures) for run, each in parts.items() for figures in each]
    heads = ("", *(run for run, _ in columns))
    rows = ([name, *(f[i] for _, f in columns)] for i, name in enumerate(EXPORT_FIGURES))
    return table("Exports", heads, rows)


def _export(line: Mapping[str, Any]) -> list[Any]:
    proof = line.get("proof") or {}
    gate = proof.get("gate")
    verdict = "reported only" if proof else "none"
    if is_number(gate):
        verdict = "within the gate" if proof["kl"] <= gate else "ABOVE the gate"
    figures = [proof.get(key) for key in _PROOF]
    known = ("to", "kind", "base", "dtype")
    rest = flat({k: v for k, v in line.items() if v and k not in (*known, "proof")})
    further = "; ".join(f"{key} {setting(value)}" for key, value in rest.items())
    return [*(line[key] for key in known), verdict, *figures, further or None]


# Of a proof: its names, and ours. Log-probs are of held-out answers.
_PROOF = {
    "kl": "KL, nats a token",
    "gate": "gate",
    "noise": "policy's own noise",
    "top1": "same likeliest token",
    "greedy": "same greedy tokens",
    "nll": "policy, nats a token",
    "nll_exported": "exported, nats a token",
    "positions": "positions",
}
EXPORT_FIGURES = ("to", "kind", "base", "dtype", "proof", *_PROOF.values(), "further")
