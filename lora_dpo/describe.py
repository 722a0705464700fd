"""The table of objectives as text for the command line and the documents."""

from __future__ import annotations

from lora_dpo.objectives import OBJECTIVES, Hyperparameter, Objective


def describe_table() -> str:
    """Return one line an objective: name, data, reference, hyperparameters, source."""
    rows = [("objective", "data", "reference", "hyperparameters", "source")]
    rows += [
        (
            row.name,
            row.data,
            "yes" if row.reference else "no",
            ", ".join(map(_default, row.hyperparameters.values())) or "-",
            f"arXiv:{row.arxiv} {row.equation}",
        )
        for row in OBJECTIVES.values()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def describe_objective(row: Objective) -> str:
    """Return everything about one objective: its docstring, and the facts of its record."""
    taken = [f"  {_default(h)}: {h.expected}" for h in row.hyperparameters.values()]
    facts = [
        f"data: {row.data}; reference: {'yes' if row.reference else 'no, it never runs'}; "
        f"reads {'summed' if row.logps == 'sum' else 'per-token mean'} log-probs",
        f"rows of a batch {'depend on each other' if row.couples_rows else 'do not depend on each other'}",
        f"paper: {row.paper}, arXiv:{row.arxiv}, {row.equation}",
    ]
    head = [row.name, "", row.documentation, "", "Hyperparameters:", *(taken or ["  none"]), ""]
    return "\n".join([*head, *facts])


def _default(known: Hyperparameter) -> str:
    value = str(known.default).lower() if known.interval is None else f"{known.default:g}"
    return f"{known.name}={value}"
