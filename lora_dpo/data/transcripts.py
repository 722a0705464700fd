"""Cutting two texts that share their beginning into prompt and answers."""

from __future__ import annotations

import re

from lora_dpo.data.problems import DroppedRow
from lora_dpo.data.records import Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Whether a text is a dialogue of "Human:" and "Assistant:" turns."""
    first = text.find(HUMAN)
    return first >= 0 and text.find(ASSISTANT, first) >= 0


def cut_transcript(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return (prompt, chosen, rejected); the prompt ends with the last ``Assistant:``.

    The answers keep the space behind the colon, so that prompt + answer is the transcript.
    """
    cuts = []
    for side in (chosen, rejected):
        last = side.rfind(ASSISTANT)
        if last < 0 or side.find(HUMAN) < 0:
            raise DroppedRow("dropped: not a transcript of Human and Assistant turns", side)
        cuts.append(last + len(ASSISTANT))
    prompt = chosen[: cuts[0]]
    if prompt != rejected[: cuts[1]]:
        common = _common(chosen, rejected)
        raise DroppedRow(
            "dropped: chosen and rejected diverge before the last assistant turn", common[-60:]
        )
    answers = chosen[cuts[0] :], rejected[cuts[1] :]
    for text in answers:
        if HUMAN in text:
            raise DroppedRow("dropped: a Human turn follows the last assistant turn", text)
    return prompt, *answers


def transcript_messages(prompt: str) -> tuple[Message, ...]:
    """Return the turns of a transcript's prompt as messages, without its open last turn."""
    head, *parts = _TURN.split(prompt)
    if head.strip():
        raise DroppedRow("dropped: text before the first Human turn", head)
    turns = list(zip(parts[::2], parts[1::2], strict=True))[:-1]
    return tuple(
        {"role": "user" if who == "Human" else "assistant", "content": text.strip()}
        for who, text in turns
    )


def cut_common(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return (prompt, chosen, rejected) of two plain texts, cut at the last common word's end.

    The white space between belongs to the answers, as in data that comes with a prompt; prompt +
    answer is the text, no word is cut, and no part is blank.
    """
    limit = min(len(_common(chosen, rejected)), len(chosen) - 1, len(rejected) - 1)
    for cut in range(limit, 0, -1):
        if chosen[cut - 1].isspace() or not (chosen[cut].isspace() and rejected[cut].isspace()):
            continue
        if chosen[cut:].isspace() or rejected[cut:].isspace():
            continue
        return chosen[:cut], chosen[cut:], rejected[cut:]
    raise DroppedRow("dropped: chosen and rejected share no beginning of whole words", chosen)


def _common(left: str, right: str) -> str:
    """Return the common beginning of two texts."""
    pairs = enumerate(zip(left, right, strict=False))
    return left[: next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))]
