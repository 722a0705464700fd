"""``make processes``: every objective in two processes, and whole runs as users start them.

Not collected by default: it takes minutes. Log-probs here go down to -230 nats, where neighbouring float32
numbers lie 1.5e-5 apart; a margin is made of four, and some losses are steep in it: 1e-4.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_dpo.arguments import checkpointing_fields
from lora_dpo.checkpoints import list_checkpoints
from lora_dpo.objectives import OBJECTIVES
from lora_dpo.run import train
from lora_dpo.store import read_manifest
from tests.conftest import ROOT
from tests.faults.checks import numbers as repeatable
from tests.faults.storage import NotHereError, disk
from tests.processes.running import alone, called, free_port, together, torchrun
from tests.processes.test_processes import _adapters_near, _near
from tests.processes.worker import Case, numbers

PLAIN = {"engine": "plain"}
# sampo draws tokens from random numbers of each process; others read scores, which these pairs have not
LEFT_OUT = {name for name, row in OBJECTIVES.items() if "sampled_logps" in row.needs}
LEFT_OUT |= {name for name, row in OBJECTIVES.items() if "scores" in row.needs}
EVERY = [Case(name, name, trainer=PLAIN) for name in OBJECTIVES if name not in LEFT_OUT]
RECOMPUTED = checkpointing_fields({"gradient_checkpointing": True})
MORE = [
    *(Case(f"moves {rule}", "dpo", moves=rule) for rule in ("hard", "soft", "factors")),
    Case("tokens", "dpo", trainer={"max_tokens_per_batch": 90}),
    Case("coupled tokens", "aot", trainer={"max_tokens_per_batch": 90}),
    Case("recomputed", "dpo", arguments=RECOMPUTED),
    Case("plain and recomputed", "dpo", trainer=PLAIN, arguments=RECOMPUTED),
    Case("last rows left out", "dpo", trainer=PLAIN, arguments={"dataloader_drop_last": True}),
    Case("workers", "dpo", trainer=PLAIN, arguments={"dataloader_num_workers": 1}),
]
DEALT_OUT = [
    replace(case, name=f"{case.name}, dealt out", sharded=True)
    for case in [*EVERY, *MORE]
    if case.name in {"dpo", "kto", "aot", "tdpo2", "orpo", "recomputed", "plain and recomputed"}
    or case.name.startswith(("moves", "tokens", "coupled"))
]


@pytest.fixture(scope="module")
def both(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("every")
    one = alone([*EVERY, *MORE], tiny_model, pairs, folder / "one")
    every = [*EVERY, *MORE, *DEALT_OUT]
    return one, together(every, tiny_model, pairs, folder / "two"), folder


@pytest.mark.parametrize("name", [case.name for case in [*EVERY, *MORE]])
def test_two_processes_train_what_one_trains(both: Any, name: str) -> None:
    one, two, folder = both
    assert two[0][name] == two[1][name]
    _near(two[0][name], one[name], 1e-4)
    assert two[0][name]["held_out"] == one[name]["held_out"]
    _adapters_near(folder / "two" / f"{name}.safetensors", folder / "one" / f"{name}.safetensors")


@pytest.mark.parametrize("case", DEALT_OUT, ids=lambda case: case.name)
def test_a_base_that_is_dealt_out_trains_the_same_to_the_last_bit(both: Any, case: Case) -> None:
    _, two, folder = both
    whole = case.name.removesuffix(", dealt out")
    for result in two:
        assert result[case.name].pop("dealt out")
        assert {**result[case.name], "dealt out": {}} == result[whole]
    ours, theirs = (folder / "two" / f"{name}.safetensors" for name in (case.name, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def _config(model: Path, pairs: list[dict[str, str]], folder: Path, rows: int) -> Path:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    values = {
        "objective": {"name": "dpo", "beta": 0.2},
        "model": {"base": str(model)},
        "lora": {"rank": 4},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_length": 128},
        "train": {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.05,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "cache_reference": True,
            "reference_cache_dir": str(folder / f"reference-{rows}"),
        },
        "output": {"dir": str(folder / f"run-{rows}"), "samples": 1, "sample_tokens": 4},
    }
    path = folder / f"{rows}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "torchrun, dealt out"])
def test_a_whole_run_of_two_processes_is_that_of_one_and_is_told_once(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path, launcher: str
) -> None:
    run = train(yaml.safe_load(_config(tiny_model, pairs, tmp_path, 4).read_text()))
    config = _config(tiny_model, pairs, tmp_path, 2)
    ddp = ["--config_file", "configs/accelerate/ddp.yaml", "--main_process_port", str(free_port())]
    command = {
        "torchrun": torchrun("lora_dpo", "train", str(config)),
        "torchrun, dealt out": torchrun(
            "lora_dpo", "train", str(config), "--set", "train.shard_base=true"
        ),
        "accelerate": [*ACCELERATE, *ddp, "-m", "lora_dpo", "train", str(config)],
    }[launcher]
    ended = called(command)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.count("self-check: policy = reference") == 1
    assert ended.stdout.count("adapter and metrics are in") == 1
    assert "a step: 2 processes x 2 x 1 pairs" in ended.stdout
    assert ("are in each of 2 processes" in ended.stdout) == (launcher == "torchrun, dealt out")
    folder = tmp_path / "run-2"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(run.history)
    for mine, other in zip(lines, run.history, strict=True):
        assert numbers(mine) == pytest.approx(numbers(other), rel=1e-5, abs=1e-5)
    ours, theirs = (json.loads((f / "run.json").read_text()) for f in (folder, run.folder))
    assert ours["processes"] == 2 and theirs["processes"] == 1
    assert ours["held_out"]["rows"] == theirs["held_out"]["rows"] == 4
    weights = "adapter/adapter_model.safetensors"
    _adapters_near(folder / weights, run.folder / weights)
    assert {p.name for p in folder.iterdir()} == {p.name for p in run.folder.iterdir()}


def test_accelerate_on_a_cpu_that_starts_one_process_for_two_is_told(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    config = _config(tiny_model, pairs, tmp_path, 2)
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "lora_dpo", "train", str(config)]
    ended = called(command)
    assert ended.returncode != 0
    assert "has started this one alone" in ended.stderr
    assert not (tmp_path / "run-2").exists()


def _started(command: list[str]) -> subprocess.Popen[str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _waited(what: subprocess.Popen[str], sign: str) -> str:
    assert what.stdout is not None
    seen = ""
    for line in what.stdout:
        seen += line
        if sign in line:
            return seen
    raise AssertionError(seen)


@pytest.fixture
def long(tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path) -> list[str]:
    config = _config(tiny_model, pairs, tmp_path, 2)
    return torchrun("lora_dpo", "train", str(config), "--set", "train.num_train_epochs=400")


def test_control_c_which_reaches_processes_twice_saves_a_checkpoint_and_the_run_goes_on(
    long: list[str], tmp_path: Path
) -> None:
    """The terminal sends it to all of them, and torchrun sends it on."""
    running = _started(long)
    _waited(running, "step 3/")
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert "a checkpoint is saved in" in said
    (checkpoint,) = (tmp_path / "run-2").glob("checkpoint-*/manifest.json")
    assert (checkpoint.parent / "rng_state_1.pth").is_file()
    again = _started([*long, "--resume"])
    _waited(again, f"step {int(checkpoint.parent.name.split('-')[1]) + 1}/")
    os.killpg(again.pid, signal.SIGTERM)
    again.communicate(timeout=120)


def test_a_process_that_is_killed_ends_the_run(long: list[str]) -> None:
    running = _started(long)
    _waited(running, "step 3/")
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    running.communicate(timeout=120)
    assert running.returncode != 0
    assert time.monotonic() - began < 60


# ---- faults ---------------------------------------------------------------------------------------

LONGER = ["--set", "train.num_train_epochs=6", "--set", "train.save_steps=4"]  # 18 steps
LONGER += ["--set", "train.save_total_limit=99", "--set", "output.samples=0"]
WEIGHTS = "adapter/adapter_model.safetensors"


def _torchrun(folder: Path, config: Path, *words: str) -> list[str]:
    place = ["--set", f"output.dir={folder}"]
    return torchrun("lora_dpo", "train", str(config), *place, *LONGER, *words)


@pytest.fixture(scope="module")
def whole(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return the config and the folder of a run of two processes that nothing has disturbed."""
    place = tmp_path_factory.mktemp("faults-of-two")
    config = _config(tiny_model, pairs, place, 2)
    ended = called(_torchrun(place / "whole", config))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return config, place / "whole"


