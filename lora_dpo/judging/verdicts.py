"""What a judge says of two answers, asked in both orders, and whether the place decided for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lora_dpo.errors import JudgeError, UnreadableAnswerError

Choice = Literal["first", "second", "tie"]
CHOICES = ("first", "second", "tie")
FIRST_ASKED = 5  # pairs after which a judge that answers none is given up


class Judge(Protocol):
    """Whatever says which of two answers to a prompt is better."""

    def choose(self, prompt: str, first: str, second: str) -> Choice:
        """Return ``first``, ``second`` or ``tie``.

        Raises:
            UnreadableAnswerError: the judge said something else about this pair.
            JudgeError: it cannot be asked at all.
        """


@dataclass(frozen=True)
class Verdict:
    """What a judge said of the answers a and b.

    Args:
        forward: its choice with a in the first place.
        backward: its choice with b in the first place.
    """

    forward: Choice
    backward: Choice

    @property
    def winner(self) -> Literal["a", "b", "tie"]:
        """The answer preferred in both orders; whatever else was said is a tie."""
        if (self.forward, self.backward) == ("first", "second"):
            return "a"
        return "b" if (self.forward, self.backward) == ("second", "first") else "tie"

    @property
    def share(self) -> float:
        """What a gets of the win: 1, 0.5 for a tie, 0."""
        return {"a": 1.0, "tie": 0.5, "b": 0.0}[self.winner]

    @property
    def place(self) -> Literal["first", "second", ""]:
        """The place that was preferred whatever stood there, or nothing."""
        same = self.forward == self.backward and self.forward != "tie"
        return self.forward if same else ""  # type: ignore[return-value]  # not a tie


@dataclass(frozen=True)
class PositionBias:
    """How often the place decided and not the answer.

    Args:
        pairs: that were judged in both orders.
        first: of these, the ones where the first place won twice.
        second: likewise the second place.
        p_value: of as unequal counts by a judge without a leaning: exact sign test, two-sided, on
            first minus second of each prompt, since the pairs of one prompt are not independent.
    """

    pairs: int
    first: int
    second: int
    p_value: float

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], prompts: Sequence[str]) -> PositionBias:
        """Count the bias in a judge's verdicts, given the prompt of each."""
        from scipy.stats import binomtest

        places = [verdict.place for verdict in verdicts]
        leaning: Counter[str] = Counter()
        for prompt, place in zip(prompts, places, strict=True):
            leaning[prompt] += (place == "first") - (place == "second")
        up, down = (sum(sign * n > 0 for n in leaning.values()) for sign in (1, -1))
        p_value = binomtest(up, up + down).pvalue if up + down else 1.0
        first, second = places.count("first"), places.count("second")
        return cls(len(verdicts), first, second, float(p_value))

    @property
    def biased(self) -> bool:
        """Whether one place wins beyond chance (p below 0.05)."""
        return self.p_value < 0.05

    def __str__(self) -> str:
        counts = (
            f"the place decided in {self.first + self.second} of {self.pairs} pairs (first "
            f"{self.first}, second {self.second}), which count as ties"
        )
        if not self.biased:
            return counts
        side = "first" if self.first > self.second else "second"
        return f"{counts}; the judge is biased to the {side} place (p {self.p_value:.2g})"


@dataclass(frozen=True)
class Judgement:
    """Verdicts on many pairs, in their order.

    Args:
        verdicts: None where the judge's answer could not be read, or it had failed.
        bias: over the verdicts that are there.
        example: what was said where it could not be read, the first time.
        failed: how the judge failed on the way; the verdicts before are paid for, and are there.
    """

    verdicts: tuple[Verdict | None, ...]
    bias: PositionBias
    example: str = ""
    failed: JudgeError | None = None

    @property
    def unreadable(self) -> int:
        """Pairs without a verdict."""
        return self.verdicts.count(None)

    def lines(self) -> list[str]:
        """Return what there is to know about the judge, for people."""
        lines = [str(self.bias)]
        if self.failed is not None:
            judged = len(self.verdicts) - self.unreadable
            lines.append(f"figures are of {judged} of {len(self.verdicts)} pairs: {self.failed}")
        elif self.unreadable:
            lines.append(f"{self.unreadable} pairs without a verdict, left out: {self.example}")
        return lines


def ask_both_orders(judge: Judge, prompt: str, a: str, b: str) -> Verdict:
    """Ask a judge about two answers in both orders; where it disagrees with itself it is a tie.

    Args:
        judge: of ``open_judge``, or any object with its ``choose``.
        prompt: as a person would read it.
        a: an answer; first in the first question.
        b: the other answer.

    Raises:
        JudgeError: it cannot be asked, or answers with none of the three choices.
    """
    return Verdict(_asked(judge, prompt, a, b), _asked(judge, prompt, b, a))


def judge_answers(
    judge: Judge, pairs: Sequence[tuple[str, str, str]], *, answered: bool = False
) -> Judgement:
    """Ask a judge about many ``(prompt, a, b)``, each in both orders.

    An answer that cannot be read leaves its pair without a verdict, counted; a judge whose first
    five are all of that kind is given up, unless it answered before. A judge that fails behind a
    verdict is asked no more: what it said until then is returned, with ``failed``. A judge may have
    ``at_once``: how many questions it takes at the same time.

    Args:
        judge: of ``open_judge``, or any object with its ``choose``.
        pairs: what to ask about.
        answered: whether this judge gave a verdict already, on other pairs.

    Raises:
        JudgeError: the judge cannot be asked, or answers nothing that can be read.
    """
    said: dict[int, str] = {}
    failures: list[JudgeError] = []

    def ask(place: int) -> Verdict | None:
        if failures:
            return None
        try:
            return ask_both_orders(judge, *pairs[place])
        except UnreadableAnswerError as error:
            said[place] = str(error)
        except JudgeError as error:
            failures.append(error)
        return None

    trial = [] if answered else _first_asked([prompt for prompt, _, _ in pairs])
    verdicts = {place: ask(place) for place in trial}
    if trial and not any(verdicts.values()):
        if failures:
            raise failures[0]
        raise JudgeError(
            f"none of the first {len(trial)} pairs got a verdict that could be read; the first: "
            f"{said[trial[0]]}"
        )
    rest = [place for place in range(len(pairs)) if place not in verdicts]
    with ThreadPoolExecutor(max_workers=int(getattr(judge, "at_once", 1))) as pool:
        verdicts |= zip(rest, pool.map(ask, rest), strict=True)
    ordered = tuple(verdicts[place] for place in range(len(pairs)))
    there = [(v, pairs[place][0]) for place, v in enumerate(ordered) if v is not None]
    if failures and not there:
        raise failures[0]
    bias = PositionBias.of([verdict for verdict, _ in there], [prompt for _, prompt in there])
    return Judgement(ordered, bias, said[min(said)] if said else "", next(iter(failures), None))


def _first_asked(prompts: Sequence[str]) -> list[int]:
    """Return the places to ask first: of different prompts, so that one long prompt tells nothing."""
    others = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
    apart = sorted(others.values())
    again = (place for place in range(len(prompts)) if others[prompts[place]] != place)
    return [*apart, *again][:FIRST_ASKED]


def _asked(judge: Judge, prompt: str, first: str, second: str) -> Choice:
    choice: Any = judge.choose(prompt, first, second)
    if choice not in CHOICES:
        raise JudgeError(f"{type(judge).__name__}.choose returned {choice!r}; expected {CHOICES}.")
    return choice  # type: ignore[no-any-return]  # one of the three
