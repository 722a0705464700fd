"""Laws of several processes: what two of them train is what one trains, and both know it.

One launch of two processes trains all cases here; ``make processes`` has the others. Rows are summed up
in another order than in one process, so numbers agree to the rounding of float32 sums (1e-7 of a term),
which 6 steps of SGD carry on: 1e-5. What is computed before the first step is equal to the last bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo.config import Config
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.policy import load_policy
from lora_dpo.ranks import refuse_launch
from lora_dpo.sharding import check_sharding
from lora_dpo.zero import check_zero
from tests.processes.running import alone, together
from tests.processes.worker import Case

SAVED = {"save_strategy": "steps", "save_steps": 4}  # within the second epoch
CASES = [
    Case("dpo", "dpo", {"beta": 0.2, "nll_weight": 0.5}, arguments=SAVED),
    Case("kto", "kto"),
    Case(
        "beta_dpo", "beta_dpo", {"rho": 0.5}, {"engine": "plain"}
    ),  # coupled, drawing, with a state
]
PLAIN = {"engine": "plain"}
SKIPS = Case("skips", "dpo", trainer={**PLAIN, "on_nonfinite": "skip"}, bad_row=6)
SETTINGS = {"beta": 0.2, "nll_weight": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(tiny_model: Path, pairs: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    return alone([*CASES, SKIPS], tiny_model, pairs, folder / "one")


@pytest.fixture(scope="module")
def two(
    one: dict[str, Any], tiny_model: Path, pairs: list[dict[str, str]], folder: Path
) -> list[dict[str, Any]]:
    (folder / "store-1").write_text("a file where the second process looks for a folder")
    of_two, of_one = (str(folder / name / "dpo" / "checkpoint-4") for name in ("two", "one"))
    more = [
        Case("resumed", "dpo", SETTINGS, arguments=SAVED, resume=of_two),
        Case("resumed from one", "dpo", SETTINGS, arguments=SAVED, resume=of_one),
        Case(
            "resumed with more rows", "dpo", SETTINGS, PLAIN,
            {**SAVED, "per_device_train_batch_size": 4}, resume=of_two,
        ),
        Case("failing store", "dpo", trainer=PLAIN, store=str(folder / "store-{rank}")),
        Case("terminated", "dpo", trainer=PLAIN, signal_at=2, store=str(folder / "store")),
        Case("stops", "dpo", trainer=PLAIN, bad_row=6),
        Case("sharded", "dpo", SETTINGS, arguments=SAVED, sharded=True),
        Case("sharded beta_dpo", "beta_dpo", {"rho": 0.5}, PLAIN, sharded=True),
        Case(
            "sharded, stored, resumed", "dpo", SETTINGS, PLAIN, SAVED, resume=of_two, sharded=True,
            store=str(folder / "store"),
        ),
    ]  # fmt: skip
    return together([*CASES, SKIPS, *more], tiny_model, pairs, folder / "two")


def _near(ours: dict[str, Any], theirs: dict[str, Any], bound: float = 1e-5) -> None:
    assert len(ours["logs"]) == len(theirs["logs"])
    for mine, other in zip(ours["logs"], theirs["logs"], strict=True):
        assert mine == pytest.approx(other, rel=bound, abs=bound)
    for name, state in theirs["states"].items():
        assert ours["states"][name] == pytest.approx(state, rel=bound, abs=bound)


def _adapters_near(ours: Path, theirs: Path) -> None:
    mine, other = load_file(ours), load_file(theirs)
    assert mine.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_two_processes_log_what_one_logs_and_end_at_its_adapter(
    one: dict[str, Any], two: list[dict[str, Any]], folder: Path, name: str
) -> None:
    """Steps of 4, 4 and 1 row of 9 (18 of single answers): the last one leaves a process without."""
    assert (one[name]["processes"], two[0][name]["processes"]) == (1, 2)
    losses = [line["loss"] for line in one[name]["logs"] if "loss" in line]
    assert len(losses) >= 3 and losses[-1] != losses[0]
    _near(two[0][name], one[name])
    _adapters_near(folder / "two" / f"{name}.safetensors", folder / "one" / f"{name}.safetensors")


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_held_out_figures_of_the_same_policy_are_those_of_one_process_to_the_last_bit(
    one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    """5 rows in batches of 2: two batches at a time, then one for two processes."""
    assert one[name]["held_out"]["eval_loss"] > 0
    assert two[0][name]["held_out"] == one[name]["held_out"]


def test_every_process_knows_the_same_numbers(two: list[dict[str, Any]]) -> None:
    for case in CASES:
        assert two[0][case.name] == two[1][case.name]


def test_margins_of_training_rows_are_written_once_each(
    one: dict[str, Any], two: list[dict[str, Any]], folder: Path
) -> None:
    def rows(name: str) -> Iterator[tuple[int, str, int, float]]:
        for line in (folder / name / "dpo" / "row_margins.jsonl").read_text().splitlines():
            entry = json.loads(line)
            yield from ((entry["step"], *row) for row in entry["rows"])

    ours, theirs = list(rows("two")), list(rows("one"))
    assert len(ours) == 2 * 9
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    assert [row[3] for row in ours] == pytest.approx([row[3] for row in theirs], abs=2e-5)


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one_bit_for_bit(
    two: list[dict[str, Any]], folder: Path
) -> None:
    names = {path.name for path in (folder / "two" / "dpo" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json"} <= names
    for result in two:
        ours = [line for line in result["resumed"]["logs"] if "loss" in line]
        assert ours == [line for line in result["dpo"]["logs"] if "loss" in line]
    ours, theirs = (
        load_file(folder / "two" / f"{name}.safetensors") for name in ("resumed", "dpo")
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_run_goes_on_with_another_number_of_processes(
    one: dict[str, Any],
    two: list[dict[str, Any]],
    tiny_model: Path,
    pairs: list[dict[str, str]],
    folder: Path,
) -> None:
    checkpoint = folder / "two" / "dpo" / "checkpoint-4"
    case = Case("from two", "dpo", SETTINGS, arguments=SAVED, resume=str(checkpoint))
    fewer = alone([case], tiny_model, pairs, folder / "fewer")["from two"]
    for ours in (two[0]["resumed from one"], fewer):
        logged, expected = (
            [line for line in result["logs"] if "loss" in line] for result in (ours, one["dpo"])
        )
        assert len(logged) == len(expected) == 3
        for mine, other in zip(logged, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_a_resume_whose_steps_would_have_other_rows_is_refused_in_every_process(
    two: list[dict[str, Any]],
) -> None:
    for result in two:
        error = result["resumed with more rows"]["error"]
        assert "rows_a_step: 4 there, 8 here" in error


def test_what_ends_one_process_ends_the_others_with_its_message(two: list[dict[str, Any]]) -> None:
    first, second = (result["failing store"]["error"] for result in two)
    assert second.startswith("OutputError") and "store-1" in second
    assert (
        first.startswith("TrainingError: process 1 of 2 ended: OutputError") and "store-1" in first
    )


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_whole_checkpoint(
    two: list[dict[str, Any]], folder: Path
) -> None:
    for result in two:
        assert "stopped at step 2 of 6; a checkpoint is saved" in result["terminated"]["error"]
    assert (folder / "two" / "terminated" / "checkpoint-2" / "manifest.json").is_file()


def test_a_row_without_a_number_which_one_process_runs_is_left_out_by_both(
    one: dict[str, Any], two: list[dict[str, Any]], folder: Path
) -> None:
    """Once an epoch; what both end at is that of one process.

    Log-probs of this case go down to -230 nats, where neighbouring float32 numbers lie 1.5e-5 apart, and
    a margin is made of four: 1e-4.
    """
    assert two[0]["skips"] == two[1]["skips"]
    _near(two[0]["skips"], one["skips"], 1e-4)
    ours, theirs = (folder / name / "skips.safetensors" for name in ("two", "one"))
    _adapters_near(ours, theirs)
    for result in (one, *two):
        assert result["skips"]["skipped"] == 2
        losses = [line for line in result["skips"]["logs"] if "loss" in line]
        assert losses[-1]["skipped_steps"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in load_file(ours).values())


def test_a_row_without_a_number_stops_both_processes_with_its_name(
    two: list[dict[str, Any]],
) -> None:
    first, second = (result["stops"]["error"] for result in two)
    assert first == second
    assert first.startswith("TrainingError: step ") and "rows <memory>:6. " in first


def test_the_reference_is_computed_once_between_the_processes(
    two: list[dict[str, Any]], folder: Path
) -> None:
    """28 answers of 14 pairs; a file holds what one process has computed of one set."""
    stored = list((folder / "store").rglob("*.logps"))
    assert sum(path.stat().st_size for path in stored) == 28 * 24
    assert len(stored) == 4


@pytest.mark.parametrize("name", ["dpo", "beta_dpo"])
def test_a_base_that_is_dealt_out_trains_the_same_to_the_last_bit(
    two: list[dict[str, Any]], folder: Path, name: str
) -> None:
    """FSDP2 gathers the very bytes that it has dealt out; adapters, which are trained, are whole."""
    sharded = "sharded" if name == "dpo" else f"sharded {name}"
    for result in two:
        parts = result[sharded].pop("dealt out")
        assert parts and not any("lora_" in weight for weight in parts)
        assert all(2 * here == everywhere for here, everywhere in parts.values())
        assert not result[name]["dealt out"]
        assert {**result[sharded], "dealt out": {}} == result[name]
    ours, theirs = (load_file(folder / "two" / f"{case}.safetensors") for case in (sharded, name))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_checkpoint_of_whole_bases_is_resumed_with_one_dealt_out_and_its_stored_reference(
    two: list[dict[str, Any]], folder: Path
) -> None:
    """The store knows the base by its bytes, whoever holds them."""
    assert len(list((folder / "store").iterdir())) == 1
    for result in two:
        ours, theirs = (
            [line for line in result[name]["logs"] if "loss" in line]
            for name in ("sharded, stored, resumed", "dpo")
        )
        assert len(ours) == len(theirs) == 3
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "count", "said"),
    [
        ({}, 1, "one process alone needs the whole base"),
        ({"model.quantisation": "int8"}, 2, "8-bit layers"),
        ({"model.embeddings_on_cpu": True}, 2, "leave one of the two out"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_before_weights_load(
    settings: dict[str, Any], count: int, said: str
) -> None:
    values: dict[str, Any] = {
        "model": {"base": "none"},
        "data": {"train": "none"},
        "output": {"dir": "none"},
        "train": {"shard_base": True},
    }
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    with pytest.raises(ConfigError, match=said):
        check_sharding(Config.parse(values), count)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "started this one alone"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "FSDP is asked for"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "zero_stage is 3; expected 1 or 2",
        ),
    ],
)
def test_a_launch_that_would_not_do_what_was_asked_is_refused(
    environment: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse_launch(environment=environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_CPU": "False"},  # accelerate launch with one process
        {"MASTER_PORT": "29500"},  # a cluster's own
        {"MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "PMI_SIZE": "2"},  # mpirun
        {"ACCELERATE_USE_FSDP": "false"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    ],
    ids=str,
)
def test_other_launches_are_taken(environment: dict[str, str]) -> None:
    refuse_launch(environment=environment)


@pytest.mark.parametrize(
    ("settings", "how", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, "zero_stage 3; expected 1 or 2"),
        ({"bf16": {"enabled": True}}, {}, "bf16 would round the adapters"),
        ({"fp16": {"enabled": "true"}}, {}, "fp16 would round the adapters"),
        ({"optimizer": {"type": "Adam"}}, {}, "optimizer belongs to the run's config"),
        ({}, {"float16": True}, "float16 scales gradients"),
        ({}, {"skips": True}, "skip is not handled"),
        ({}, {}, "one process alone has nothing to deal out"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            "offload_param is not handled",
        ),
    ],
)
def test_settings_of_deepspeed_that_would_train_something_else_are_refused(
    settings: dict[str, Any], how: dict[str, bool], said: str
) -> None:
    settings = {"zero_optimization": {"stage": 2}, **settings}
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_zero(settings, **{"float16": False, "skips": False, **how})


def test_a_base_that_is_spread_over_devices_is_refused(tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    base = policy.get_base_model()
    base.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": "cpu"}
    with pytest.raises(ModelError, match=r"spread over cpu, cuda:0, cuda:1 \(device_map\)"):
        load_policy(base)
    base.hf_device_map = {"": "disk"}
    with pytest.raises(ModelError, match="spread over disk"):
        load_policy(base)
    base.hf_device_map = {"": torch.device("cpu")}
    base.lm_head.to("meta")
    with pytest.raises(ModelError, match="spread over cpu, meta"):
        load_policy(base)
