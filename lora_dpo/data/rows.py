"""One raw row of a recognised shape becomes a typed row, or says why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_dpo.data import messages as chat
from lora_dpo.data.problems import BadRow, DroppedRow
from lora_dpo.data.readers import Raw
from lora_dpo.data.records import Labelled, Message, Pair, Text
from lora_dpo.data.report import DataReport
from lora_dpo.data.scores import SPELLINGS, to_score
from lora_dpo.data.shapes import Shape
from lora_dpo.data.transcripts import cut_common, cut_transcript, transcript_messages

IDENTICAL = "dropped: chosen and rejected are identical"
Messages = tuple[Message, ...]
_YES = {"true", "1", "1.0", "yes", "up", "thumbs_up", "thumbs up", "👍", "desirable", "good"}
_NO = {"false", "0", "0.0", "no", "down", "thumbs_down", "thumbs down", "👎", "undesirable", "bad"}


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one file."""

    shape: Shape
    transcripts: Literal["text", "messages"]
    report: DataReport

    def read(self, raw: Raw) -> Pair | Labelled:
        """Return the typed row; raises ``BadRow`` or ``DroppedRow``."""
        row, layout = raw.values, self.shape.layout
        repair = _Repairs(self.report, raw)
        tools = chat.to_tools(row.get("tools"))
        if layout.kind != "paired":
            prompt, completion = self._single(row, repair)
            label = not layout.label or _label(row.get(layout.label), layout.label)
            return Labelled(prompt, completion, label, raw.origin, tools)
        sides = self._pair(row, repair)
        scores = [to_score(row.get(name), name) for name in SPELLINGS]
        if None not in scores and scores[0] < scores[1]:  # type: ignore[operator]
            detail = f"{scores[0]} < {scores[1]}"
            self.report.add("noted: score of chosen is below rejected's", raw.origin, detail)
        return Pair(*sides, raw.origin, tools, *scores)

    def _pair(self, row: Mapping[str, Any], repair: chat.Repair) -> tuple[Text, Text, Text]:
        sides = self._answers(row)
        if self.shape.layout.context:
            if self.shape.form == "text":
                name = self.shape.layout.context
                return _text(row.get(name), name), _text(*sides[0]), _text(*sides[1])
            return self._chat_pair(row, sides, repair)
        if self.shape.form == "messages":
            prompt, *answers = _whole_conversations(sides, repair)
            return self._with_system(row, prompt), answers[0], answers[1]
        chosen, rejected = _text(*sides[0]), _text(*sides[1])
        if not chosen.strip() or not rejected.strip():
            return "(none)", chosen, rejected  # the check for blank fields names the field
        try:
            return self._cut(chosen, rejected)
        except DroppedRow:
            if chosen == rejected:
                raise DroppedRow(IDENTICAL, chosen) from None
            raise

    def _cut(self, chosen: str, rejected: str) -> tuple[Text, Text, Text]:
        if not self.shape.transcript:
            return cut_common(chosen, rejected)
        prompt, chosen, rejected = cut_transcript(chosen, rejected)
        if self.transcripts == "text":
            return prompt, chosen, rejected
        turns = transcript_messages(prompt)
        chat.check_prompt(turns, derived=True)
        return turns, _assistant(chosen.strip()), _assistant(rejected.strip())

    def _chat_pair(
        self, row: Mapping[str, Any], sides: list[tuple[Any, str]], repair: chat.Repair
    ) -> tuple[Text, Text, Text]:
        chosen, rejected = (chat.answer(value, name, repair) for value, name in sides)
        value, name = row.get(self.shape.layout.context), self.shape.layout.context
        if isinstance(value, str) and min(len(chosen), len(rejected)) > 1:
            # UltraFeedback: the prompt stands again, as messages, before each answer.
            prompt, chosen, rejected = chat.split_answers(chosen, rejected)
            return _checked(self._with_system(row, prompt), chosen, rejected, derived=True)
        prompt = self._prompt(row, value, name, repair)
        chosen, rejected = (chat.without_prompt(side, prompt) for side in (chosen, rejected))
        return _checked(prompt, chosen, rejected, derived=False)

    def _single(self, row: Mapping[str, Any], repair: chat.Repair) -> tuple[Text, Text]:
        layout = self.shape.layout
        cut_out = layout.kind == "demonstrations" and not layout.answers
        value = row.get(layout.context)
        if not layout.answers:
            whole = chat.to_messages(value, layout.context, repair)
            prompt, completion = self._with_system(row, whole[:-1]), whole[-1:]
        elif self.shape.form == "text":
            return _text(value, layout.context), _text(
                row.get(layout.answers[0]), layout.answers[0]
            )
        else:
            completion = chat.answer(row.get(layout.answers[0]), layout.answers[0], repair)
            prompt = self._prompt(row, value, layout.context, repair)
            completion = chat.without_prompt(completion, prompt)
        chat.check_answer(completion, (layout.answers or (layout.context,))[0], derived=cut_out)
        chat.check_prompt(prompt, derived=cut_out)
        return prompt, completion

    def _answers(self, row: Mapping[str, Any]) -> list[tuple[Any, str]]:
        names = self.shape.layout.answers
        if names != ("output",):
            return [(row.get(name), name) for name in names]
        value = row.get("output")
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise BadRow(f"output is {chat.shown(value)}; expected a list [better, worse].")
        return [(value[0], "output[0]"), (value[1], "output[1]")]

    def _prompt(
        self, row: Mapping[str, Any], value: Any, name: str, repair: chat.Repair
    ) -> Messages:
        if not isinstance(value, str):
            return self._with_system(row, chat.to_messages(value, name, repair))
        if name == "instruction" and row.get("input"):
            value = f"{value}\n{_text(row['input'], 'input')}"
        if not value.strip():
            return ()
        turns = (*_history(row.get("history")), {"role": "user", "content": value})
        return self._with_system(row, turns)

    def _with_system(self, row: Mapping[str, Any], turns: Messages) -> Messages:
        system = row.get("system")
        if system is None or (isinstance(system, str) and not system.strip()):
            return turns
        return ({"role": "system", "content": _text(system, "system")}, *turns)


