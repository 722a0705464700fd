"""A config as YAML with a comment on every line, and the draft that holds one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from rich.console import RenderableType

from lora_dpo import objectives
from lora_dpo.config import Config
from lora_dpo.config.comments import COMMENTS
from lora_dpo.errors import OutputError
from lora_dpo.objectives._table import NLL_WEIGHT
from lora_dpo.planning import Plan
from lora_dpo.showing import Displayed, hanging, visible
from lora_dpo.store import write_text

COLUMN = 31  # where comments begin


@dataclass(frozen=True, repr=False)
class Draft(Displayed):
    """A config that the planner says fits. ``draft.write("my.yaml")``, or ``train(draft.config)``.

    Args:
        config: checked.
        text: the same as commented YAML.
        plan: what the planner says of it.
        notes: what was found and chosen, in sentences.
    """

    config: Config
    text: str
    plan: Plan
    notes: tuple[str, ...]

    template: ClassVar[str] = "draft"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo init: {self.config.output.dir}"

    def __repr__(self) -> str:
        config = self.config
        return f"Draft({config.objective.name} on {config.model.base}, {config.output.dir})"

    def lines(self) -> list[str]:
        """Return what was found, chosen and planned, in sentences."""
        return [*self.notes, *self.plan.lines()]

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        return [hanging(f"- {line}", 2) for line in self.lines()]

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the YAML.

        Raises:
            OutputError: something stands there already, and ``overwrite`` is not given.
        """
        target = Path(path)
        if target.is_dir() or (target.exists() and not overwrite):
            raise OutputError(
                f"{target}: exists already; choose another name, or give --overwrite."
            )
        write_text(target, self.text)
        return target

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "config": self.config.to_dict(),
            "text": self.text,
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
        }


def commented(
    values: Mapping[str, Mapping[str, Any]],
    *,
    header: Sequence[str] = (),
    reasons: Mapping[str, str] | None = None,
) -> str:
    """Return settings as YAML, each with its line of ``config.comments``.

    Args:
        values: settings by section.
        header: lines above all, without their sign.
        reasons: what is added to a comment, by dotted key, such as why the value was chosen.
    """
    lines = [f"# {visible(line)}" for line in header]
    for section, settings in values.items():
        lines.append(f"{section}:")
        for key, value in settings.items():
            where = f"{section}.{key}"
            comment = _comment(where, values) + visible((reasons or {}).get(where, ""))
            lines.append(f"  {key}: {_scalar(value)}".ljust(COLUMN - 1) + f" # {comment}")
    return "\n".join(lines) + "\n"


def _comment(where: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    section, key = where.split(".")
    if section != "objective" or key == "name":
        return COMMENTS.get(where, f"as you asked for ({where})")
    row = objectives.get(values["objective"]["name"])
    if where in COMMENTS and row.reference:
        return COMMENTS[where]
    known = row.hyperparameters.get(key, NLL_WEIGHT)
    return f"{known.expected}; `lora-dpo objectives {row.name}` explains it"


def _scalar(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)  # a line end within would end the line
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
