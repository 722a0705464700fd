"""Ollama's template renders what the chat template does, or there is none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_dpo.ends import end_of_turn, stop_tokens
from lora_dpo.handing.modelfile import modelfile

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You help.<|im_end|>\n{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|end|>' %}{{ (bos_token if loop.first else '') + c }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
NUMBERED = (
    "{% for m in messages %}{{ loop.index }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
LAST_ONLY = (  # says something of the last question that it does not say of earlier ones
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %} (now){% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
GO = "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '<|end|>' }}{% endfor %}"

CHATS = [
    [("user", "Why?")],
    [("user", "a {b} c"), ("assistant", "Because:\n\n- one"), ("user", "Grüße")],
    [("system", "Be brief."), ("user", "x"), ("assistant", "y"), ("user", "z")],
]


@pytest.fixture
def tokenizer(quickstart_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(quickstart_model)


def _go(template: str, chat: list[tuple[str, str]]) -> str:
    """Run the few words of Go's template language that are written: if, range, eq, fields."""
    system = any(role == "system" for role, _ in chat)
    template = re.sub(
        r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}(?=\{\{ range)",
        lambda m: m[1] if system else m[2],
        template,
        flags=re.DOTALL,
    )
    found = re.fullmatch(
        r"(.*)\{\{ range \.Messages \}\}\{\{ (.*)\{\{ end \}\}\{\{ end \}\}(.*)",
        template,
        re.DOTALL,
    )
    assert found is not None
    branches = {}
    for piece in re.split(r"\{\{ else ", "{{ else " + found[2])[1:]:
        match = re.fullmatch(r'if eq \.Role "(\w+)" \}\}(.*)', piece, re.DOTALL)
        assert match is not None
        branches[match[1]] = match[2]
    turns = [branches.get(role, "").replace("{{ .Content }}", text) for role, text in chat]
    return "".join([found[1], *turns, found[3]])


def _template(text: str) -> str | None:
    found = re.search(r'^TEMPLATE """(.*)"""$', text, re.DOTALL | re.MULTILINE)
    return found[1] if found else None


@pytest.mark.parametrize("template", [None, CHATML, LLAMA_3, MISTRAL], ids=str)
def test_the_go_template_renders_every_chat_as_the_chat_template_does(
    tokenizer: Any, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    written = modelfile(tokenizer, [3])
    go = _template(written)
    assert go is not None
    for chat in CHATS:
        turns = [{"role": role, "content": text} for role, text in chat]
        if template in (None, MISTRAL) and chat[0][0] == "system":
            assert "A system message has no turn" in written
            continue
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert _go(go, chat) == expected
    assert written.startswith("FROM .\n")
    assert 'PARAMETER stop "<|end|>"' in written
    assert ("trims white space" in written) is (template == LLAMA_3)


@pytest.mark.parametrize("template", [NUMBERED, LAST_ONLY, GO], ids=str)
def test_a_template_that_does_more_is_not_translated_and_this_is_said(
    tokenizer: Any, template: str
) -> None:
    tokenizer.chat_template = template
    written = modelfile(tokenizer, [3])
    assert _template(written) is None
    assert "was not translated" in written


def test_a_bos_that_the_tokenizer_adds_by_itself_stands_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bare = _template(modelfile(tokenizer, [3])) or ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    assert bare == "<|bos|>" + (_template(modelfile(tokenizer, [3])) or "")


def test_the_end_of_a_turn_is_read_from_a_rendered_chat(tokenizer: Any) -> None:
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None  # it ends a turn with no token of its own
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert end_of_turn(tokenizer) is None


def test_generation_stops_on_the_models_own_tokens_and_on_the_templates(tokenizer: Any) -> None:
    settings = SimpleNamespace(eos_token_id=[4, 3])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|user|>{% endfor %}"
    assert stop_tokens(settings, tokenizer) == [4, 3, 1]
    tokenizer.chat_template = None
    settings.eos_token_id = None
    assert stop_tokens(settings, tokenizer) == [tokenizer.eos_token_id]
