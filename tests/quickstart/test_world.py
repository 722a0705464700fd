"""Laws of the story world."""

from __future__ import annotations

import itertools
import random

import pytest

from lora_dpo.quickstart import grammar, world
from lora_dpo.quickstart.reward import KIND_WORDS, UNKIND_WORDS, sentence_votes, true_reward

VOTES = {"kind": 1, "plain": 0, "unkind": -1}
SUBJECT = world.Subject("Mia", "fox", "lost", "lantern")


def some(count: int, seed: int = 0, held_out: bool = False) -> list[world.Example]:
    return list(itertools.islice(world.examples(seed, held_out), count))


def test_the_same_seed_tells_the_same_stories() -> None:
    assert some(50, seed=7) == some(50, seed=7)
    assert some(50, seed=7) != some(50, seed=8)


def test_held_out_subjects_are_never_among_the_training_ones() -> None:
    training = some(3000)
    held_out = some(1000, held_out=True)
    assert not {e.subject for e in training} & {e.subject for e in held_out}
    assert not {e.request for e in training} & {e.request for e in held_out}


def test_which_side_a_subject_is_on_depends_on_its_words_alone() -> None:
    for example in some(200) + some(200, held_out=True):
        assert world.Subject(**vars(example.subject)).held_out == example.subject.held_out


def test_requests_are_about_distinct_subjects_and_avoid_the_given_ones() -> None:
    first = world.sample_requests(random.Random(0), True, 300)
    avoided = frozenset(subject for subject, _ in first)
    second = world.sample_requests(random.Random(0), True, 300, avoid=avoided)
    assert len(avoided) == 300 == len({request for _, request in first})
    assert not avoided & {subject for subject, _ in second}


def test_thousands_of_requests_exist() -> None:
    assert len({example.request for example in some(5000)}) > 4900


@pytest.mark.parametrize("plot", list(grammar.PLOT_PHRASES))
def test_every_sentence_shape_votes_for_its_mood(plot: str) -> None:
    subject = world.Subject("Mia", "fox", grammar.ADJECTIVES[plot][0], "lantern")
    rng = random.Random(0)
    for stage, moods in world.shapes_for(plot).items():
        for mood, shapes in moods.items():
            for shape in shapes:
                sentence = world.Teller(subject, rng).sentence(shape)
                assert sentence_votes(sentence) == [VOTES[mood]], (stage, mood, sentence)


def test_the_grammar_can_say_every_word_that_the_reward_counts() -> None:
    said = {w.strip('.,?"') for e in some(4000) for w in e.story.lower().split()}
    assert said >= KIND_WORDS | UNKIND_WORDS


def test_a_request_carries_no_mood() -> None:
    assert all(sentence_votes(example.request) == [0] for example in some(500))


def test_one_request_gets_stories_of_every_mood() -> None:
    rng = random.Random(0)
    rewards = [true_reward(world.tell_story(SUBJECT, rng)) for _ in range(300)]
    assert min(rewards) == -1.0 and max(rewards) == 1.0
    assert any(abs(reward) < 0.3 for reward in rewards)


def test_a_story_has_three_to_six_finished_sentences_about_its_subject() -> None:
    for example in some(500):
        assert 3 <= len(sentence_votes(example.story)) <= 6
        assert example.story.endswith(".")
        assert example.subject.name in example.story
        assert example.subject.thing in example.story
        assert not set("{}") & set(example.story + example.request)


def test_articles_agree_with_the_word_that_follows() -> None:
    for example in some(1000):
        words = f"{example.request} {example.story}".lower().split()
        for article, word in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), (article, word)


def test_stories_are_hardly_ever_told_twice() -> None:
    assert len({example.story for example in some(2000)}) > 1990
