"""An inspection on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lora_dpo.inspecting.measures import Count
from lora_dpo.inspecting.tokens import ShownRow, Token
from lora_dpo.showing import hanging, said, visible

if TYPE_CHECKING:
    from lora_dpo.inspecting.inspection import Inspection

# Two shades of each part, in turn, so that tokens can be told apart.
SHADES = {
    "prompt": ("cyan", "bright_cyan"),
    "chosen": ("green", "bright_green"),
    "rejected": ("red", "bright_red"),
    "completion": ("green", "bright_green"),
}
MARKED = "reverse"
BETWEEN = "|"
_FIRST, _LAST = 60, 90  # tokens of a part that are shown at its two ends
_BARS = " ▁▂▃▄▅▆▇█"


def printed(found: Inspection) -> list[RenderableType]:
    """Return all parts, in order."""
    parts: list[RenderableType] = [
        said(f"{found.subject}, as {found.base} will see it", "bold"),
        said(f"recognised: {found.shape} ({found.kind})"),
        *(hanging(f"  because {line}", 10, "dim") for line in found.why.splitlines()),
        said(f"{found.kept} of {found.read} rows kept, max_length {found.max_length}"),
        _totals(found),
        *_counts(found.counts),
        *(part for row in found.rows for part in _row(row, ids=found.show_ids)),
        Text("\nlengths", style="bold"),
        *map(said, found.lengths.lines()),
        *_histogram(found),
        hanging(f"work: {found.work_in_words()}", 6),
        Text("\nadvice", style="bold"),
        *_findings(found),
        said(found.verdict(), "bold"),
    ]
    return parts


@dataclass(frozen=True)
class TokenLine:
    """One part of a row; where the terminal has no colours, a bar stands between tokens."""

    tokens: Sequence[Token]
    part: str
    ids: bool

    def __rich_console__(self, console: Console, _: ConsoleOptions) -> RenderResult:
        bars = console.color_system is None or console.no_color
        head = Text().append(f"{self.part} ({len(self.tokens)} tokens): ", style="bold")
        yield head + token_line(self.tokens, self.part, ids=self.ids, bars=bars)


def token_line(tokens: Sequence[Token], part: str, *, ids: bool, bars: bool) -> Text:
    """Return the tokens of one part of a row, each in its own shade, marks behind the marked ones."""
    line = Text()
    hidden = len(tokens) - _FIRST - _LAST
    for i, token in enumerate(tokens):
        if hidden > 0 and _FIRST <= i < _FIRST + hidden:
            if i == _FIRST:
                line.append(f" ... {hidden} tokens ... ", style="dim")
            continue
        if i and bars:
            line.append(BETWEEN, style="dim")
        style = SHADES[part][i % 2]
        line.append(visible(token.text), style=f"{style} {MARKED}" if token.marks else style)
        if token.marks:
            line.append(f"[{', '.join(token.marks)}]", style="bold")
        if ids:
            line.append(f"({token.id})", style="dim")
    return line


def _totals(found: Inspection) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in found.totals:
        table.add_column(name, justify="right")
    table.add_row(*("-" if count is None else str(count) for count in found.totals.values()))
    return table


def _counts(counts: Sequence[Count]) -> Iterator[RenderableType]:
    for count in counts:
        yield hanging(f"{count.count:>7}  {count.name}", 9)
        for where, detail in count.examples[:3]:
            yield hanging(f"{'':9}{where}: {detail}" if detail else f"{'':9}{where}", 9, "dim")


def _row(row: ShownRow, *, ids: bool) -> Iterator[RenderableType]:
    label = "" if row.label is None else f", {'wanted' if row.label else 'unwanted'}"
    yield Text()
    yield said(f"{row.origin}{label}", "bold")
    for part, tokens in (("prompt", row.prompt), *row.answers.items()):
        yield TokenLine(tokens, part, ids)
    if row.begins_alike:
        yield Text(f"both answers begin with the same {row.begins_alike} tokens", style="dim")


def _histogram(found: Inspection) -> Iterator[Text]:
    edges = found.histogram.edges
    for part, counts in found.histogram.counts.items():
        most = max(counts)
        bars = "".join(_BARS[-(-8 * count // most)] for count in counts)
        line = Text(f"{part:<12}")
        line.append(bars, style=SHADES[part][0])
        yield line + Text(f"  0 to {edges[-1]} tokens, at most {most} rows a bin of {edges[1]}")


def _findings(found: Inspection) -> Iterator[RenderableType]:
    for finding in found.findings:
        style = {"found": "yellow", "not found": "", "not measured": "dim"}[finding.state]
        for line in finding.lines():
            yield hanging(line, 7, style)