def _ended_the_same(folder: Path, whole: Path) -> None:
    """Hold that a run of two processes is the undisturbed one, bit for bit."""
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for name in ("metrics.jsonl", "row_margins.jsonl"):
        assert repeatable(folder / name) == repeatable(whole / name), name
    names = [path.name for path in list_checkpoints(whole)]
    assert [path.name for path in list_checkpoints(folder)] == names and len(names) >= 4
    for path in list_checkpoints(folder):
        read_manifest(path)


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_whose_process_was_killed_goes_on_to_the_same_end_bit_for_bit(
    whole: tuple[Path, Path], tmp_path: Path, number: int
) -> None:
    """Of the first process, which writes, and of the other; torchrun starts both again."""
    config, expected = whole
    running = _started(_torchrun(tmp_path / "run", config))
    _waited(running, "step 10/")
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[number]), signal.SIGKILL)
    running.communicate(timeout=120)
    assert running.returncode != 0 and not (tmp_path / "run" / "run.json").exists()
    for path in list_checkpoints(tmp_path / "run"):
        read_manifest(path)
    ended = called(_torchrun(tmp_path / "run", config, "--resume"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "resuming from" in ended.stdout
    _ended_the_same(tmp_path / "run", expected)


def _told_once(stderr: str, what: str) -> None:
    """Hold that each process tells in one line what ended the run, and none in a traceback.

    torchrun ends the other as soon as one is gone, perhaps before it has told: it has nothing to add.
    """
    ours, *of_torchrun = stderr.split("Traceback")
    assert len(of_torchrun) == 1 and "torch/distributed/run.py" in of_torchrun[0], stderr
    said = [line for line in ours.splitlines() if "error: " in line]
    by = [TOLD.match(line) for line in said]
    assert said and all(by), stderr
    assert len({found[1] for found in by if found}) == len(said), stderr
    assert len(said) == 2 or "closing signal SIGTERM" in stderr
    assert all(what in line for line in said)


# by the first process or the second; its own, or the other's, of which it knows
TOLD = re.compile(r"(process 1: |)error: (process [01] of 2 ended: OutputError: |)/")


def test_a_full_disk_ends_both_processes_with_one_error_and_costs_no_checkpoint(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    config, expected = whole
    files = [path for path in expected.rglob("*") if path.is_file()]
    half = sum(-(-path.stat().st_size // 4096) for path in files) * 4 // 2
    folder = tmp_path / "run"
    try:
        with disk(folder, f"size={half}k") as change:
            ended = called(_torchrun(folder, config))
            assert ended.returncode != 0
            _told_once(ended.stderr, "could not be written")
            assert "make room" in ended.stderr
            kept = list_checkpoints(folder)
            assert kept and len(kept) < len(list_checkpoints(expected))
            for path in kept:
                read_manifest(path)
            change("size=256m")
            ended = called(_torchrun(folder, config, "--resume"))
            assert ended.returncode == 0, ended.stderr[-3000:]
            _ended_the_same(folder, expected)
    except NotHereError as error:
        pytest.skip(str(error))


def test_a_folder_that_another_run_holds_is_told_by_every_process(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    from lora_dpo.store import lock

    config = _config(tiny_model, pairs, tmp_path, 2)
    with lock(tmp_path / "run-2"):
        ended = called(torchrun("lora_dpo", "train", str(config)))
    assert ended.returncode != 0
    _told_once(ended.stderr, "another process is writing here")
    assert not (tmp_path / "run-2" / "config.yaml").exists()
