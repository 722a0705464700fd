"""Pages in the real browser: one Chromium, and what holds of any page that shows strangers' strings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run"]
# Each part would act if it were obeyed; all of it fits the context of the tiny model.
HOSTILE = (
    "<script>window.pwned=1</script><img src=x onerror=pwned=2> \"'</p><!-- {{ 7*7 }} <b>bold</b> "
    "&lt;i&gt; \x1b[31m \u202e"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser that is installed; a test without one is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def check_strangers_stay_text(page: Path, *, times: int, width: int = 390) -> None:
    """Open a page that shows ``HOSTILE`` at least so many times, in light and dark.

    Hold that nothing of it acts or is an element, that nothing is fetched or said on the console, and that
    the page is as wide as its window.
    """
    with chromium() as browser:
        for scheme in ("light", "dark"):
            said: list[str] = []
            opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            opened.on("console", lambda message, said=said: said.append(message.text))
            opened.on("pageerror", lambda error, said=said: said.append(str(error)))
            opened.on("request", lambda request, said=said: said.append(request.url))
            opened.goto(page.as_uri())
            opened.evaluate(
                "document.querySelectorAll('details').forEach((each) => { each.open = true; })"
            )
            assert said == [page.as_uri()]
            assert opened.evaluate("window.pwned") is None
            assert (
                opened.locator("script, img, [onerror], [onload], a[href^=javascript]").count() == 0
            )
            text = opened.evaluate("document.body.textContent")
            assert text.count("<script>window.pwned=1</script><img src=x onerror=") >= times, text
            assert "<!-- {{ 7*7 }} <b>bold</b> &lt;i&gt;" in text
            assert "\x1b" not in text and "\u202e" not in text
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            opened.close()
