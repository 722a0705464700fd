"""A run says from its start what it depends on, and can be run again and held against itself."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import enable_full_determinism
from typer.testing import CliRunner

from lora_dpo import surroundings
from lora_dpo.cli import app
from lora_dpo.determinism import deterministic
from lora_dpo.errors import ConfigError, DataError, ModelError, OutputError, TrainingError
from lora_dpo.reproducing import Difference, Reproduction, Twin, reproduce
from lora_dpo.reproducing.measuring import compare_lines, keyed
from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.store import file_sha256, read_json, write_json
from lora_dpo.surroundings import differences, fingerprints
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def values(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reproduced")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    base = shutil.copytree(tiny_model, folder / "base")
    return {
        "model": {"base": str(base)},
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_length": 128},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_steps": 3,
            "use_cpu": True,
            "full_determinism": True,
        },
        "output": {"dir": str(folder / "run"), "diagnose": False, "samples": 1, "sample_tokens": 4},
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any]) -> Run:
    return train(values)


def _state(folder: Path) -> dict[str, str]:
    return {str(p): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_another_process_reproduces_a_run_bit_for_bit_and_leaves_its_folder_as_it_was(
    run: Run, tmp_path: Path
) -> None:
    """By the command, with dropout in the adapters, and with other hashes of Python's own."""
    before = _state(run.folder)
    again = tmp_path / "again"
    done = subprocess.run(
        [sys.executable, "-m", "lora_dpo", "reproduce", str(run.folder), "--to", str(again), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert _state(run.folder) == before
    found = json.loads(done.stdout)
    assert found["identical"] and found["passed"] and found["ended"] and found["largest"] == 0.0
    assert [t["where"] for t in found["adapters"]] == ["step 2", "step 4", "step 6", "the end"]
    # 6 lines of training, 2 of evaluation, and the end; times and memory do not count
    assert found["lines_compared"] == len(run.history) == 9 and found["figures"] > 100
    assert found["changed"] == []
    for name in ("adapter", "checkpoint-2", "checkpoint-6"):
        first, second = (f / name / "adapter_model.safetensors" for f in (run.folder, again))
        assert first.read_bytes() == second.read_bytes(), name
    theirs = Run.open(again)
    assert keyed(theirs.history, 6) == keyed(run.history, 6)
    assert theirs.results["held_out"] == run.results["held_out"]
    assert (
        len(
            {
                (again / f"checkpoint-{n}" / "adapter_model.safetensors").read_bytes()
                for n in (2, 4, 6)
            }
        )
        == 3
    )  # the steps did something
    assert not torch.are_deterministic_algorithms_enabled()  # the run was full_determinism


@pytest.fixture(scope="module")
def killed(run: Run, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is there of the same run when it is killed between steps 4 and 5."""
    folder = Path(shutil.copytree(run.folder, tmp_path_factory.mktemp("killed") / "run"))
    for name in ("adapter", "checkpoint-6"):
        shutil.rmtree(folder / name)
    (folder / "run.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    torn = '{"loss": 0.1, "gra'
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept) + torn)
    return folder


def test_a_killed_run_is_reproduced_up_to_where_it_was_left(killed: Path, tmp_path: Path) -> None:
    """And at the learning rates of the whole run: its schedule does not know that it ends early."""
    found = reproduce(killed, to=tmp_path / "again")
    assert found.identical and (found.steps, found.ended) == (4, False)
    assert [twin.where for twin in found.adapters] == ["step 2", "step 4"]
    assert "4 steps, where the first run was left" in str(found)
    assert Run.open(tmp_path / "again").results["steps"] == 4


def test_a_resumed_run_keeps_its_sessions_and_its_first_difference_is_told_with_its_size(
    killed: Path, values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once resumed, its log is changed by hand: 0.001 at step 2, 1 % of a large figure at step 6."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    recorded = read_json(folder / "environment.json")
    recorded["sessions"][0]["versions"]["peft"] = "0.1"
    write_json(folder / "environment.json", recorded)
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        train({**values, "output": {**values["output"], "dir": str(folder)}}, resume=True)
    assert any(
        "not as it was when the run last went on (peft: 0.1 ->" in m for m in caplog.messages
    )
    sessions = read_json(folder / "environment.json")["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 4]
    assert sessions[0]["versions"]["peft"] == "0.1" != sessions[1]["versions"]["peft"]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    training[1]["loss"] += 0.001
    training[5]["logps/chosen"] *= 1.01
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["reproduce", str(folder), "--to", str(tmp_path / "again"), "--tolerance", "0.005"]
    said = CliRunner().invoke(app, [*command, "--json"])
    assert said.exit_code == 1, said.output + said.stderr
    found = json.loads(said.stdout)
    assert not found["passed"] and not found["identical"] and found["missing"] == []
    assert [d["where"] for d in found["differing"]] == ["step 2", "step 6"]
    assert [d["name"] for d in found["differing"]] == ["loss", "logps/chosen"]
    assert found["largest"] == pytest.approx(0.01 / 1.01, rel=1e-6)
    assert len(found["adapters"]) == 4 and all(twin["same"] for twin in found["adapters"])
    assert any("resumed at step 4; the second ran in one piece" in note for note in found["notes"])


def test_what_a_run_depends_on_is_written_before_its_weights_load(
    values: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    base = Path(shutil.copytree(values["model"]["base"], tmp_path / "base"))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (base / "BUILD.json").write_text("{}")
    folder = tmp_path / "run"
    with pytest.raises(ModelError, match="the weights did not load"):
        train({**values, "model": {"base": str(base)}, "output": {"dir": str(folder)}})
    found = read_json(folder / "environment.json")
    assert found["seed"] == 0
    assert found["data"] == {
        "train": run.results["train_rows"],
        "held_out": run.results["held_out_rows"],
    }
    (session,) = found["sessions"]
    assert session["versions"]["torch"] == torch.__version__
    assert session["hardware"]["cores"] == os.cpu_count()
    assert session["threads"] == torch.get_num_threads()
    recorded = read_json(run.folder / "environment.json")["base"]
    assert "BUILD.json" not in found["base"]  # which changes no number
    differing = {name for name in recorded if recorded[name] != found["base"][name]}
    assert differing == {"model.safetensors"} and "tokenizer.json" in recorded


def test_a_change_of_base_data_or_adapter_is_told_before_anything_is_written(
    run: Run, values: dict[str, Any], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    base, data = Path(values["model"]["base"]), Path(values["data"]["train"])
    for path, change, error, told in (
        (base / "config.json", b"{ ", ModelError, r"model\.base .*\(config\.json differ\)"),
        (data, None, DataError, "the rows of train are not those of the run"),
    ):
        kept = path.read_bytes()
        path.write_bytes(kept.replace(b"{", change, 1) if change else kept.replace(b"yes", b"sure"))
        try:
            with pytest.raises(error, match=told):
                reproduce(run, to=again)
        finally:
            path.write_bytes(kept)
        assert not again.exists()


@pytest.mark.parametrize("to", ["", "inside", ".."])
def test_the_second_run_never_goes_into_the_first(run: Run, to: str) -> None:
    with pytest.raises(OutputError, match="is, holds or lies inside the run"):
        reproduce(run, to=run.folder / to)


def test_what_cannot_be_reproduced_is_refused(run: Run, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already and is not empty"):
        reproduce(run, to=full)
    with pytest.raises(ConfigError, match="tolerance: got nan; expected 0 or a number above"):
        reproduce(run, tolerance=math.nan)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run.folder / "config.yaml", begun)
    with pytest.raises(OutputError, match="has logged no step yet"):
        reproduce(begun)
    with pytest.raises(OutputError, match="no run there"):
        reproduce(tmp_path)


def test_a_tolerance_is_in_units_of_a_figure_up_to_1_and_a_share_of_it_above() -> None:
    small, large = Difference("step 1", "loss", 0.5, 0.503), Difference("step 2", "x", -200, -201)
    assert small.apart == pytest.approx(0.003) and large.apart == pytest.approx(0.005)
    for tolerance, passed in ((0.004, False), (0.0051, True)):
        found = Reproduction(
            "a", "b", 2, True, 2, 9, (small, large), (), (Twin("the end", False, 0.001),), (),
            tolerance=tolerance,
        )  # fmt: skip
        assert found.passed is passed and not found.identical
        text = str(found)
        assert "first difference at step 1: loss was 0.5 and is 0.503 (3.0e-03 apart)" in text
        assert "adapter at the end: 1.0e-03 of its size apart" in text
        verdict = (
            "a is reproduced within 0.0051: 5.0e-03 at most" if passed else "is not reproduced"
        )
        assert verdict in text.splitlines()[-1]


def test_lines_that_one_run_lacks_count_unless_the_first_was_left() -> None:
    history = [{"loss": 0.5, "step": 1}, {"eval_loss": 0.5, "step": 1}, {"loss": 0.4, "step": 2}]
    whole, part = keyed(history, 2), keyed(history[:2], 2)
    for was, now, ended, expected in (
        (whole, part, True, ["step 2: the training line of the second run"]),
        (part, whole, True, ["step 2: the training line of the first run"]),
        (part, whole, False, []),
    ):
        differing, missing, figures = compare_lines(was, now, ended=ended)
        assert (differing, missing, figures) == ([], expected, 2)


def test_a_figure_that_is_no_number_in_both_is_the_same_and_in_one_is_infinitely_far() -> None:
    nan = keyed([{"loss": math.nan, "step": 1}], 1)
    number = keyed([{"loss": 1.0, "step": 1}], 1)
    assert compare_lines(nan, nan, ended=True)[0] == []
    ((difference,), _, _) = compare_lines(nan, number, ended=True)
    assert difference.apart == math.inf
    found = Reproduction("a", "b", 1, True, 1, 1, (difference,), (), (), (), tolerance=1e9)
    assert not found.passed and found.to_dict()["largest"] == "inf"
    json.dumps(found.to_dict(), allow_nan=False)


def test_times_and_memory_are_no_part_of_what_is_compared_and_all_else_is(run: Run) -> None:
    names = {name for line in keyed(run.history, 99).values() for name in line}
    left_out = {name for line in run.history for name in line} - names
    assert left_out == {
        "step", "tokens_per_second", "pairs_per_second", "memory/peak_gib", "eval_runtime",
        "eval_samples_per_second", "eval_steps_per_second", "train_runtime",
        "train_samples_per_second", "train_steps_per_second",
    }  # fmt: skip


def test_what_has_changed_is_told_by_name_and_git_is_no_part_of_it() -> None:
    was = {
        "versions": {"torch": "1"},
        "hardware": {"cpu": "a"},
        "threads": 2,
        "git": {"commit": "x"},
    }
    now = {"versions": {"torch": "2", "new": "1"}, "hardware": {"cpu": "a"}, "threads": 4}
    assert differences(was, now) == [("new", "-", "1"), ("threads", "2", "4"), ("torch", "1", "2")]


def test_a_large_file_is_known_by_pieces_from_its_first_byte_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("_WHOLE", 1 << 20), ("_PIECES", 16), ("_PIECE", 1 << 10)):
        monkeypatch.setattr(surroundings, name, size)
    path, size = tmp_path / "model.safetensors", (1 << 20) + 12345
    path.write_bytes(bytes(size))
    seen = {fingerprints(str(tmp_path))[path.name]}
    places = (0, 1023, 2048, size - 1024, size - 1)
    for place in places:
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        seen.add(fingerprints(str(tmp_path))[path.name])
    assert len(seen) == 5  # all of them but 2048, which lies between two pieces
    path.write_bytes(bytes(size - 1))
    assert fingerprints(str(tmp_path))[path.name] not in seen


# ---- determinism ----------------------------------------------------------------------------------

_NAMES = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC")


def _settings() -> Any:
    modes = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    warns = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    return (*modes, *warns, *(os.environ.get(name) for name in _NAMES))


def test_every_setting_is_afterwards_what_it_was_whatever_the_library_did_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = _settings()
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        enable_full_determinism(1)  # what transformers does, and leaves
        assert _settings() != before
        raise KeyError
    assert _settings() == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with deterministic(False):
        assert _settings() == before


def test_an_operation_without_an_order_of_its_sums_is_told_and_nothing_else_is() -> None:
    told = r"train\.full_determinism: x does not have a determ"
    with pytest.raises(TrainingError, match=told), deterministic(True):
        raise RuntimeError("x does not have a deterministic implementation")
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(True):
        raise RuntimeError("out of memory")
