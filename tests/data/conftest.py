"""Tiny tokenizers, built here, that show the habits of the real ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[3] / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and the cat sat on the mat",
    "what is better than ugly? beautiful is better than ugly, and simple is better than complex",
    "once upon a time there was a little girl who loved to sing and make music every day",
] * 4


def byte_level(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer: no BOS of its own, spaces at the front of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@cache
def _chatml() -> PreTrainedTokenizerFast:
    """Byte-level, with a ChatML template; EOS is the end of turn."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def _merging() -> PreTrainedTokenizerFast:
    """A tokenizer without words: it merges across any boundary, as "make " + "music"."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    tokenizer.post_processor = bos_first(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_only_three_special(tokenizer),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@cache
def _dummy_prefix() -> PreTrainedTokenizerFast:
    """Like Llama-2's: BOS, and a space put before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = bos_first(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_only_three_special(tokenizer),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def bos_first(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """The post-processor that puts BOS before a text."""
    return processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


def _only_three_special(tokenizer: Tokenizer) -> Tokenizer:
    # The byte tokens had to be trained in as special ones, but they are ordinary vocabulary.
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(values))


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """A copy that a test may change: byte-level with a ChatML template."""
    return copy.deepcopy(_chatml())


@pytest.fixture
def merging() -> PreTrainedTokenizerFast:
    """A copy that a test may change: merges across word boundaries."""
    return copy.deepcopy(_merging())


@pytest.fixture
def dummy_prefix() -> PreTrainedTokenizerFast:
    """A copy that a test may change: puts a space before every text."""
    return copy.deepcopy(_dummy_prefix())


@pytest.fixture(params=["chatml", "merging", "dummy_prefix", "TinyStories-656K", "stories260K"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each tokenizer in turn; the real ones where they are there."""
    folder = SHARED / "models" / request.param
    if request.param in ("chatml", "merging", "dummy_prefix"):
        return request.getfixturevalue(request.param)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines (or a text as it is) to a file and return its path."""

    def write_file(rows: Any, name: str = "prefs.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file
