"""Options of TRL, Unsloth, axolotl and LLaMA-Factory, answered with ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lora_dpo.config.foreign_names import DATA, LORA, LOSSES, MODEL, OBJECTIVE, TRAIN, Row

TOOLS = {"T": "TRL", "U": "Unsloth", "A": "axolotl", "L": "LLaMA-Factory"}


@dataclass(frozen=True)
class Foreign:
    """An option of another tool.

    Args:
        option: its name there.
        tools: whose it is.
        ours: the dotted key here (of a loss, our objective's name); empty where none is needed.
        note: what to give, or why no setting is needed.
    """

    option: str
    tools: tuple[str, ...]
    ours: str
    note: str

    @property
    def answer(self) -> str:
        """What to do with it here, in words."""
        whose = (
            f"{' and '.join([', '.join(self.tools[:-1]), self.tools[-1]][-len(self.tools) :])}'s"
        )
        if not self.ours:
            return f"{whose}, and no setting here: {self.note}"
        return f"{whose}; here it is {self.ours}" + f" ({self.note})" * bool(self.note)


def foreign_options(tool: str | None = None) -> tuple[Foreign, ...]:
    """Return the options of other tools, in the order of our sections; of one tool, if it is named.

    Options that are fields of ``transformers.TrainingArguments`` are left out: they keep their names
    in the section ``train``.
    """
    return _of((*MODEL, *LORA, *DATA, *OBJECTIVE, *TRAIN), tool)


def foreign_losses(tool: str | None = None) -> tuple[Foreign, ...]:
    """Return the losses that other tools call otherwise; ``ours`` is the objective's name."""
    return _of(LOSSES, tool)


def answer_to_option(where: str) -> str | None:
    """Return what an option of another tool is here, in words.

    Args:
        where: the dotted place at which it stands, such as ``train.lora_r``.

    Returns:
        None for a name that none of them has, and where our own key of that place is meant.
    """
    found = _options().get(where.rpartition(".")[2])
    return found.answer if found is not None and found.ours != where else None


def answer_to_loss(name: object) -> str | None:
    """Return which objective another tool's loss is, in words; None if it is none of theirs."""
    return next((found.answer for found in foreign_losses() if found.option == name), None)


def _of(rows: tuple[Row, ...], tool: str | None) -> tuple[Foreign, ...]:
    known = (
        Foreign(option, tuple(TOOLS[letter] for letter in letters), ours, note)
        for option, letters, ours, note in rows
    )
    return tuple(found for found in known if tool is None or tool in found.tools)


@cache
def _options() -> dict[str, Foreign]:
    return {found.option: found for found in foreign_options()}
