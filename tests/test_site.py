"""The site: every command and snippet on a page runs, every page builds, nothing comes from outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from filelock import FileLock

import lora_dpo
from lora_dpo import objectives
from lora_dpo.cli import app
from lora_dpo.objectives import OBJECTIVES
from tests import pages as site
from tests.pages import ROOT, RUN, TRAINING, Reader

PAGES = [
    page for page in site.pages() if any(b.kind in ("console", "python") for b in site.blocks(page))
]


def _of_all_processes(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the pages speak of, trained by their own command, once for all processes."""
    folder = _of_all_processes(tmp_path_factory, "site-run")
    with FileLock(f"{folder}.lock"):
        if not (folder / RUN / "run.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            site.make_checkout(folder, {})
            before = Path.cwd()
            os.chdir(folder)
            try:
                code, output = site.call(TRAINING)
            finally:
                os.chdir(before)
            assert code == 0, output
    return folder / RUN


# what they run is run elsewhere too, and takes longest here
DEAR = {"howto/export.md", "howto/watch.md", "first_run", "look_at_data"}


def _dear(names: Iterable[Any]) -> list[Any]:
    """Leave the dear ones to ``make slow``."""
    slow, stems = pytest.mark.slow, {name: getattr(name, "stem", name) for name in names}
    return [pytest.param(n, marks=[slow] if s in DEAR else []) for n, s in stems.items()]


@pytest.mark.parametrize("page", _dear(PAGES))
def test_every_command_and_snippet_of_a_page_runs(
    page: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, word for word, in a checkout with little data; quoted errors are the real ones."""
    folder = tmp_path / "checkout"
    site.make_checkout(folder, site.OF_A_PAGE.get(page, site.QUICK))
    monkeypatch.chdir(folder)
    before = dict(OBJECTIVES)
    try:
        Reader(trained).read(page)
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(before)


# Blocks that no test runs, each with its reason beside it: more need a thought, not a higher number.
NOT_RUN = 12


def test_blocks_that_do_not_run_say_why_and_are_few() -> None:
    every = [block for page in site.pages() for block in site.blocks(page)]
    found = [block for block in every if block.not_run]
    for block in every:  # a command in another kind of block would not be seen at all
        hidden = block.kind != "console" and re.search(
            r"^(\$ )?lora-dpo ", block.text, re.MULTILINE
        )
        assert not hidden, f"{block.where}: make it a console block"
    assert all(len(block.not_run.split()) >= 3 for block in found)
    told = "\n".join(f"{block.where}: {block.not_run}" for block in found)
    assert len(found) <= NOT_RUN, told


def test_every_error_shown_on_a_page_stands_behind_the_command_that_provokes_it() -> None:
    """A message outside of a console block would be compared with nothing."""
    for page in site.pages():
        for block in site.blocks(page):
            if block.kind != "console":
                assert "error: " not in block.text, block.where
    shown = [
        command.error
        for block in site.blocks("troubleshooting.md")
        if block.kind == "console"
        for command in site.commands(block)
        if command.error
    ]
    assert len(shown) == len(set(shown)) >= 25
    # a wildcard may stand for what differs between machines, not for the message
    assert all(len(error.replace("...", "")) > 60 for error in shown)


def test_every_command_is_run_on_some_page() -> None:
    run = {
        command.line.split()[1]
        for page in site.pages()
        for block in site.blocks(page)
        if block.kind == "console" and not block.not_run
        for command in site.commands(block)
        if command.line.startswith("lora-dpo ")
    }
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    # one has a test of its own, one waits for a person, one writes to a hub
    assert known - run == {"quickstart", "label", "push"}


# All that differs from the notebooks as they are, and what they have to show.
SHORTER = {
    '"max_steps": 40': '"max_steps": 2',
    '"eval": str(DATA_DIR / "heldout.jsonl")': '"eval_fraction": 0.02',
    '"output": {"dir": "runs/notebook"}': '"output": {"dir": "runs/notebook", "diagnose": False, '
    '"samples": 0}',
}
SHOWN = {
    "first_run": ("Did you mean 'beta'?", "rewards/accuracies", "KL(policy || exported)"),
    "look_at_data": ("text/html", "chosen and rejected are identical"),
}


@pytest.mark.parametrize(
    "path", _dear(sorted((ROOT / "examples").glob("*.ipynb"))), ids=lambda p: p.stem
)
def test_every_notebook_runs_and_is_kept_without_outputs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter, in a kernel that is a process of its own."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    for cell in code:
        for said, instead in SHORTER.items():
            cell.source = cell.source.replace(said, instead)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = str([output for cell in code for output in cell.outputs])
    assert all(part in shown for part in SHOWN.get(path.stem, ()))


class _Page(HTMLParser):
    """Names that a page defines, places that it links to, and files that its looks need."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.needs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.needs.append(given["href"])
        elif "src" in given:
            self.needs.append(given["src"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does, from a copy of what git has; once for all processes."""
    checkout = _of_all_processes(tmp_path_factory, "site")
    target = checkout / "html"
    with FileLock(f"{checkout}.lock"):
        if not (checkout / "whole").is_file():
            shutil.rmtree(checkout, ignore_errors=True)
            for folder in ("docs", "examples"):
                shutil.copytree(ROOT / folder, checkout / folder, ignore=_generated)
            command = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-b", "html"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, *command, "docs", str(target)],
                cwd=checkout, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (checkout / "whole").touch()
    return target


def _generated(folder: str, names: list[str]) -> set[str]:
    made = (
        {"objectives", "api", "notebooks", "tables", "_build"}
        if Path(folder) == ROOT / "docs"
        else set()
    )
    return made & set(names) | {"__pycache__"}


def test_the_site_is_whole_and_needs_nothing_from_the_network(built: Path) -> None:
    """No style, script, font or picture from elsewhere; every link into the site leads somewhere."""
    pages = {}
    for path in built.rglob("*.html"):
        pages[path] = _Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    assert {built / "objectives" / f"{name}.html" for name in OBJECTIVES} <= set(pages)
    for path, page in pages.items():
        for place in page.needs:
            parts = urlsplit(place)
            assert not parts.scheme or parts.scheme == "data", f"{path.name} needs {place}"
            assert not parts.netloc, f"{path.name} needs {place}"
            if parts.path:
                assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: no {place}"
        for place in page.links:
            parts = urlsplit(place)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(built)}: {place} leads nowhere"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {place}"
    for style in built.rglob("*.css"):
        outside = re.findall(r"url\(['\"]?((?:https?:)?//[^)]+)", style.read_text(encoding="utf-8"))
        assert not outside, f"{style.name}: {outside}"


def test_every_public_name_and_every_objective_is_explained(built: Path) -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in (built / "api").glob("*.html"))
    for name in lora_dpo.__all__:
        home = "lora_dpo.errors." if name == "LoraDpoError" else "lora_dpo."
        assert f'id="{home}{name}"' in text or name == "objectives", name
    for name, row in OBJECTIVES.items():
        page = (built / "objectives" / f"{name}.html").read_text(encoding="utf-8")
        assert row.arxiv in page and f"{name}-dark.svg" in page and "When to use it" in page
        assert all(f">{knob}<" in page for knob in row.hyperparameters)


def test_the_settings_on_an_objectives_page_build_it_with_its_defaults(built: Path) -> None:
    for name, row in OBJECTIVES.items():
        page = (built.parent / "docs" / "objectives" / f"{name}.md").read_text(encoding="utf-8")
        block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
        assert block is not None
        given = yaml.safe_load(block[1])["objective"]
        assert str(objectives.build(given)) == str(row.bind())
