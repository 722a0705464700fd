"""``label``: opens the page, waits, and writes what was answered."""

from __future__ import annotations

import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any

from lora_dpo.data import Source
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.journal import open_journal
from lora_dpo.labelling.items import MODES, Mode, read_items
from lora_dpo.labelling.result import Labels
from lora_dpo.labelling.serving import LabelServer
from lora_dpo.labelling.session import Session


def label(
    data: Source,
    to: str | Path = "labels.jsonl",
    *,
    mode: Mode | None = None,
    all_pairs: bool = False,
    seed: int = 0,
    port: int = 0,
    browser: bool = True,
) -> Labels:
    """Ask a person for preferences on a local page, blind; returns when all is answered or on Ctrl-C.

    Every answer is on the disk before the next question. The same call goes on where an earlier one
    stopped, however that came about.

    Args:
        data: preferences in any format that we read; or rows of ``prompt`` with ``completions`` (from
            ``sample``), with ``policy`` and ``reference`` (a run's ``samples.jsonl``), or with
            ``completion``. A file, folder, hub id, dataset or rows in memory.
        to: the file of preferences to write: ``prompt, chosen, rejected``, or with thumbs ``prompt,
            completion, label``. Answers are kept beside it, in ``NAME.answers.jsonl``.
        mode: ``pairs`` or ``thumbs``; by default pairs, where rows have two completions.
        all_pairs: of more than two completions of a prompt, ask for each with each; else each is
            shown once (an odd one with another a second time).
        seed: decides which completion stands left, and which meet.
        port: of 127.0.0.1; 0 takes one that is free.
        browser: whether to open the page.

    Raises:
        DataError: no rows that can be asked about.
        OutputError: ``to`` is someone else's file, or its answers are to other rows.
    """
    if mode is not None and mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    target = Path(to)
    if isinstance(data, (str, Path)) and Path(data).resolve() == target.resolve():
        raise OutputError(f"{target}: is the data themselves; choose another file with --to.")
    items = read_items(data, mode, all_pairs=all_pairs, seed=seed)
    with open_journal(journal_of(target), _head(items.mode, seed, all_pairs)) as journal:
        session = Session(items, journal, target, seed)
        _serve(session, port, browser)
        session.write()
        return session.result()


def journal_of(target: Path) -> Path:
    """Return the file of answers that belongs to a file of preferences."""
    return target.with_name(f"{target.stem}.answers.jsonl")


def _head(mode: str, seed: int, all_pairs: bool) -> dict[str, Any]:
    return {"answers": "lora-dpo label", "mode": mode, "seed": seed, "all_pairs": all_pairs}


def _serve(session: Session, port: int, browser: bool) -> None:
    with LabelServer(session, port) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            state = session.state()
            _tell(f"{state['done']} of {state['all']} questions are answered")
            _tell(f"asking at {server.url} (Ctrl-C ends; every answer is kept)")
            if browser and not webbrowser.open(server.url):
                _tell("no browser could be opened: open that address yourself")
            session.over.wait()
        except KeyboardInterrupt:
            _tell("")  # behind the ^C
        finally:
            server.shutdown()


def _tell(line: str) -> None:
    """Talk to the person; what a program reads stands on standard output."""
    print(line, file=sys.stderr, flush=True)
