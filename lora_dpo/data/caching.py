"""Token ids on disk, keyed by everything that they depend on and nothing else."""

from __future__ import annotations

import datetime
import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.data.preferences import Preferences
from lora_dpo.data.records import Labelled, Pair, digest
from lora_dpo.errors import OutputError
from lora_dpo.store import fingerprint, new_folder, read_json, read_manifest, write_json
from lora_dpo.store import write_manifest as write_store_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("lora_dpo")

FORMAT = 3  # raise it whenever the same rows and settings give other ids


def cache_key(
    preferences: Preferences, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> str:
    """Return the name of the cache entry of these rows under this tokenizer and these settings."""
    rows = [
        [digest(row.content), row.origin.file, row.origin.row, *_scores(row)]
        for row in preferences.rows
    ]
    plain_settings = json.loads(json.dumps(dict(settings), default=repr, sort_keys=True))
    return fingerprint(
        {
            "format": FORMAT,
            "kind": preferences.kind,
            "rows": digest(rows),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "settings": plain_settings,
        }
    )


def _scores(row: Pair | Labelled) -> tuple[float | None, ...]:
    return (row.score_chosen, row.score_rejected) if isinstance(row, Pair) else ()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, rules, special tokens and chat template."""
    template = tokenizer.chat_template
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        vocabulary = json.loads(backend.to_str())
        # What an earlier call padded or truncated is no property of the tokenizer.
        vocabulary = {k: v for k, v in vocabulary.items() if k not in ("padding", "truncation")}
    else:
        vocabulary = tokenizer.get_vocab()
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "vocabulary": vocabulary,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()},
        "template": template,
    }
    if "strftime_now" in str(template or ""):
        facts["day"] = datetime.date.today().isoformat()  # the template writes it into prompts
    return digest(facts)


def load(folder: Path, key: str) -> tuple[Any, dict[str, Any]] | None:
    """Return a cached dataset and its facts, or None if there is no whole entry of ours."""
    try:
        if read_manifest(folder).get("key") != key or not (folder / "rows").is_dir():
            return None
        facts = read_json(folder / "facts.json")
        rows = importlib.import_module("datasets").load_from_disk(str(folder / "rows"))
        listed = read_json(folder / "manifest.json")["files"]
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        whole = present - {"manifest.json"} == set(listed) and {"report", "summary"} <= facts.keys()
        return (rows, facts) if whole else None
    except Exception:
        # A cache that is damaged in whatever way costs time, never the run.
        return None


def save(folder: Path, key: str, rows: Any, facts: Mapping[str, Any]) -> None:
    """Write an entry as a whole; one that another process wrote meanwhile is as good.

    A disk that takes none costs time in the next run, not this one.
    """
    try:
        with new_folder(folder, overwrite=True) as work, _quiet():
            rows.save_to_disk(str(work / "rows"))
            write_json(work / "facts.json", dict(facts))
            write_store_manifest(work, {"key": key})
    except (OSError, OutputError) as error:
        if load(folder, key) is None:
            logger.warning("%s: the tokens could not be kept there (%s)", folder.parent, error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from drawing a bar for a file of a few megabytes."""
    utils = importlib.import_module("datasets.utils")
    enabled = utils.are_progress_bars_disabled() is False
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            utils.enable_progress_bars()
