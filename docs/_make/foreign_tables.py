"""Tables of other tools' options and ours, from the table by which configs are answered."""

from __future__ import annotations

from pathlib import Path

from objective_pages import markdown, write

from lora_dpo.config.foreign import Foreign, foreign_losses, foreign_options
from lora_dpo.objectives import OBJECTIVES

FILES = {"TRL": "trl", "Unsloth": "unsloth", "axolotl": "axolotl", "LLaMA-Factory": "llama_factory"}


def write_tables(folder: Path) -> None:
    """Write ``TOOL.md`` for each tool, to be included by the pages that are written by hand."""
    folder.mkdir(exist_ok=True)
    for tool, name in FILES.items():
        parts = [_table(f"{tool}'s option", foreign_options(tool))]
        if losses := foreign_losses(tool):
            parts.append(_table(f"{tool}'s loss", losses))
        write(folder / f"{name}.md", "\n\n".join(parts) + "\n")


def _table(title: str, rows: tuple[Foreign, ...]) -> str:
    lines = [f"| {title} | here | |", "|---|---|---|"]
    for row in rows:
        ours = f"[`{row.ours}`](objectives/{row.ours}.md)" if row.ours in OBJECTIVES else ""
        ours = ours or (f"`{row.ours}`" if row.ours else "none")
        note = markdown(row.note).replace("|", "\\|")
        lines.append(f"| `{row.option}` | {ours} | {note} |")
    return "\n".join(lines)
