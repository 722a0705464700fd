"""The rules of the detectors on numbers whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lora_dpo.diagnostics import Diagnosis, detectors
from lora_dpo.diagnostics.detectors import Answers, Curve

DRAWS = np.random.default_rng(0)


def curve(*values: float) -> Curve:
    return Curve(np.arange(len(values), dtype=float), np.array(values))


def test_length_alone_tells_what_it_tells() -> None:
    short = DRAWS.integers(10, 20, 200).astype(float)
    longer = Answers((short + 5, short), (short + 5, short))
    found = detectors.length_bias(longer)
    assert found.found and found.measured["accuracy_of_length_alone"] == 1.0
    assert found.measured["reward_length_correlation"] == pytest.approx(1.0)
    assert found.measured["wanted_minus_unwanted_tokens"] == 5.0
    # ties count half: no length tells anything
    level = detectors.length_bias(Answers((short, short), (short, short)))
    assert not level.found and level.measured["accuracy_of_length_alone"] == 0.5


def test_longer_wanted_answers_are_no_bias_where_the_reward_does_not_follow() -> None:
    short = DRAWS.integers(10, 20, 200).astype(float)
    shuffled = Answers((short + 3, short), (DRAWS.normal(0, 1, 200), DRAWS.normal(0, 1, 200)))
    assert not detectors.length_bias(shuffled).found
    # the same lengths, and samples that have become longer
    drifted = detectors.length_bias(shuffled, (np.full(8, 30.0), np.full(8, 20.0)))
    assert drifted.found and drifted.measured["sampled_length_ratio"] == 1.5
    assert not detectors.length_bias(shuffled, (np.full(8, 20.0), np.full(8, 20.0))).found


def test_unpaired_answers_are_compared_as_couples() -> None:
    found = detectors.length_bias(Answers((np.array([3.0, 1.0]), np.array([2.0])), paired=False))
    assert found.measured["wanted_is_longer_share"] == 0.5


def test_displacement_is_a_fall_of_the_wanted_side_and_of_no_other() -> None:
    falling, rising = DRAWS.normal(-5, 1, 50), DRAWS.normal(3, 1, 50)
    assert detectors.displacement((falling, falling - 5)).found
    assert not detectors.displacement((rising, falling)).found
    # a fall within chance is none
    assert not detectors.displacement((DRAWS.normal(-0.1, 5, 20), falling)).found
    measured = detectors.displacement((np.array([-1.0, 1.0]), np.array([0.0, 2.0]))).measured
    assert measured["share_of_wanted_that_fell"] == 0.5
    assert (measured["wanted_logratio_nats"], measured["unwanted_logratio_nats"]) == (0.0, 1.0)


def test_over_optimisation_needs_held_out_and_training_to_part() -> None:
    up, down = curve(0.6, 0.7, 0.8, 0.9), curve(0.8, 0.78, 0.7, 0.6)
    none = np.zeros(0)

    def accuracy(held_out: Curve, training: Curve) -> bool:
        values = {"accuracy": held_out}, {"accuracy": training}
        return detectors.over_optimisation(None, none, *values, rows=400).found

    assert accuracy(down, up)
    assert not accuracy(up, up) and not accuracy(down, down)
    few = detectors.over_optimisation(None, none, {"accuracy": down}, {"accuracy": up}, rows=4)
    assert not few.found  # 0.2 of four rows is chance
    rising = {"loss": curve(0.5, 0.4, 0.6)}
    assert detectors.over_optimisation(None, none, rising, {"loss": down}, rows=9).found
    assert not detectors.over_optimisation(None, none, rising, {"loss": up}, rows=9).found


def test_over_optimisation_counts_the_kl_a_token() -> None:
    none = np.zeros(0)
    far = detectors.over_optimisation(
        (np.array([30.0, 10.0]), np.array([20.0, 20.0])), none, {}, {}, 1
    )
    assert far.found and far.measured["kl_nats_a_token"] == 1.0
    assert far.measured["kl_nats_a_sample"] == 20.0
    near = detectors.over_optimisation((np.array([1.0]), np.array([20.0])), none, {}, {}, 1)
    assert near.state == "not found"
    assert detectors.over_optimisation(None, none, {}, {}, 1).state == "not measured"


def test_a_reference_mismatch_is_a_gap_beyond_a_nat_a_token() -> None:
    own = DRAWS.normal(-0.5, 0.1, 30)
    assert detectors.reference_mismatch(own - 3, own - 3, own).found
    assert not detectors.reference_mismatch(own - 0.5, own - 3, own).found
    assert not detectors.reference_mismatch(own + 3, own, own).found


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3])
def test_the_rate_of_flipped_labels_is_estimated(rate: float) -> None:
    draws = np.random.default_rng(1)
    count = 2000
    margins = draws.normal(2, 1, count)
    flipped = draws.random(count) < rate
    margins[flipped] *= -1  # a flipped label mirrors the margin
    seen = {f"f:{i}": [(1, 0.0), (10, float(m))] for i, m in enumerate(margins)}
    found = detectors.label_noise(seen)
    # the share of a binomial, three standard errors
    assert found.found
    assert found.measured["estimated_rate"] == pytest.approx(rate, abs=3 * math.sqrt(rate / count))
    assert {int(row[2:]) for row in found.rows} <= set(np.flatnonzero(margins < 0))
    assert found.rows[0] == f"f:{int(margins.argmin())}"


def test_hard_pairs_alone_are_no_label_noise() -> None:
    margins = np.random.default_rng(2).normal(1, 1, 2000)  # 16 % negative, few of them strongly
    seen = {f"f:{i}": [(10, float(m))] for i, m in enumerate(margins)}
    assert not detectors.label_noise(seen).found
    unlearnt = {f"f:{i}": [(10, float(m))] for i, m in enumerate(margins - 1)}
    assert detectors.label_noise(unlearnt).state == "not measured"
    assert detectors.label_noise({"f:1": [(1, 1.0)]}).state == "not measured"


def test_a_row_that_recovers_is_not_listed() -> None:
    seen = {f"f:{i}": [(10, 1.0 + i / 100)] for i in range(40)}
    seen |= {"bad:1": [(8, -9.0), (10, -9.0)], "late:1": [(8, -9.0), (10, 0.1)]}
    assert detectors.label_noise(seen).rows == ("bad:1",)


def test_not_learning_is_a_policy_at_its_reference() -> None:
    still = detectors.not_learning(np.zeros(9), 0.0, {"grad_norm": curve(1e-9, 1e-9)})
    assert still.found and still.measured["last_grad_norm"] == 1e-9
    assert not detectors.not_learning(np.full(9, -0.7), 1e-3, {}).found
    assert detectors.not_learning(np.full(9, 0.01), 1e-3, {}).found


def test_every_failure_says_why_and_what_to_change_by_names_that_exist() -> None:
    import re

    from lora_dpo.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
    from lora_dpo.objectives import OBJECTIVES

    keys = {
        "data": set(DataConfig.model_fields),
        "lora": set(LoraConfig.model_fields),
        "model": set(ModelConfig.model_fields),
        "objective": {"beta", "nll_weight", "label_smoothing"},
        "train": {*TrainConfig.model_fields, "learning_rate", "num_train_epochs"},
    }
    assert set(keys) < set(Config.model_fields)
    for failure in (*detectors.ALL, detectors.SIMILARITY):
        assert failure.why and failure.remedies
        for remedy in failure.remedies:
            for section, key in re.findall(r"\b(data|lora|model|objective|train)\.(\w+)", remedy):
                assert key in keys[section], remedy
            if named := re.match(r"objective ((?:\w+(?:, | or )?)+)", remedy):
                names = re.split(r", | or ", re.sub(r"[:,] .*$| on .*$", "", named.group(1)))
                assert names[0] in OBJECTIVES, remedy


def test_a_diagnosis_survives_its_file(tmp_path: Path) -> None:
    found = detectors.displacement((np.full(9, -5.0), np.full(9, -9.0)))
    empty = detectors.LABEL_NOISE.not_measured("no margins")
    diagnosis = Diagnosis("run", (empty, found))
    diagnosis.write(tmp_path / "d.json")
    assert Diagnosis.read(tmp_path / "d.json") == diagnosis
    lines = diagnosis.lines()
    assert lines[1].startswith("FOUND") and lines[-1].startswith("-")
    assert any("try: objective dpop" in line for line in lines)