@dataclass(frozen=True)
class _Repairs:
    report: DataReport
    raw: Raw

    def __call__(self, reason: str) -> None:
        self.report.add(reason, self.raw.origin)


def _whole_conversations(
    sides: list[tuple[Any, str]], repair: chat.Repair
) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = (chat.answer(value, name, repair) for value, name in sides)
    for side, (_, name) in zip((chosen, rejected), sides, strict=True):
        if not side:
            raise BadRow(f"{name} has no messages; expected a prompt and an answer.")
    return _checked(*chat.split_answers(chosen, rejected), derived=True)


def _checked(
    prompt: Messages, chosen: Messages, rejected: Messages, *, derived: bool
) -> tuple[Messages, Messages, Messages]:
    chat.check_answer(chosen, "chosen", derived=derived)
    chat.check_answer(rejected, "rejected", derived=derived)
    chat.check_prompt(prompt, derived=derived)
    return prompt, chosen, rejected


def _history(value: Any) -> Messages:
    if not value:
        return ()
    turns: list[Message] = []
    for exchange in value if isinstance(value, list | tuple) else [value]:
        texts = isinstance(exchange, list | tuple) and all(isinstance(t, str) for t in exchange)
        if not texts or len(exchange) != 2:
            raise BadRow(f"history holds {chat.shown(exchange)}; expected [question, answer].")
        turns.append({"role": "user", "content": exchange[0]})
        turns.append({"role": "assistant", "content": exchange[1]})
    return tuple(turns)


def _assistant(text: str) -> Messages:
    return ({"role": "assistant", "content": text},)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {chat.shown(value)}; expected text.")
    return value


def _label(value: Any, name: str) -> bool:
    word = str(value).strip().lower()
    if value is not None and word in _YES | _NO:
        return word in _YES
    raise BadRow(
        f"{name} is {chat.shown(value)}; expected true or false (or 1 and 0, thumbs up and down)."
    )
