"""Rich on a terminal, plain text elsewhere, from the same renderables."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lora_dpo.showing.visible import visible

PLAIN_WIDTH = 100


def console_for(stream: TextIO, **options: Any) -> Console:
    """Return a console that reads no markup, no emoji codes and no highlights in what it prints.

    A file or a pipe gets lines of a fixed width, so that what is written does not depend on where.
    """
    wide = None if stream.isatty() else PLAIN_WIDTH
    settings: dict[str, Any] = {"width": wide, "soft_wrap": False, **options}
    return Console(file=stream, markup=False, emoji=False, highlight=False, **settings)


def print_to(parts: Iterable[RenderableType], stream: TextIO | None = None) -> None:
    """Print to a stream, by default what ``print`` writes to."""
    console = console_for(stream or sys.stdout)
    for part in parts:
        console.print(part)


def as_text(parts: Iterable[RenderableType]) -> str:
    """Return what a terminal without colours would show, without spaces at the ends of lines."""
    stream = io.StringIO()
    console = console_for(stream, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def said(text: str, style: str = "") -> Text:
    """Return words that may hold pieces of data, with what is hidden in them made visible."""
    return Text(visible(text), style=style)


def hanging(line: str, indent: int, style: str = "") -> RenderableType:
    """Return a line whose continuation stands as far in as its first ``indent`` characters."""
    grid = Table.grid()
    grid.add_column(width=indent, no_wrap=True)
    grid.add_column()
    grid.add_row(said(line[:indent], style), said(line[indent:], style))
    return grid
