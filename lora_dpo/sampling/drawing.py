"""Prompts, the policy that answers them, and what it drew: kept a prompt at a time."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.config import Config
from lora_dpo.data.records import text_key
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.generation import draw
from lora_dpo.journal import Journal
from lora_dpo.policy import check_base, load_base
from lora_dpo.preparing import load_tokenizer
from lora_dpo.prompt_tokens import Prompt, encode_prompt
from lora_dpo.prompts import check_room, read_prompts
from lora_dpo.run_folder import Run
from lora_dpo.scoring import context_of
from lora_dpo.store import file_sha256

logger = logging.getLogger("lora_dpo")

CUT = "left out: cut off at max_new_tokens, so without an end"
EQUAL = "left out: equal to another of the same prompt"
EMPTY = "left out: empty"


@dataclass(frozen=True)
class Drawer:
    """A policy that can be asked: a run's, or a base without adapter.

    Args:
        run: of a base one that never trained: its config alone.
        checkpoint: of the run; None for a base.
    """

    run: Run
    checkpoint: str | None

    @classmethod
    def open(cls, policy: Run | str | Path, checkpoint: str) -> Drawer:
        """Find out what was given; its weights stay on disk."""
        if isinstance(policy, Run) or (Path(policy) / "config.yaml").is_file():
            return cls(policy if isinstance(policy, Run) else Run.open(policy), checkpoint)
        config = base_config(str(policy))
        check_base(config.model)
        if checkpoint != "final":
            raise ConfigError(f"checkpoint is {checkpoint!r}, and {policy} is a base, without any.")
        return cls(Run(Path(policy), config), None)

    def facts(self) -> dict[str, str]:
        """Return what tells this policy from others."""
        if self.checkpoint is None:
            return {"policy": self.run.config.model.base}
        weights = self.run.adapter_folder(self.checkpoint) / "adapter_model.safetensors"
        return {"policy": str(self.run.folder), "adapter": file_sha256(weights)[:16]}

    def prompts(self, source: Any, limit: int | None) -> dict[str, Prompt]:
        """Return the distinct prompts of a source in their order, by key, in the form it was trained on.

        Raises:
            DataError: none, or one that is no question.
        """
        found = read_prompts(self.run, source, limit=limit)
        for place, prompt in enumerate(found, start=1):
            if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
                raise DataError(
                    f"prompts: number {place} ends with the assistant; expected it to end where an "
                    "answer begins."
                )
        return {text_key(p if isinstance(p, str) else tuple(p)): p for p in found}

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer."""
        if self.checkpoint is None:
            return load_base(self.run.config.model), self.tokenizer()
        return self.run.load_policy(self.checkpoint), self.tokenizer()

    def tokenizer(self) -> Any:
        """Load the tokenizer alone."""
        return load_tokenizer(self.run.config) if self.checkpoint is None else self.run.tokenizer()


def base_config(base: str) -> Config:
    """Return a config that names a base alone."""
    return Config.parse(
        {"model": {"base": base}, "data": {"train": "none"}, "output": {"dir": "none"}}
    )


def check_context(drawer: Drawer, prompts: Mapping[str, Prompt], max_new_tokens: int) -> None:
    """Hold that each completion has room in the policy's context; its weights stay on disk.

    Raises:
        DataError: names the prompt that leaves none.
    """
    config = drawer.run.config
    tokenizer, template = drawer.tokenizer(), config.data.template_arguments
    ids = [encode_prompt(tokenizer, prompt, template) for prompt in prompts.values()]
    check_room(ids, context_of(check_base(config.model)), max_new_tokens)


def draw_all(
    drawer: Drawer,
    prompts: Mapping[str, Prompt],
    journal: Journal,
    *,
    k: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
) -> None:
    """Draw ``k`` completions of each prompt that the journal has none of; add each when it is whole."""
    there = {line["drawn"] for line in journal.lines if "drawn" in line}
    missing = [key for key in prompts if key not in there]
    if len(missing) < len(prompts):
        logger.info("%d of %d prompts are drawn already", len(prompts) - len(missing), len(prompts))
    if not missing:
        return
    model, tokenizer = drawer.load()
    if tokenizer.chat_template and any(isinstance(prompts[key], str) for key in missing):
        logger.info("prompts that are texts are completed as they stand, without the chat template")
    together = max(1, batch_size // k)
    for start in range(0, len(missing), together):
        keys = missing[start : start + together]
        found = draw(
            model,
            tokenizer,
            [prompts[key] for key in keys for _ in range(k)],
            [_seed(seed, key, i) for key in keys for i in range(k)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            template_arguments=drawer.run.config.data.template_arguments,
        )
        for i, key in enumerate(keys):
            own = found[i * k : (i + 1) * k]
            texts, ended = [one.text for one in own], [one.finished for one in own]
            journal.add({"drawn": key, "completions": texts, "finished": ended})
        logger.info("drawn: %d of %d prompts", start + len(keys), len(missing))


def kept(
    prompts: Mapping[str, Prompt], journal: Journal, left_out: Counter[str]
) -> dict[str, list[str]]:
    """Return the distinct, finished completions of each prompt; count the others."""
    lines = {line["drawn"]: line for line in journal.lines if "drawn" in line}
    return {key: _kept(lines[key], left_out) for key in prompts}


def _kept(line: Mapping[str, Any], left_out: Counter[str]) -> list[str]:
    texts: dict[str, None] = {}
    for text, finished in zip(line["completions"], line["finished"], strict=True):
        reason = CUT if not finished else EMPTY if not text.strip() else EQUAL
        if finished and text.strip() and text not in texts:
            texts[text] = None
        else:
            left_out[reason] += 1
    return list(texts)


def _seed(seed: int, key: str, place: int) -> int:
    """Return the seed of one completion: of its prompt's text and its own number, nothing else."""
    whole = hashlib.sha256(f"{seed}:{key}:{place}".encode()).digest()
    return int.from_bytes(whole[:8], "big") >> 1
