"""What is redrawn at the bottom of a terminal. A file, a pipe and a notebook never see it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dpo.showing.terminals import console_for

OFTEN = 0.1  # seconds between two drawings, at least


def can_redraw() -> bool:
    """Whether standard error is a terminal whose lines can be drawn again, and nobody does so yet.

    Of several processes that share it the first one draws.
    """
    taken = isinstance(sys.stderr, FileProxy)
    return (
        sys.stderr.isatty()
        and os.environ.get("RANK", "0") == "0"
        and os.environ.get("TERM", "") not in ("dumb", "unknown", "")
        and not taken
    )


class Redrawn:
    """A picture at the bottom of the terminal; lines that are written meanwhile go above it.

    It is drawn when it is asked to be, by the thread that asks: there is no thread of its own that a
    forked process could inherit.

    Args:
        picture: what is drawn.
    """

    def __init__(self, picture: Callable[[], RenderableType]) -> None:
        streams: Any = {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": True}
        console = console_for(sys.stderr, force_terminal=True, force_jupyter=False)
        self._live = Live(
            get_renderable=picture, console=console, auto_refresh=False, transient=True, **streams
        )
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._drawn = 0.0

    def begin(self) -> None:
        """Draw it, and take what is written to the terminal in between."""
        before = {id(stream): stream for stream in (sys.stdout, sys.stderr) if stream.isatty()}
        self._live.start(refresh=True)
        for handler in _stream_handlers():  # they hold the streams themselves
            if id(handler.stream) in before:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def draw(self, now: bool = False) -> None:
        """Draw it again, unless that has just been done.

        Args:
            now: whether it is drawn in any case.
        """
        if now or time.monotonic() - self._drawn >= OFTEN:
            self._live.refresh()
            self._drawn = time.monotonic()

    def end(self) -> None:
        """Take it away, and leave the streams as they were."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        self._live.stop()


@contextmanager
def bar(what: str, total: int, unit: str, *, fewest: int = 2) -> Iterator[Callable[[int], None]]:
    """Show how far a pass is, where that can be redrawn; elsewhere nothing.

    Args:
        what: the pass does, as ``tokenising``.
        total: how many there are.
        unit: of what, as ``rows``.
        fewest: how many are worth a bar.

    Yields:
        What is called with how many more are done.
    """
    if total < fewest or not can_redraw():
        yield lambda done: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    progress = Progress(*columns, TimeRemainingColumn(), auto_refresh=False)
    task = progress.add_task(what, total=total)
    redrawn = Redrawn(progress.get_renderable)

    def advance(done: int) -> None:
        progress.advance(task, done)
        redrawn.draw()

    redrawn.begin()
    try:
        yield advance
    finally:
        redrawn.end()


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep the bars of transformers and of the hub's client out of files, pipes and notebooks."""
    from transformers.utils import logging as theirs

    quiet = not sys.stderr.isatty() and theirs.is_progress_bar_enabled()
    if quiet:
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            theirs.enable_progress_bar()


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    """Return the handlers of all loggers that write to a stream which can be exchanged."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    found = {id(handler): handler for logger in loggers for handler in logger.handlers}
    return [
        handler
        for handler in found.values()
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)
    ]
