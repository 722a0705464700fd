"""A seeded grammar which yields (request, story) pairs.

The request names a hero and an object; the story follows the request, but its mood does not:
each story draws how kind it is, and each sentence then draws kind, plain or unkind. A model
trained on the pairs therefore answers one request with stories of very different reward, which
is the room that preference training has to work in.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lora_dpo.quickstart import grammar

Message = dict[str, str]

HELD_OUT_ONE_IN = 8
"""One subject in this many is kept out of training."""

STORY_KINDNESS = [(0.05, 24), (0.25, 22), (0.5, 20), (0.75, 18), (0.95, 16)]
"""(probability that a mooded sentence is kind, weight): the base leans a little to the grumpy."""
PLAIN_PROBABILITY = 0.25
STORY_LENGTHS = [(3, 15), (4, 35), (5, 35), (6, 15)]
"""(sentences, weight)."""


@dataclass(frozen=True)
class Subject:
    """What a request asks about: a hero and an object."""

    name: str
    animal: str
    adjective: str
    thing: str

    @property
    def plot(self) -> str:
        """The plot that the adjective calls for: lost, broken or treasure."""
        return next(p for p, words in grammar.ADJECTIVES.items() if self.adjective in words)

    @property
    def hero(self) -> str:
        """For instance "Mia the fox"."""
        return f"{self.name} the {self.animal}"

    @property
    def held_out(self) -> bool:
        """Whether training must never see this subject; fixed by its words, not by a seed."""
        key = f"{self.hero} and {self.adjective} {self.thing}"
        return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Example:
    """One request with one story that answers it."""

    subject: Subject
    request: str
    story: str


def _weighted(rng: random.Random, table: list[tuple[float, int]]) -> float:
    values, weights = zip(*table, strict=True)
    return float(rng.choices(values, weights)[0])


def _article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def sample_subject(rng: random.Random, held_out: bool) -> Subject:
    """A subject of the asked side of the split."""
    while True:
        subject = Subject(
            name=rng.choice(grammar.GIRLS + grammar.BOYS),
            animal=rng.choice(grammar.ANIMALS),
            adjective=rng.choice([a for words in grammar.ADJECTIVES.values() for a in words]),
            thing=rng.choice(grammar.OBJECTS),
        )
        if subject.held_out == held_out:
            return subject


def phrase_request(subject: Subject, rng: random.Random) -> str:
    """One way of asking for a story about the subject."""
    shape = rng.choice(grammar.REQUESTS)
    return _article(shape.format(NA=subject.hero, ao=f"a {subject.adjective} {subject.thing}"))


def sample_requests(
    rng: random.Random, held_out: bool, count: int, avoid: frozenset[Subject] = frozenset()
) -> list[tuple[Subject, str]]:
    """`count` requests about distinct subjects, none of them in `avoid`."""
    taken = set(avoid)
    requests: list[tuple[Subject, str]] = []
    while len(requests) < count:
        subject = sample_subject(rng, held_out)
        if subject not in taken:
            taken.add(subject)
            requests.append((subject, phrase_request(subject, rng)))
    return requests


class Teller:
    """Fills the slots of sentence shapes for one story; a mood word is used once in a story."""

    def __init__(self, subject: Subject, rng: random.Random) -> None:
        self.rng = rng
        self.subject = subject
        friends = [n for n in grammar.GIRLS + grammar.BOYS if n != subject.name]
        animals = [a for a in grammar.ANIMALS if a != subject.animal]
        self.friend, self.friend_animal = rng.choice(friends), rng.choice(animals)
        moods = grammar.KIND_SLOTS | grammar.UNKIND_SLOTS
        self.moods = {slot: rng.sample(words, len(words)) for slot, words in moods.items()}

    def sentence(self, shape: str) -> str:
        """The shape with its slots filled, beginning with a capital."""
        while "{" in shape:
            slot = shape[shape.index("{") + 1 : shape.index("}")]
            shape = shape.replace("{" + slot + "}", self._fill(slot), 1)
        return _article(shape[0].upper() + shape[1:])

    def _fill(self, slot: str) -> str:
        subject, rng = self.subject, self.rng
        if slot in self.moods:
            return self.moods[slot].pop()
        girl = subject.name in grammar.GIRLS
        fixed = {
            "NA": subject.hero,
            "N": subject.name,
            "animal": subject.animal,
            "o": subject.thing,
            "ao": f"a {subject.adjective} {subject.thing}",
            "he": "she" if girl else "he",
            "his": "her" if girl else "his",
            "him": "her" if girl else "him",
            "FA": f"{self.friend} the {self.friend_animal}",
            "F": self.friend,
        }
        if slot in fixed:
            return fixed[slot]
        if slot in ("goal", "going", "past"):
            return rng.choice(grammar.PLOT_PHRASES[subject.plot][slot])
        drawn = {
            "S": [fixed["he"], fixed["he"], subject.name, f"the {subject.animal}"],
            "place": [static for static, _ in grammar.PLACES],
            "to": [moving for _, moving in grammar.PLACES],
            "day": grammar.DAYS,
            "weather": grammar.WEATHER,
            "food": grammar.FOODS,
            "small": grammar.SMALL_ANIMALS,
        }
        return rng.choice(drawn[slot])


def shapes_for(plot: str) -> dict[str, grammar.Shapes]:
    """Every sentence shape open to a plot, by stage and mood, in the order of telling."""
    act = grammar.ACT | {"plain": grammar.PLOT_ACTS[plot]}
    endings = grammar.PLOT_ENDINGS[plot]
    # The plot's own endings are listed twice: they should close most stories.
    ending = {mood: 2 * endings[mood] + grammar.ENDING[mood] for mood in endings}
    return {
        "opening": grammar.OPENING,
        "act": act,
        "sky": grammar.SKY,
        "meet": grammar.MEET,
        "talk": grammar.TALK,
        "ending": ending,
    }


def _stages(rng: random.Random) -> list[str]:
    """The stages of one story in order; nobody talks before somebody was met."""
    sentences = int(_weighted(rng, [(float(n), w) for n, w in STORY_LENGTHS]))
    weights = {"act": 3.0, "sky": 1.0, "meet": 3.0, "talk": 3.0}
    while True:
        order = sorted(weights, key=lambda stage: rng.random() ** (1 / weights[stage]))
        middle = set(order[-(sentences - 2) :])
        if "talk" not in middle or "meet" in middle:
            return ["opening", *(stage for stage in weights if stage in middle), "ending"]


def tell_story(subject: Subject, rng: random.Random) -> str:
    """A story of three to six sentences about the subject, of a mood drawn from `rng`."""
    kindness = _weighted(rng, STORY_KINDNESS)
    teller = Teller(subject, rng)
    shapes = shapes_for(subject.plot)
    sentences = []
    for stage in _stages(rng):
        mood = "kind" if rng.random() < kindness else "unkind"
        mood = "plain" if rng.random() < PLAIN_PROBABILITY else mood
        sentences.append(teller.sentence(rng.choice(shapes[stage][mood])))
    return " ".join(sentences)


def examples(seed: int, held_out: bool) -> Iterator[Example]:
    """An endless stream of examples from one side of the split; equal seeds, equal streams."""
    rng = random.Random(seed)
    while True:
        subject = sample_subject(rng, held_out)
        yield Example(subject, phrase_request(subject, rng), tell_story(subject, rng))


def as_chat(request: str, story: str | None = None) -> list[Message]:
    """The messages of a chat: the request, and the story if there is one."""
    chat = [{"role": "user", "content": request}]
    return chat if story is None else [*chat, {"role": "assistant", "content": story}]
