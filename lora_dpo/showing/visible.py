"""Text in which nothing is hidden: what would move a cursor or turn a line gets a visible name."""

from __future__ import annotations

import logging
import unicodedata

# Control characters, formatting ones (bidirectional, zero-width, tags), halves of characters, and
# Unicode's own line and paragraph ends.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_NAMED = {"\n": "↵", "\t": "⇥", "\r": "⟨CR⟩", "\x1b": "⟨ESC⟩"}


def visible(text: str, *, keep_lines: bool = False) -> str:
    """Return a text whose control and formatting characters can be seen and do nothing.

    Args:
        text: anything.
        keep_lines: whether a line end still ends the line, behind its sign.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(map(_shown, text))
    return shown.replace("↵", "↵\n") if keep_lines and "\n" in text else shown


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _HIDDEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character


class Lines(logging.Formatter):
    """Log lines as they are, in which what comes from data, models and files is shown and not obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, with its own line ends."""
        return "\n".join(visible(line) for line in super().format(record).split("\n"))
