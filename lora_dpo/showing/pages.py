"""HTML from jinja templates with autoescape: one file, no network; or a notebook's cell.

A page has no script but those that it is given, and a browser runs no other in it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from rich.console import RenderableType

from lora_dpo.showing.terminals import as_text, print_to, said
from lora_dpo.showing.visible import visible
from lora_dpo.store import write_text


def fragment(template: str, **facts: Any) -> str:
    """Render a template to what a notebook shows; its styles touch nothing outside of it."""
    return str(_environment().get_template(f"{template}.html.jinja").render(**facts))


def page(template: str, title: str, scripts: Sequence[str] = (), **facts: Any) -> str:
    """Render a template to a whole page, for a file.

    Args:
        template: of its body.
        title: of the page.
        scripts: that run once the body is there, in their order. The page forbids its browser every
            other one and every request, so that what slipped through the escaping would do nothing.
        facts: what the template shows.
    """
    for text in scripts:
        if "</script" in text.lower() or "<!--" in text or "\r" in text:
            raise ValueError("a script that would end its own element, or change on the way")
    frame = _environment().get_template("page.html.jinja")
    body = Markup(fragment(template, **facts))
    sources = [f"'sha256-{_sha256(text)}'" for text in scripts]
    return str(
        frame.render(title=title, body=body, scripts=list(map(Markup, scripts)), sources=sources)
    )


def script(name: str) -> str:
    """Return one of the package's own scripts."""
    return (files("lora_dpo.showing") / "scripts" / f"{name}.js").read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("lora_dpo.showing", "templates"),
        autoescape=True,  # by the file's ending it would be off: it ends in .jinja
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["lines"] = lambda text: Markup(escape(visible(text, keep_lines=True)))
    return found


def _finalize(value: Any) -> Any:
    """Make what is hidden visible in every string that a template puts out."""
    return visible(value) if type(value) is str else value


class Displayed:
    """Something with a picture for a terminal, a notebook and a file."""

    template: ClassVar[str]

    @property
    def title(self) -> str:
        """The page's."""
        raise NotImplementedError

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        raise NotImplementedError

    def print(self) -> None:
        """Print it, in colours where the terminal has them."""
        print_to(self.terminal())

    def to_html(self) -> str:
        """Return a whole page in one string: no network, no script, light and dark."""
        return page(self.template, self.title, facts=self)

    def write_html(self, path: str | Path) -> None:
        """Write the page to a file."""
        write_text(Path(path), self.to_html())

    def __str__(self) -> str:
        return as_text(self.terminal())

    def _repr_html_(self) -> str:
        return fragment(self.template, facts=self)


class Told(Displayed):
    """Something that is told in lines: the same on a terminal, in a notebook and in a file."""

    template: ClassVar[str] = "told"

    def lines(self) -> list[str]:
        """Return it for people, a line each."""
        raise NotImplementedError

    def terminal(self) -> list[RenderableType]:
        """Return the lines, with what is hidden in them made visible."""
        return [said(line) for line in self.lines()]

    def print(self) -> None:
        """Print the lines as they are: a terminal wraps what is too long for it."""
        print("\n".join(visible(line) for line in self.lines()))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title})"
