"""Laws of the true reward."""

from __future__ import annotations

import itertools

import pytest

from lora_dpo.quickstart import world
from lora_dpo.quickstart.reward import KIND_WORDS, UNKIND_WORDS, sentence_votes, true_reward

HAND_SCORED = [
    ("Mia was happy. Tom smiled at her. They became friends.", 1.0),
    ("Mia was sad. Tom shouted at her. They had a fight.", -1.0),
    ("Mia was happy. Tom shouted at her. They went home.", 0.0),
    ("Mia was glad. Tom was kind. They went home.", 2 / 3),
    ("Mia sat down. Tom stood up. They went home. It was late.", 0.0),
    ("Mia was glad. Tom was sad. Ben was sad. They went home.", -1 / 4),
    ("Mia was glad.", 1 / 3),
    ('"You are a kind fox," said Tom.', 1 / 3),
    ("Mia was happy but sad. Tom sat down. They went home.", 0.0),
]


@pytest.mark.parametrize(("text", "reward"), HAND_SCORED)
def test_the_reward_of_a_text_is_what_a_reader_counts_by_hand(text: str, reward: float) -> None:
    assert true_reward(text) == pytest.approx(reward)


@pytest.mark.parametrize("text", ["", " ", "Mia was happy. Tom was kind. They", "happy", "Mia,"])
def test_text_which_does_not_finish_its_last_sentence_gets_the_lowest_reward(text: str) -> None:
    assert true_reward(text) == -1.0


def test_repeating_a_text_never_raises_its_reward() -> None:
    stories = [e.story for e in itertools.islice(world.examples(3, held_out=False), 300)]
    for text in [text for text, _ in HAND_SCORED] + stories:
        assert true_reward(f"{text} {text}") <= true_reward(text)


def test_repeating_a_kind_word_adds_nothing() -> None:
    once = "Mia was happy. Tom sat down. They went home."
    again = "Mia was happy happy happy. Tom sat down happy. They went home happy."
    assert true_reward(again) == true_reward(once)


def test_a_sentence_stuffed_with_kind_words_votes_once() -> None:
    stuffed = " ".join(sorted(KIND_WORDS)) + ". Tom sat down. They went home."
    assert true_reward(stuffed) == pytest.approx(1 / 3)


def test_plain_sentences_only_pull_a_kind_text_towards_zero() -> None:
    text = "Mia was happy. Tom smiled at her. They became friends."
    rewards = [true_reward(text + " They went home." * more) for more in range(5)]
    assert rewards == sorted(rewards, reverse=True) and rewards[-1] < rewards[0]


def test_an_unkind_word_counts_every_time() -> None:
    assert sentence_votes("Mia was sad. Tom was sad. Ben was sad.") == [-1, -1, -1]


def test_no_word_is_both_kind_and_unkind() -> None:
    assert not KIND_WORDS & UNKIND_WORDS


def test_rewards_stay_between_minus_one_and_one() -> None:
    stories = itertools.islice(world.examples(4, held_out=False), 500)
    assert all(-1 <= true_reward(example.story) <= 1 for example in stories)
