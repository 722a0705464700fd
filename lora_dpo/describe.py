"""The table of objectives as text for the command line and the documents."""

from __future__ import annotations

from lora_dpo.objectives import OBJECTIVES, Hyperparameter, Objective

HEADER = ("objective", "data", "reference", "hyperparameters", "source")


def describe_table() -> str:
    """Return one line an objective: name, data, reference, hyperparameters, source."""
    rows = [HEADER, *_rows()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the same table in Markdown: the one in the README."""
    rows = [HEADER, ("---",) * len(HEADER), *_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows() -> list[tuple[str, ...]]:
    """Return the table's cells: on pairs with a reference, without one, then on single answers."""
    ordered = sorted(OBJECTIVES.values(), key=lambda r: (r.data, not r.reference, r.name))
    return [
        (
            row.name,
            row.data,
            "yes" if row.reference else "no",
            ", ".join([*map(_default, row.hyperparameters.values()), *_own_nll(row)]) or "-",
            f"arXiv:{row.arxiv} {row.equation}",
        )
        for row in ordered
    ]


def describe_objective(row: Objective) -> str:
    """Return everything about one objective: its docstring, and the facts of its record."""
    taken = [f"  {_default(h)}: {h.expected}" for h in row.hyperparameters.values()]
    needs = ", ".join(row.needs) or "log-probs alone"
    facts = [
        f"data: {row.data}; reference: {'yes' if row.reference else 'no, it never runs'}; "
        f"reads {'summed' if row.logps == 'sum' else 'per-token mean'} log-probs",
        f"reads of the data: {needs}",
        f"rows of a batch {'depend on each other' if row.couples_rows else 'do not depend on each other'}",
        f"paper: {row.paper}, arXiv:{row.arxiv}, {row.equation}",
    ]
    if row.nll_weight is not None:
        facts.append(f"takes nll_weight={row.nll_weight:g} too: weight of the SFT term beside it")
    head = [row.name, "", row.documentation, "", "Hyperparameters:", *(taken or ["  none"]), ""]
    return "\n".join([*head, *facts])


def _default(known: Hyperparameter) -> str:
    value = str(known.default).lower() if known.interval is None else f"{known.default:g}"
    return f"{known.name}={value}"


def _own_nll(row: Objective) -> list[str]:
    return [f"nll_weight={row.nll_weight:g}"] if row.nll_weight else []
