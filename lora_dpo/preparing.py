"""From a config to what a model is fed: its tokenizer, and rows to train on and to hold out."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from lora_dpo.config import Config
from lora_dpo.data import DataReport, Preferences, Tokenised, load_preferences, tokenise
from lora_dpo.data.preferences import Kind
from lora_dpo.data.records import digest
from lora_dpo.errors import DataError, ModelError

logger = logging.getLogger("lora_dpo")


@dataclass(frozen=True)
class RunData:
    """Training and held-out rows of a run, and what became of the others."""

    train: Tokenised
    held_out: Tokenised | None
    is_chat: bool
    reports: dict[str, DataReport]

    def lines(self) -> list[str]:
        """Return what was read, dropped, truncated and repaired, for people."""
        held = f", {len(self.held_out)} held out" if self.held_out is not None else ""
        lines = [f"data: {len(self.train)} rows to train on{held}"]
        for name, report in self.reports.items():
            lines += [f"  {name}: {line}" for line in report.lines()]
        return lines


def load_tokenizer(config: Config) -> Any:
    """Load the base's tokenizer, with the config's chat template if it names one.

    Raises:
        ModelError: there is no tokenizer, or no such template file.
    """
    model = config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.base {model.base!r}: no tokenizer could be read ({reason})"
        ) from None
    if config.data.chat_template:
        path = Path(config.data.chat_template)
        if not path.is_file():
            raise ModelError(f"data.chat_template {str(path)!r}: no such file; give a Jinja file.")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"data.chat_template {str(path)!r}: is no text ({error}).") from None
    return tokenizer


def prepare_data(config: Config, tokenizer: Any, kind: Kind) -> RunData:
    """Load, split and tokenise the rows of a run; the same config gives the same rows again."""
    rows = load_rows(config, config.data.train, kind)
    if config.data.chat_template and not rows.rows[0].is_chat:
        raise DataError(
            f"data.chat_template is {config.data.chat_template!r}, but the rows are plain texts, to which "
            "no template is applied; leave it out, or give messages."
        )
    if config.data.eval:
        held: Preferences | None = load_rows(config, config.data.eval, kind)
    elif config.data.eval_fraction > 0:
        rows, held = rows.split(
            config.data.eval_fraction, config.data.eval_max_rows, config.data.seed
        )
    else:
        held = None
    reports = {"read": rows.report}
    train_rows = tokenise_rows(rows, config, tokenizer)
    reports["train"] = train_rows.report
    held_rows = None
    if held is not None and len(held):
        held_rows = tokenise_rows(held, config, tokenizer)
        reports["held out"] = held_rows.report
        _note_leaks(rows, held)
    return RunData(train_rows, held_rows, rows.rows[0].is_chat, reports)


def load_rows(config: Config, source: Any, kind: Kind | None) -> Preferences:
    """Read preferences with the config's settings, from its own sources or from others."""
    data = config.data
    return load_preferences(
        source,
        columns=data.columns or None,
        kind=kind,
        transcripts=data.transcripts,
        identical=data.identical,
        empty=data.empty,
        duplicates=data.duplicates,
        min_margin=data.min_margin,
        ranking_pairs=data.ranking_pairs,
        seed=data.seed,
    )


def tokenise_rows(rows: Preferences, config: Config, tokenizer: Any) -> Tokenised:
    """Turn preferences into tokens with the config's settings."""
    data = config.data
    return tokenise(
        rows,
        tokenizer,
        max_length=data.max_length,
        overflow=data.overflow,
        stop_ids=stop_ids(config),
        template_arguments=data.template_arguments,
        cache_dir=Path(data.cache_dir) if data.cache_dir else default_cache(),
    )


def stop_ids(config: Config) -> list[int]:
    """Return the tokens on which the model really stops: those of its generation config."""
    try:
        found = GenerationConfig.from_pretrained(
            config.model.base, revision=config.model.revision or "main"
        ).eos_token_id
    except (OSError, ValueError):
        return []  # no generation config: the tokenizer's end token is what it stops on
    return list(found) if isinstance(found, (list, tuple)) else [found] if found is not None else []


def default_cache(kind: str = "tokenised") -> Path:
    """Return the folder of what runs share: below ``$LORA_DPO_CACHE``, or ``~/.cache/lora_dpo``."""
    return Path(os.environ.get("LORA_DPO_CACHE") or Path.home() / ".cache" / "lora_dpo") / kind


def reference_cache(config: Config) -> Path | None:
    """Return the folder of stored reference log-probs of a run, if it keeps any."""
    if not config.train.cache_reference:
        return None
    given = config.train.reference_cache_dir
    return Path(given) if given else default_cache("reference")


def _note_leaks(rows: Preferences, held: Preferences) -> None:
    if shared := rows.shared_prompts(held):
        here, there = next(iter(shared.values()))
        known = {digest(row.content) for row in held.rows}
        same = sum(digest(row.content) in known for row in rows.rows)
        logger.warning(
            "%d prompts stand in data.train and in data.eval%s; held-out figures will be too good. The "
            "first: %s and %s",
            len(shared),
            f" ({same} whole rows stand in both)" if same else "",
            here[0],
            there,
        )
