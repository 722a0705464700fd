"""Laws of choosing a pair among samples."""

from __future__ import annotations

from lora_dpo.quickstart.pairs import Sample, choose_pair


def sample(reward: float, tokens: int = 50, finished: bool = True) -> Sample:
    return Sample("text", tokens, finished, reward)


def test_the_best_is_chosen_over_the_worst() -> None:
    assert choose_pair([sample(0.5), sample(-1.0), sample(1.0)]) == (sample(1.0), sample(-1.0))


def test_samples_of_nearly_equal_reward_give_no_pair() -> None:
    assert choose_pair([sample(0.25), sample(0.0), sample(0.5)]) == (sample(0.5), sample(0.0))
    assert choose_pair([sample(0.25), sample(0.0), sample(0.4)]) is None


def test_a_sample_which_was_cut_off_is_in_no_pair() -> None:
    assert choose_pair([sample(1.0), sample(-1.0, finished=False)]) is None


def test_a_wider_gap_is_given_up_when_the_lengths_are_far_apart() -> None:
    samples = [sample(1.0, tokens=90), sample(0.5, tokens=60), sample(-1.0, tokens=50)]
    assert choose_pair(samples) == (samples[1], samples[2])


def test_among_equal_gaps_the_closest_lengths_win() -> None:
    samples = [sample(1.0, tokens=60), sample(-1.0, tokens=50), sample(-1.0, tokens=58)]
    assert choose_pair(samples) == (samples[0], samples[2])
