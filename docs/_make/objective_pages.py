"""A page for every objective and the pages that list them, from the table and its docstrings."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from curves import Curves, curves_of
from pictures import draw

from lora_dpo.objectives import OBJECTIVES, Interval, Objective

SECTIONS = (
    "When to use",
    "Args",
    "Returns",
    "Limits",
    "Source",
    "Differs from",
)
GROWTH = {
    "linear": "grows in proportion to the margin",
    "bounded": "stays below a bound",
    "quadratic": "grows with the square of the margin",
    "logarithmic": "grows with the logarithm of the margin",
    "exponential": "grows exponentially",
}
DATA = {
    "paired": "pairs",
    "unpaired": "single answers with a label",
    "demonstrations": "single answers that are all wanted",
}
NEEDS = {
    "lengths": "lengths",
    "scores": "scores in the data",
    "first_logps": "log-probs of the first tokens",
    "sampled_logps": "log-probs of drawn tokens",
    "confidences": "how likely the policy would write the answers",
    "kls": "KL of every token",
    "mismatched": "log-probs of other rows' answers (a further forward pass)",
}
# The order of the lists: the module of an objective, and what its objectives have in common.
GROUPS = {
    "paired": "The margin against the reference",
    "sides": "Each side against the reference",
    "tokens": "Lengths and single tokens",
    "divergences": "Other divergences and links",
    "scored": "Scores in the data",
    "coupled": "Steps as a whole",
    "averaged": "No reference, log-probs per token",
    "reference_free": "No reference, whole log-probs",
    "unpaired": "Thumbs up and down",
}


def write_pages(folder: Path) -> None:
    """Write ``NAME.md``, ``NAME-light.svg`` and ``NAME-dark.svg`` of every objective, and ``index.md``."""
    folder.mkdir(exist_ok=True)
    for row in OBJECTIVES.values():
        found = curves_of(row)
        draw(found, folder, row.name)
        write(folder / f"{row.name}.md", page(row, found))
    write(folder / "index.md", index())


def write(path: Path, text: str) -> None:
    """Write a file if it is new or different, so that a second build has less to do."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def index() -> str:
    """Return the page that lists all objectives, a table a group."""
    parts = ["# All objectives", "[Which one](../choosing.md) helps to choose."]
    names = []
    for module, title in GROUPS.items():
        rows = [r for r in OBJECTIVES.values() if r.loss.__module__.endswith(f".{module}")]
        table = ["| | |", "|---|---|"]
        for row in sorted(rows, key=lambda r: r.name):
            names.append(row.name)
            table.append(f"| [`{row.name}`]({row.name}.md) | {_cell(row.summary)} |")
        parts += [f"## {title}", "\n".join(table)]
    assert sorted(names) == sorted(OBJECTIVES), "a module of objectives has no group"
    tree = "\n".join(names)
    parts.append(f"```{{toctree}}\n:hidden:\n\n{tree}\n```")
    return "\n\n".join(parts) + "\n"


def page(row: Objective, found: Curves) -> str:
    """Return the page of one objective."""
    told = sections(row)
    light, dark = (f"{row.name}-{scheme}.svg" for scheme in ("light", "dark"))
    words = alt_text(row, found)
    held = f" Held fixed: {'; '.join(found.held)}." if found.held else ""
    parts = [
        f"# {row.name}",
        markdown(row.summary),
        formula(told["formula"]),
        "## When to use it",
        markdown(told.get("When to use", row.summary)),
        "## Knobs",
        knobs(row, told["Args"]),
        f"```yaml\n{settings(row)}\n```",
        "## Loss and gradient",
        f"```{{image}} {light}\n:class: only-light\n:alt: {words}\n```",
        f"```{{image}} {dark}\n:class: only-dark\n:alt: {words}\n```",
        f"Over the {found.axis}, with the defaults.{held}",
        "## Limits",
        markdown(told["Limits"]),
        facts(row),
    ]
    if "Differs from" in told:
        parts += ["## Where other tools differ", markdown(told["Differs from"])]
    link = f"[arXiv:{row.arxiv}](https://arxiv.org/abs/{row.arxiv})"
    parts += [
        "## Paper",
        f"{row.paper}, {link}, {row.equation}.",
    ]
    if told["Source"] != f"arXiv:{row.arxiv}.":
        parts.append(markdown(told["Source"]))
    return "\n\n".join(parts) + "\n"


