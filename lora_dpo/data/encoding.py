"""From texts to token ids with an exact boundary between prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_dpo.data.imitations import ANCHORS, Disguise, disguise_of, kept_plain, leaves
from lora_dpo.data.problems import BadRow, Problems
from lora_dpo.data.records import Labelled, Origin, Pair
from lora_dpo.data.report import DataReport
from lora_dpo.data.templates import Rendered, Renderer, answers_of
from lora_dpo.data.vocabulary import Vocabulary, one_bos

MERGE = "repaired: boundary merge: prompt and answer tokenised apart"
NO_BOUNDARY = "dropped: no token boundary between prompt and answer"
PLAIN = "noted: special-token text in content was read as plain text"
CONTROL = (
    "noted: special-token text in content became control tokens (this tokenizer or chat template "
    "cannot keep it as text)"
)
RENDERED = (
    "noted: prompt looks rendered already; its special tokens were read as plain text (give "
    "messages, and the chat template is applied here)"
)
DOUBLE_BOS = "repaired: double BOS collapsed"
EOS_TEXT = "repaired: EOS text at the end of an answer not doubled"
NO_END = "repaired: EOS added behind a chat template that ends an answer with no token"


@dataclass(frozen=True)
class Prepared:
    """A row as texts, ready for the tokenizer."""

    row: Pair | Labelled
    prompt: str
    answers: tuple[str, ...]
    opening: tuple[int, ...]
    imitates: str = ""  # around the first text that imitates a control token
    disguise: Disguise | None = None  # in prompt and answers
    own: Rendered | None = None  # what they are without it

    @property
    def plain(self) -> bool:
        """Whether control tokens in the texts are to stay text."""
        return not self.row.is_chat


@dataclass(frozen=True)
class Encoded:
    """A row as token ids; each answer ends with its stop token."""

    row: Pair | Labelled
    prompt: list[int]
    answers: tuple[list[int], ...]

    @property
    def origin(self) -> Origin:
        """Where the row came from."""
        return self.row.origin

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longer answer."""
        return len(self.prompt) + max(map(len, self.answers))


