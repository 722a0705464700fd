"""An Ollama ``Modelfile``: the chat template in Ollama's language, where that can be shown to be right.

Most chat templates put each turn between two fixed texts. That is found out by rendering, not by
reading Jinja: the texts around each role are taken from one chat and must then give, by themselves,
the template's own rendering of every other chat that is tried. A template that does anything else
is not translated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

Turn = tuple[str, str]

# Alternating roles, one to five turns, with and without a system message.
_CHATS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)
_TEXTS = ("qx7Kq one", "ax9Wa: two?\nthree", "zB4r - four")


@dataclass(frozen=True)
class Turns:
    """A chat template that puts fixed texts around turns.

    Args:
        opening: before the first turn of a chat without a system message.
        opening_with_system: before the first turn of a chat with one.
        around: role to the texts before and after its content.
        generation: behind the last turn, where the answer begins.
    """

    opening: str
    opening_with_system: str
    around: Mapping[str, tuple[str, str]]
    generation: str

    def render(self, chat: Sequence[Turn]) -> str:
        """Return what the template would, with the generation prompt."""
        has_system = any(role == "system" for role, _ in chat)
        parts = [self.opening_with_system if has_system else self.opening]
        for role, content in chat:
            before, after = self.around[role]
            parts += [before, content, after]
        return "".join([*parts, self.generation])


def modelfile(
    tokenizer: Any,
    stops: Sequence[int],
    *,
    source: str = ".",
    adapter: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    chat: bool = True,
) -> str:
    """Return the Modelfile of an exported folder.

    Args:
        tokenizer: the exported one.
        stops: ids of the tokens that end an answer.
        source: what ``FROM`` names: the folder or a GGUF file in it, or the base of an adapter.
        adapter: whether the folder holds an adapter, to be put on ``source``.
        template_arguments: variables for the chat template, as training had them.
        chat: whether the model is asked in chats, and not to continue texts.
    """
    lines = [f"FROM {source}"]
    if adapter:
        needs = (
            "# FROM names the base as Ollama has it: a folder, a GGUF file, a model of its library."
        )
        lines = [needs, *lines, "ADAPTER ."]
    turns = read_turns(tokenizer, template_arguments) if chat else None
    go = ollama_template(turns, _adds_bos(tokenizer)) if turns is not None else None
    if turns is not None and go is not None:
        padded = [("user", f" {_TEXTS[0]} ")]
        if _render(tokenizer, padded, template_arguments) != turns.render(padded):
            lines.append("# The chat template trims white space around texts; Ollama does not.")
        if "system" not in turns.around:
            lines.append("# A system message has no turn in this template; Ollama leaves it out.")
        lines.append(f'TEMPLATE """{go}"""')
    elif chat and tokenizer.chat_template:
        lines += [
            "# The chat template does more than put texts around turns, and was not translated.",
            "# Ollama then takes the nearest of the templates that it knows, or none at all: compare",
            "# `ollama show --template` with chat_template.jinja, and write a TEMPLATE if they differ.",
        ]
    else:
        lines += [
            "# The model was trained on plain texts, and continues one.",
            'TEMPLATE "{{ .Prompt }}"',
        ]
    texts = dict.fromkeys(tokenizer.decode([stop]) for stop in stops)
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts if text]
    return "\n".join(lines) + "\n"


def read_turns(tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> Turns | None:
    """Return the fixed texts of a chat template; None where it is no such template."""
    if not tokenizer.chat_template:
        return None

    render = partial(_render, tokenizer, arguments=template_arguments)
    found = _texts(render, str(tokenizer.bos_token or ""))
    if found is None:
        return None
    chats = [_filled(roles) for roles in _CHATS]
    if "system" in found.around:
        chats += [_filled(("system", *roles)) for roles in _CHATS]
    return found if all(render(chat) == found.render(chat) for chat in chats) else None


def _render(
    tokenizer: Any,
    chat: Sequence[Turn],
    arguments: Mapping[str, Any] | None = None,
    *,
    opened: bool = True,
) -> str | None:
    turns = [{"role": role, "content": content} for role, content in chat]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=opened, **(arguments or {})
        )
    except Exception:  # a template is a program that came with the model
        return None
    return str(text)


def _texts(render: Any, bos: str) -> Turns | None:
    """Read the texts from three chats: a question; with its answer; with one more question."""
    user, assistant = _TEXTS[0], _TEXTS[1]
    turns = [("user", user), ("assistant", assistant), ("user", user)]
    one = render(turns[:1])
    shut = [render(turns[:count], opened=False) for count in (1, 2, 3)]
    if not one or not all(shut) or not one.startswith(shut[0]) or shut[0].count(user) != 1:
        return None
    head, after_user = shut[0].split(user)
    if not shut[1].startswith(shut[0]) or shut[1].count(assistant) != 1:
        return None
    before_assistant, after_assistant = shut[1][len(shut[0]) :].split(assistant)
    if not shut[2].startswith(shut[1]) or not shut[2].endswith(user + after_user):
        return None
    before_user = shut[2][len(shut[1]) : len(shut[2]) - len(user + after_user)]
    if not head.endswith(before_user):
        return None
    around = {"user": (before_user, after_user), "assistant": (before_assistant, after_assistant)}
    opening = head[: len(head) - len(before_user)]
    return _with_system(render, Turns(opening, opening, around, one[len(shut[0]) :]), bos)


def _with_system(render: Any, found: Turns, bos: str) -> Turns:
    system, user = _TEXTS[2], _TEXTS[0]
    text = render([("system", system), ("user", user)])
    before_user, after_user = found.around["user"]
    end = "".join([before_user, user, after_user, found.generation])
    if not text or text.count(system) != 1 or not text.endswith(end):
        return found
    before, after = text[: len(text) - len(end)].split(system)
    shared = next(s for s in (found.opening, bos, "") if before.startswith(s))
    around = {**found.around, "system": (before[len(shared) :], after)}
    return Turns(found.opening, shared, around, found.generation)


def ollama_template(turns: Turns, adds_bos: str = "") -> str | None:
    """Return the texts as a Go template over ``.Messages``; None where Go would read them otherwise.

    Args:
        turns: the texts.
        adds_bos: what the tokenizer puts before every text by itself, which must not stand twice.
    """
    if adds_bos and turns.around["user"][0].startswith(adds_bos):
        return None  # before the first turn it would stand twice, before the others once
    openings = [text.removeprefix(adds_bos) for text in (turns.opening, turns.opening_with_system)]
    pieces = [*openings, turns.generation, *(t for pair in turns.around.values() for t in pair)]
    if any("{{" in text or "}}" in text or '"""' in text for text in pieces):
        return None
    if any(text.endswith("{") or text.startswith("}") for text in pieces):
        return None
    same = openings[0] == openings[1]
    opening = (
        openings[0]
        if same
        else f"{{{{ if .System }}}}{openings[1]}{{{{ else }}}}{openings[0]}{{{{ end }}}}"
    )
    branches = [
        f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for number, (role, (before, after)) in enumerate(turns.around.items())
    ]
    body = "".join(branches)
    return f"{opening}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{turns.generation}"


def _filled(roles: Sequence[str]) -> list[Turn]:
    return [(role, f"{_TEXTS[i % 3]} {i}") for i, role in enumerate(roles)]


def _adds_bos(tokenizer: Any) -> str:
    """Return the BOS text where the tokenizer itself puts it before a text."""
    ids = tokenizer("a")["input_ids"]
    first = tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if first else ""
