"""The true reward of the quickstart, a rule to be read in ten seconds.

    Every sentence votes: +1 if it holds more kind words than unkind words, -1 if it holds
    more unkind words than kind words, and 0 otherwise. The reward is the mean vote.
    Text which does not finish its last sentence gets -1, the lowest reward.

So the reward lies in [-1, 1]. Three details close the short cuts:

* Length does not pay, because the votes are averaged; a story counts as at least
  three sentences, so that one kind sentence alone earns 1/3 and not 1.
* Stuffing does not pay, because a sentence votes at most +1 however many kind words it has.
* Repeating does not pay, because a kind word counts only the first time a story uses it.
  An unkind word counts every time.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


KIND_WORDS = _words(
    """
    brave caring cheerful friendly generous gentle helpful kind patient polite
    calm delighted glad happy joyful merry proud thankful
    cheerfully gently gladly happily kindly politely sweetly warmly
    cheered comforted danced forgave helped hugged invited laughed praised shared smiled thanked
    friend friends gift joy kindness love lovely smile warm
    """
)

UNKIND_WORDS = _words(
    """
    bossy cruel greedy mean nasty rude selfish spiteful stubborn unkind
    angry bitter gloomy grumpy jealous lonely miserable sad
    angrily bitterly coldly crossly meanly rudely sadly spitefully
    blamed cried grabbed growled kicked lied pushed scolded shouted snapped stomped sulked teased
    yelled
    anger fight quarrel tears trouble
    """
)

FEWEST_SENTENCES = 3
LOWEST_REWARD = -1.0

_SENTENCE = re.compile(r"[^.!?]+[.!?]+")
_WORD = re.compile(r"[a-z]+")
_FINISHED = re.compile(r"[.!?][\"')]*$")


def sentence_votes(completion: str) -> list[int]:
    """The vote of each finished sentence, in order: +1, 0 or -1."""
    seen: set[str] = set()
    votes = []
    for sentence in _SENTENCE.findall(completion.lower()):
        words = _WORD.findall(sentence)
        if not words:
            continue
        kind = KIND_WORDS.intersection(words) - seen
        unkind = UNKIND_WORDS.intersection(words)
        seen |= kind
        votes.append((len(kind) > len(unkind)) - (len(kind) < len(unkind)))
    return votes


def true_reward(completion: str) -> float:
    """The mean vote of the sentences, from -1 (all unkind, or unfinished) to +1 (all kind)."""
    if not _FINISHED.search(completion.strip()):
        return LOWEST_REWARD
    votes = sentence_votes(completion)
    return sum(votes) / max(FEWEST_SENTENCES, len(votes))