@dataclass(frozen=True)
class Encoder:
    """Encodes rows in batches and counts what it had to repair."""

    vocabulary: Vocabulary
    renderer: Renderer | None
    report: DataReport

    def __call__(self, rows: Sequence[Pair | Labelled], problems: Problems) -> list[Encoded]:
        """Return the rows that can be encoded, in order."""
        prepared = []
        for row in rows:
            try:
                found = self._prepare_chat(row) if row.is_chat else self._prepare_text(row)
            except BadRow as bad:
                problems.add(row.origin, str(bad))
            else:
                prepared += [found] if found else []
        chats = iter(self._encode([p for p in prepared if not p.plain], plain=False))
        texts = iter(self._encode([p for p in prepared if p.plain], plain=True))
        ordered = [next(texts if p.plain else chats) for p in prepared]
        return [row for row in ordered if row is not None]

    def _prepare_text(self, row: Pair | Labelled) -> Prepared | None:
        parts = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
        prompt, doubled = self.vocabulary.without_bos(str(row.prompt))
        opening = self.vocabulary.opening
        if doubled:
            if opening or doubled > 1:
                self.report.add(DOUBLE_BOS, row.origin, str(row.prompt))
            bos = self.vocabulary.bos
            opening = opening if bos in opening else (int(bos or 0), *opening)
        stripped = [self.vocabulary.without_eos(str(part)) for part in parts]
        if any(count for _, count in stripped):
            self.report.add(EOS_TEXT, row.origin, str(parts[0])[-40:])
        answers = tuple(text for text, _ in stripped)
        if not all(text.strip() for text in answers) or not (prompt.strip() or opening):
            self.report.add("dropped: nothing but special tokens in prompt or answer", row.origin)
            return None
        if row.tools:
            self.report.add("noted: tools are for messages; text rows do not use them", row.origin)
        imitates = self._imitation((prompt, *answers))
        if imitates and (hit := self.vocabulary.control_text(prompt)) and hit.start() == 0:
            self.report.add(RENDERED, row.origin, prompt)
            imitates = ""
        return Prepared(row, prompt, answers, opening, imitates)

    def _prepare_chat(self, row: Pair | Labelled) -> Prepared:
        assert self.renderer is not None
        rendered = self.renderer(row)
        values = (row.prompt, *answers_of(row), row.tools)
        disguise = disguise_of(values, self.vocabulary)
        if disguise is None:
            return Prepared(row, rendered.prompt, self._ends_of_turns(rendered), ())
        imitates = self._imitation(list(leaves(values)))
        shown, hidden = rendered, self._disguised(row, rendered, disguise)
        if hidden is None:
            disguise = None
        else:
            shown = hidden
        answers = self._ends_of_turns(shown)
        return Prepared(row, shown.prompt, answers, (), imitates, disguise, rendered)

    def _disguised(
        self, row: Pair | Labelled, rendered: Rendered, disguise: Disguise
    ) -> Rendered | None:
        """Render a row in disguise; None where the template itself looks for what is hidden."""
        assert self.renderer is not None
        quiet = replace(self.renderer, report=DataReport())
        try:
            hidden = quiet(disguise.row(row))
        except BadRow:
            return None
        answers = tuple(disguise.off(text) for text in hidden.answers)
        same = disguise.off(hidden.prompt) == rendered.prompt and answers == rendered.answers
        return hidden if same else None

    def _ends_of_turns(self, rendered: Rendered) -> tuple[str, ...]:
        return tuple(self._up_to_end_of_turn(text) for text in rendered.answers)

    def _up_to_end_of_turn(self, text: str) -> str:
        """Cut white space that the template puts behind the token that ends the turn."""
        trimmed = text.rstrip()
        ends = any(trimmed.endswith(token) for token in self.vocabulary.added)
        return trimmed if ends else text

    def _imitation(self, texts: Sequence[str]) -> str:
        """Return what stands around the first text that imitates a control token, or nothing."""
        hits = (match for text in texts if (match := self.vocabulary.control_text(text)))
        first = next(hits, None)
        return first.string[max(0, first.start() - 20) : first.end() + 20] if first else ""

    def _encode(self, rows: list[Prepared], *, plain: bool) -> list[Encoded | None]:
        """Encode rows of one kind; None for a row without a boundary between the tokens."""
        prompts = self.vocabulary.encode([p.prompt for p in rows], plain=plain)
        starts = [(p.prompt, ids) for p, ids in zip(rows, prompts, strict=True)]
        if not plain:
            starts = self._tails(starts)
        wholes = iter(
            self.vocabulary.encode(
                [text + a for p, (text, _) in zip(rows, starts, strict=True) for a in p.answers],
                plain=plain,
            )
        )
        joints = [[next(wholes) for _ in p.answers] for p in rows]
        split = [
            [_behind(start, ids) for ids in joint]
            for (_, start), joint in zip(starts, joints, strict=True)
        ]
        crossing = [i for i, answers in enumerate(split) if None in answers]
        cases = [
            (starts[i][1], ids, text)
            for i in crossing
            for ids, text in zip(joints[i], rows[i].answers, strict=True)
        ]
        apart = iter(self._apart(cases, plain=plain))
        for i in crossing:
            # Both answers are tokenised apart even where one alone would not need it.
            split[i] = [next(apart) for _ in split[i]]
            reason = NO_BOUNDARY if None in split[i] else MERGE
            self.report.add(reason, rows[i].row.origin, rows[i].prompt[-30:])
        return [
            None if None in answers else self._told(row, prompt, [ids or [] for ids in answers])
            for row, prompt, answers in zip(rows, prompts, split, strict=True)
        ]

    def _told(self, row: Prepared, prompt: list[int], answers: list[list[int]]) -> Encoded | None:
        """Return a row whose imitations of control tokens are text, and count it if it has some."""
        if row.disguise is not None and row.own is not None:
            texts = (row.prompt, *row.answers)
            every = [
                kept_plain(self.vocabulary, row.disguise, text, ids)
                for text, ids in zip(texts, (prompt, *answers), strict=True)
            ]
            if None in every:  # as it is served, then
                ends = self._ends_of_turns(row.own)
                served = replace(row, prompt=row.own.prompt, answers=ends, disguise=None)
                return self._encode([served], plain=False)[0]
            prompt, *answers = [ids for ids in every if ids is not None]
            self.report.add(PLAIN, row.row.origin, row.imitates)
        elif row.imitates:
            every_id = {*prompt, *(token for ids in answers for token in ids)}
            text = row.plain and self.vocabulary.control_ids.isdisjoint(every_id)
            self.report.add(PLAIN if text else CONTROL, row.row.origin, row.imitates)
        return self._finish(row, prompt, answers)

    def _tails(self, prompts: list[tuple[str, list[int]]]) -> list[tuple[str, list[int]]]:
        """Shorten each prompt (text and ids) to where its tokens cannot depend on what is before.

        Conversations are mostly prompt; tokenising it again before each answer costs most.
        """
        texts = [self.vocabulary.tail(text) for text, _ in prompts]
        unique = list(dict.fromkeys(texts))
        ids = dict(zip(unique, self.vocabulary.encode(unique, plain=False), strict=True))
        added = set(self.vocabulary.added.values())
        result = []
        for text, (prompt, whole) in zip(texts, prompts, strict=True):
            tail = ids[text]
            fits = bool(tail) and tail[0] in added and whole[-len(tail) :] == tail
            result.append((text, tail) if fits else (prompt, whole))
        return result

    def _apart(
        self, cases: Sequence[tuple[list[int], list[int], str]], *, plain: bool
    ) -> list[list[int] | None]:
        """Find ids of each answer that decode, behind the prompt's, to exactly the whole text.

        A case is the prompt's ids, the ids of the whole, and the answer's text.
        """
        targets = self.vocabulary.decode([whole for _, whole, _ in cases])
        found: list[list[int] | None] = [None] * len(cases)
        for anchor in ("", *ANCHORS):
            left = [i for i, ids in enumerate(found) if ids is None]
            texts = [anchor + cases[i][2] for i in left]
            base, *encoded = self.vocabulary.encode([anchor, *texts], plain=plain)
            behind = [_behind(base if anchor else [], ids) for ids in encoded]
            tried = [(i, ids) for i, ids in zip(left, behind, strict=True) if ids]
            decoded = self.vocabulary.decode([cases[i][0] + ids for i, ids in tried])
            for (i, ids), text in zip(tried, decoded, strict=True):
                found[i] = ids if text == targets[i] else None
        return found

    def _finish(self, row: Prepared, prompt: list[int], answers: list[list[int]]) -> Encoded | None:
        prompt = [*row.opening, *prompt] if row.plain else self._one_bos(row, prompt)
        if not prompt:
            self.report.add("dropped: prompt has no tokens", row.row.origin)
            return None
        finished = [self._ended(row, ids) for ids in answers]
        if not row.plain:
            ends = [ids[-1] for ids in finished if ids[-1] not in self.vocabulary.stops]
            if ends:
                name = self.vocabulary.name(ends[0])
                reason = f"noted: end-of-turn token {name} is not a stop token of the model"
                self.report.add(reason, row.row.origin)
            if any(len(a) != len(b) for a, b in zip(answers, finished, strict=True)):
                self.report.add(NO_END, row.row.origin, row.answers[0][-30:])
        return Encoded(row.row, prompt, tuple(finished))

    def _one_bos(self, row: Prepared, prompt: list[int]) -> list[int]:
        single, count = one_bos(self.vocabulary.tokenizer, prompt)
        if count > 1:
            self.report.add(DOUBLE_BOS, row.row.origin, row.prompt)
        return single

    def _ended(self, row: Prepared, ids: list[int]) -> list[int]:
        """Return an answer's ids with exactly one token that ends it."""
        if row.plain or not ids or ids[-1] not in self._ends:
            return [*ids, self.vocabulary.eos]
        return ids

    @property
    def _ends(self) -> set[int]:
        return {*self.vocabulary.added.values(), *self.vocabulary.stops}


def _behind(prompt: list[int], whole: list[int]) -> list[int] | None:
    """Return what follows the prompt's tokens, or None where a token crosses the boundary."""
    rest = whole[len(prompt) :]
    return rest if rest and whole[: len(prompt)] == prompt else None