def sections(row: Objective) -> dict[str, str]:
    """Return the parts of an objective's docstring by name; ``formula`` is what precedes them."""
    body = inspect.getdoc(row.loss).split("\n", 1)[1]
    heads = "|".join(SECTIONS)
    pieces = re.split(rf"^({heads}):$", body, flags=re.MULTILINE)
    found = {"formula": pieces[0].strip()}
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        found[name] = inspect.cleandoc(text)
    return found


def formula(text: str) -> str:
    """Return the formula: as a block where it is nothing but code, else as a paragraph."""
    whole = re.fullmatch(r"``([^`]+)``", text)
    if whole:
        lines = "\n".join(line.strip() for line in whole[1].splitlines())
        return f"```text\n{lines}\n```"
    return markdown(text)


def markdown(text: str) -> str:
    """Return docstring text as Markdown; a name of the table becomes a link to its page."""
    joined = re.sub(r"(?<!\n)\n(?!\n)", " ", text)

    def code(match: re.Match[str]) -> str:
        name = match[1]
        return f"[`{name}`]({name}.md)" if name in OBJECTIVES else f"`{name}`"

    parts = re.split(r"(``[^`]+``)", joined)
    # outside of code nothing is markup
    plain = [re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts[::2]]
    codes = [re.sub(r"``([^`]+)``", code, part) for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*codes, ""], strict=True))


def knobs(row: Objective, args: str) -> str:
    """Return the table of hyperparameters, or that there are none."""
    told = arguments(args)
    lines = [
        f"| `{h.name}` | {_default(h.default)} | {_interval(h.interval)} | "
        f"{_cell(_without_range(told[h.name]))} |"
        for h in row.hyperparameters.values()
    ]
    if row.nll_weight is not None:
        lines.append(
            f"| `nll_weight` | {row.nll_weight:g} | [0,\u00a0inf) | weight of the SFT term on the chosen "
            "side (RPO), which any objective on pairs takes |"
        )
    if not lines:
        return "None: the learning rate is what is left to choose."
    return "\n".join(["| knob | default | range | what it does |", "|---|---|---|---|", *lines])


def _interval(interval: Interval | None) -> str:
    """Return a range in one piece: no line breaks inside."""
    return str(interval).replace(" ", "\u00a0") if interval else "true, false"


def arguments(text: str) -> dict[str, str]:
    """Return the explanation of each argument of a docstring's section Args."""
    found = re.split(r"^(\w+(?:, \w+)*):", text, flags=re.MULTILINE)
    return {
        name: " ".join(told.split())
        for names, told in zip(found[1::2], found[2::2], strict=True)
        for name in names.split(", ")
    }


def _without_range(text: str) -> str:
    """Drop the interval, which has a column of its own."""
    return re.sub(r",? in [\[(][\w., ]+[\])]", "", text, count=1)


def settings(row: Objective) -> str:
    """Return the section ``objective`` of a config that asks for it, with its defaults."""
    lines = ["objective:", f"  name: {row.name}"]
    lines += [f"  {h.name}: {_default(h.default)}" for h in row.hyperparameters.values()]
    if row.nll_weight:
        lines.append(f"  nll_weight: {row.nll_weight:g}")
    return "\n".join(lines)


def facts(row: Objective) -> str:
    """Return what the record says, as a list."""
    reads = "summed log-probs" if row.logps == "sum" else "log-probs per token"
    needs = "".join(f", {NEEDS[need]}" for need in row.needs)
    mean = "tokens" if row.reduction == "tokens" else "rows"
    lines = [
        f"Data: {DATA[row.data]}. Reference: {'yes' if row.reference else 'no, it never runs'}.",
        f"Reads {reads}{needs}.",
        "Rows of a step depend on each other; a step is the whole optimiser step, whatever the "
        "micro-batch."
        if row.couples_rows
        else f"Rows do not depend on each other; the mean is over {mean}.",
        f"Far on the wrong side the loss {GROWTH[row.extremes]}.",
    ]
    if not row.monotone:
        lines.append("It can rise when the chosen answer becomes likelier.")
    return "\n".join(f"- {line}" for line in lines)


def alt_text(row: Objective, found: Curves) -> str:
    """Return the picture in words: where each curve starts, stands at 0 and ends."""
    parts = []
    for curve in found.curves:
        start, end = float(curve.x[0]), float(curve.x[-1])
        parts.append(
            f"{curve.name or 'loss'} from {float(curve.loss[0]):.3g} at {start:.3g} to "
            f"{float(curve.loss[-1]):.3g} at {end:.3g} nats"
        )
    return f"Loss and gradient of {row.name}: {'; '.join(parts)}."


def _default(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _cell(text: str) -> str:
    return markdown(text).replace("|", "\\|")
