"""Watching a run: progress on a real terminal, notes once, samples that change nothing, the plan."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

import lora_dpo
from lora_dpo.config import Config, LoraConfig
from lora_dpo.config.sections import OutputConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.diagnostics import detectors
from lora_dpo.diagnostics.detectors import Answers
from lora_dpo.diagnostics.running import FALL_A_TOKEN, FEWEST_LINES
from lora_dpo.errors import ConfigError, TrainingError
from lora_dpo.lines import add_lines, lines_until
from lora_dpo.policy import load_policy, save_adapter
from lora_dpo.run import train
from lora_dpo.showing import bar
from lora_dpo.trainer import PreferenceTrainer
from lora_dpo.watching import add_samples
from lora_dpo.watching.advice import NORMAL, Advisor
from lora_dpo.watching.pace import LAST_STEPS, SLOW_STEPS, Pace, clock_text
from tests.helpers import move_adapter

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


# ---- how fast, and how long still ---------------------------------------------------------------


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _steps(pace: Pace, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        clock.now += each
        pace.add(8)
        pace.tokens += 400
        pace.step_done()


def test_the_pace_leaves_out_the_first_steps_and_all_evaluations() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_left(10, 0) == (None, 0)
    _steps(pace, clock, 30.0)
    assert pace.seconds_left(10, 1) == (None, 1)  # one slow step tells nothing
    _steps(pace, clock, 9.0, 6.0)
    assert pace.seconds_a_step == 7.5  # all but the very first, as long as there are no others
    _steps(pace, clock, *[2.0] * 5)
    assert SLOW_STEPS == 3 and pace.seconds_a_step == 2.0
    assert pace.pairs_per_second == 4.0
    assert pace.seconds_left(10, 2) == (20.0, 2)  # no evaluation has been timed
    with pace.resting():
        clock.now += 50.0
        pace.tokens += 10**6
    _steps(pace, clock, 2.0)
    assert pace.seconds_a_step == 2.0
    assert pace.seconds_left(10, 2) == (120.0, 0)
    assert pace.measured() == {"seconds_a_step": 2.0, "pairs_per_second": 4.0, "steps": 9}
    # a log line has all steps since the last one, and no evaluation
    seconds = 30.0 + 9.0 + 6.0 + 6 * 2.0
    line = pace.since_last_line()
    assert line == {"tokens_per_second": 3600 / seconds, "pairs_per_second": 72 / seconds}
    _steps(pace, clock, *[1.0] * LAST_STEPS)
    assert pace.seconds_a_step == 1.0  # the present pace, not that of long ago
    assert pace.since_last_line()["pairs_per_second"] == 8.0
    pace.begin()  # resumed in this process: nothing of before counts
    assert pace.seconds_left(10, 1) == (None, 1) and pace.measured()["steps"] == 0
    _steps(pace, clock, 4.0)
    assert pace.measured() == {"seconds_a_step": 4.0, "pairs_per_second": 2.0, "steps": 1}


def test_times_are_read_as_clocks() -> None:
    assert [clock_text(s) for s in (0.4, 59.6, 125, 3753)] == ["0:00", "1:00", "2:05", "1:02:33"]


# ---- notes: planted histories fire the right one, once -------------------------------------------


def _line(step: int, **values: float) -> dict[str, float]:
    line = {
        "loss": 0.5,
        "rewards/accuracies": 0.7,
        "rewards/margins": 0.5,
        "logratios/chosen": 0.2,
        "lengths/chosen": 50.0,
    }
    return {**line, **{k.replace("__", "/"): v for k, v in values.items()}, "step": step}


def _held_out(step: int, accuracy: float, loss: float = 0.5) -> dict[str, float]:
    return {"eval_loss": loss, "eval_rewards/accuracies": accuracy, "step": step}


def _kinds(lines: list[dict[str, float]], **more: Any) -> list[tuple[str, int]]:
    advisor = Advisor()
    return [(n.kind, n.step) for line in lines for n in advisor.hear(line, rows=200, **more)]


def test_a_small_fall_of_chosen_is_called_normal_and_a_deep_one_is_not() -> None:
    a_token = (0.2, -0.01, -0.05, -0.06, -FALL_A_TOKEN - 0.01, -0.2)
    lines = [_line(10 * i, logratios__chosen=50 * fall) for i, fall in enumerate(a_token)]
    assert _kinds(lines) == [(NORMAL, 20), ("likelihood displacement", 40)]
    # less than a nat an answer is nothing to speak of, however short the answer
    assert _kinds([_line(1, logratios__chosen=-0.9, lengths__chosen=2.0)]) == []


def test_margins_that_run_away_are_told_and_flattening_ones_are_not() -> None:
    count = 2 * FEWEST_LINES
    chosen = np.linspace(0, -4, count)  # 0.08 nats a token: no displacement
    straight, flat = np.linspace(0, 9, count), 9 * (1 - np.exp(-np.arange(count) / 3))

    def kinds(margins: Any, chosen: Any) -> set[str]:
        lines = [
            _line(i + 1, rewards__margins=m, logratios__chosen=c)
            for i, (m, c) in enumerate(zip(margins, chosen, strict=True))
        ]
        told = _kinds(lines)
        assert len({kind for kind, _ in told}) == len(told)
        return {kind for kind, _ in told} - {NORMAL}

    assert kinds(straight, chosen) == {"runaway margins"}
    assert kinds(flat, chosen) == set()
    assert kinds(straight, -chosen) == set()
    assert kinds(straight / 2, chosen) == set()


def test_memorising_is_training_accuracy_without_held_out_accuracy() -> None:
    def run(training: float, *held_out: float) -> list[tuple[str, int]]:
        lines = []
        for i, accuracy in enumerate(held_out, start=1):
            lines += [_line(10 * i + j, rewards__accuracies=training) for j in (-2, -1)]
            lines.append(_held_out(10 * i, accuracy))
        return _kinds(lines)

    assert run(0.97, 0.70, 0.70, 0.70) == [("memorising", 20)]
    assert run(0.97, 0.60, 0.66, 0.72) == []  # still rising
    assert run(0.97, 0.94, 0.94, 0.94) == []  # nothing left to learn
    assert run(0.90, 0.70, 0.70, 0.70) == []
    assert run(0.97, 0.70) == []  # one evaluation shows no standstill


def test_held_out_figures_that_turn_back_are_over_optimisation_as_at_the_end_of_a_run() -> None:
    lines = []
    for i, (training, loss) in enumerate([(0.6, 0.5), (0.5, 0.4), (0.3, 0.6), (0.2, 0.7)]):
        lines += [_line(10 * i + 5, loss=training), _held_out(10 * i + 6, 0.7, loss)]
    assert _kinds(lines) == [("over-optimisation", 26)]
    ours = detectors.OVER_OPTIMISATION.remedies[0]
    advisor = Advisor()
    texts = [note.text for line in lines for note in advisor.hear(line, rows=200)]
    assert texts[0].endswith(f"try: {ours}")


def test_length_bias_is_that_of_the_detector() -> None:
    short = np.random.default_rng(0).integers(10, 20, 200).astype(float)
    followed = Answers((short + 5, short), (short + 5, short))
    assert _kinds([_held_out(1, 0.7), _held_out(2, 0.7)], answers=followed) == [("length bias", 1)]
    level = Answers((short, short), (short, short))
    assert _kinds([_held_out(1, 0.7)], answers=level) == []


def test_a_first_loss_off_its_start_value_is_told() -> None:
    (note,) = Advisor().first_step(0.62, 0.6931)
    assert note.kind == "not at the reference" and "0.6200" in note.text and "0.6931" in note.text
    assert Advisor().first_step(0.6951, 0.6931) == []
    assert Advisor(["not at the reference"]).first_step(0.62, 0.6931) == []


# ---- real runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenise(load_preferences(pairs), tokenizer, max_length=128)


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(output_dir=str(folder), **{**values, **changes})


def _trainer(
    model: Path, rows: Tokenised, folder: Path, *, samples: int = 2, **more: Any
) -> PreferenceTrainer:
    """A trainer with everything that a run watches it with."""
    torch.manual_seed(11)
    changes = more.pop("arguments", {})
    trainer = PreferenceTrainer(
        more.pop("policy", None) or load_policy(model, lora=LoraConfig(rank=4, dropout=0.2)),
        args=_arguments(folder, **changes),
        train_data=rows,
        eval_data=more.pop("eval_data", rows),
        **more,
    )
    trainer.write_metrics_to(folder / "metrics.jsonl")
    output = OutputConfig(dir=str(folder), samples=samples, sample_tokens=8)
    held_out = rows if trainer.eval_dataset is not None else None
    add_samples(trainer, output, AutoTokenizer.from_pretrained(model), held_out)
    return trainer


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _figures(path: Path) -> list[dict[str, Any]]:
    timed = ("per_second", "runtime", "peak_gib")
    return [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in _read(path)]


@pytest.fixture(scope="module")
def watched(
    tiny_model: Path, rows: Tokenised, tmp_path_factory: pytest.TempPathFactory
) -> PreferenceTrainer:
    trainer = _trainer(tiny_model, rows, tmp_path_factory.mktemp("watched"))
    trainer.train()
    return trainer


def test_samples_change_no_number_and_leave_the_adapter_as_it_is_byte_for_byte(
    tiny_model: Path, rows: Tokenised, watched: PreferenceTrainer, tmp_path: Path
) -> None:
    """With dropout, whose random numbers a sample must not draw."""
    plain = _trainer(tiny_model, rows, tmp_path, samples=0)
    plain.train()
    assert not (tmp_path / "samples.jsonl").exists()
    files = []
    for trainer in (watched, plain):
        save_adapter(trainer.model, trainer.folder / "saved")
        files.append((trainer.folder / "saved" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert _figures(watched.folder / "metrics.jsonl") == _figures(tmp_path / "metrics.jsonl")


def test_samples_are_what_policy_and_reference_write_and_the_reference_writes_once(
    tiny_model: Path, rows: Tokenised, watched: PreferenceTrainer
) -> None:
    lines = _read(watched.folder / "samples.jsonl")
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    assert all(set(line) == {"step", "prompt", "policy", "reference"} for line in lines)
    by_prompt = {line["prompt"]: line for line in lines}  # the newest
    assert len({(line["prompt"], line["reference"]) for line in lines}) == len(by_prompt) == 2
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    watched.model.eval()
    for prompt, line in by_prompt.items():
        row = next(r for r in rows.rows if tokenizer.decode(r["prompt_ids"], True) == prompt)
        ids = torch.tensor([row["prompt_ids"]])
        options: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        ours = watched.model.generate(input_ids=ids, **options)
        with lora_dpo.reference(watched.model):
            theirs = watched.model.generate(input_ids=ids, **options)
        for made, told in ((ours, line["policy"]), (theirs, line["reference"])):
            assert tokenizer.decode(made[0, ids.shape[1] :], True) == told


class _Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), 2)


def test_a_resumed_run_has_every_sample_and_every_note_once(
    tiny_model: Path, rows: Tokenised, watched: PreferenceTrainer, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    broken = _trainer(tiny_model, rows, tmp_path, arguments=saving, callbacks=[_Kill()])
    with pytest.raises(TrainingError, match="stopped at step 5"):
        broken.train()
    broken.advice.tell(5, "seen", "before the checkpoint")
    # beyond the checkpoint, as a killed process leaves them
    add_lines(tmp_path / "samples.jsonl", [{"step": 6, "prompt": "x"}])
    add_lines(tmp_path / "notes.jsonl", [{"step": 6, "kind": "unseen", "text": "after it"}])
    with (tmp_path / "samples.jsonl").open("a") as stream:
        stream.write('{"step": 6, "pro')
    resumed = _trainer(tiny_model, rows, tmp_path, arguments=saving)
    resumed.train(resume_from_checkpoint=True)
    resumed.advice.tell(6, "seen", "again")
    resumed.advice.tell(6, "unseen", "for the first time")
    assert _read(tmp_path / "samples.jsonl") == _read(watched.folder / "samples.jsonl")
    assert [(n["step"], n["kind"]) for n in _read(tmp_path / "notes.jsonl")] == [
        (5, "seen"),
        (6, "unseen"),
    ]
    assert resumed.pace.measured()["steps"] == 1


def test_a_policy_that_is_not_at_its_reference_is_told_at_the_first_step(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, watched: PreferenceTrainer
) -> None:
    policy = load_policy(tiny_model, lora=LoraConfig(rank=4))
    move_adapter(policy, std=0.1)
    arguments = {"eval_strategy": "no", "max_steps": 1}
    trainer = _trainer(
        tiny_model,
        rows,
        tmp_path,
        policy=policy,
        reference_is="base",
        arguments=arguments,
        eval_data=None,
    )
    trainer.train()
    notes = _read(tmp_path / "notes.jsonl")
    assert next(n["kind"] for n in notes if n["step"] == 1) == "not at the reference"
    assert not (tmp_path / "samples.jsonl").exists()  # there are no held-out rows
    assert not (watched.folder / "notes.jsonl").exists()  # a run in order has none


def test_prompts_without_room_are_told_and_a_failure_of_sampling_costs_no_run(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    trainer = _trainer(tiny_model, rows, tmp_path, arguments={"max_steps": 2})
    caplog.set_level("INFO", "lora_dpo")
    output = OutputConfig(dir=str(tmp_path / "none"), samples=2, sample_tokens=128)
    add_samples(trainer, output, AutoTokenizer.from_pretrained(tiny_model), rows)
    assert "no samples: the model has no room for output.sample_tokens (128)" in caplog.text

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.model.get_base_model(), "generate", fails)
    monkeypatch.setattr(trainer.model, "generate", fails)
    trainer.train()
    assert "no more samples (OutOfMemoryError: CUDA out of memory)" in caplog.text
    assert trainer.state.global_step == 2 and not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(("warmup", "told"), [(0.1, True), (0, False)])
def test_a_run_whose_every_step_is_warm_up_is_told(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, warmup: float, told: bool
) -> None:
    """A tenth of one step, rounded up, is that step; its rate is 0 and it trains nothing."""
    arguments = {"max_steps": 1, "warmup_steps": warmup}
    trainer = _trainer(tiny_model, rows, tmp_path, arguments=arguments)
    trainer.train()
    (rate,) = (line["learning_rate"] for line in trainer.state.log_history if "loss" in line)
    assert (rate == 0) == told
    notes = _read(tmp_path / "notes.jsonl") if (tmp_path / "notes.jsonl").exists() else []
    assert any(note["kind"] == "warm-up without end" for note in notes) == told


def test_a_healthy_run_on_chats_has_samples_and_no_note(
    quickstart_model: Path, tmp_path: Path
) -> None:
    """Single answers (KTO) and chats, on the bundled model."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    data = load_preferences(quickstart_model.parent / "data" / "heldout.jsonl", kind="unpaired")
    few = tokenise(data, tokenizer, max_length=256)
    few = replace(few, rows=few.rows.select(range(8)))
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4}
    trainer = _trainer(quickstart_model, few, tmp_path, objective="kto", arguments=arguments)
    trainer.train()
    lines = _read(tmp_path / "samples.jsonl")
    assert [line["step"] for line in lines] == [2, 2]
    questions = {row.prompt[-1]["content"] for row in data.rows}
    assert {line["prompt"] for line in lines} <= questions  # without the template's marks
    assert not (tmp_path / "notes.jsonl").exists()


# ---- whole runs: trackers, the plan, terminals, notebooks ------------------------------------------


def _values(
    model: Path, pairs: list[dict[str, str]], folder: Path, **train_: Any
) -> dict[str, Any]:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {
        "model": {"base": str(model)},
        "lora": {"rank": 4},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_length": 128},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 6,
            "eval_steps": 3,
            "save_steps": 6,
            "logging_steps": 1,
            "use_cpu": True,
            **train_,
        },
        "output": {"dir": str(folder / "run"), "diagnose": False, "samples": 1, "sample_tokens": 4},
    }


_CONNECTED: list[Any] = []
_LISTENING: list[bool] = []


def _hear(event: str, args: Any) -> None:
    if _LISTENING and event in ("socket.connect", "socket.getaddrinfo"):
        _CONNECTED.append((event, args))


def test_every_figure_reaches_a_tracker_the_plan_is_kept_and_nothing_is_contacted(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """TensorBoard's own reader gives back what ``metrics.jsonl`` holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sys.addaudithook(_hear)
    _LISTENING.append(True)
    try:
        values = _values(
            tiny_model, pairs, tmp_path, report_to="tensorboard", memory_budget_gib=4.0
        )
        run = train(values)
    finally:
        _LISTENING.clear()
    assert _CONNECTED == []
    (event_file,) = run.folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(event_file.parent)).Reload()
    for kind, key in (("train", ""), ("eval", "eval_")):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logratios/chosen"):
            wrote = {e["step"]: e[key + name] for e in run.history if key + name in e}
            read = {e.step: e.value for e in events.Scalars(f"{kind}/{name}")}
            assert read == pytest.approx(wrote, rel=1e-6, abs=1e-7), name
    assert len(events.Scalars("train/pairs_per_second")) == 6
    plan = json.loads((run.folder / "plan.json").read_text())
    assert plan["room_is"] == "train.memory_budget_gib" and plan["peak_bytes"] > 0
    assert plan["measured"]["peak_bytes"] is None  # a CPU's allocator does not say
    assert plan["measured"]["steps"] == 6
    last = [line["pairs_per_second"] for line in run.history if "loss" in line][SLOW_STEPS:]
    rate = plan["measured"]["pairs_per_second"]
    assert 0.5 * min(last) < rate < 2 * max(last)
    assert rate * plan["measured"]["seconds_a_step"] == pytest.approx(2.0)
    assert repr(run).startswith(f"Run('{run.folder}': dpo, 6 steps, held-out accuracy ")


def test_a_run_that_cannot_be_planned_says_why_and_trains(
    tiny_model: Path, rows: Tokenised, watched: PreferenceTrainer, tmp_path: Path
) -> None:
    assert watched.memory.to_dict() == {
        "not_planned": "nothing limits the memory: no GPU, and train.memory_budget_gib is not set"
    }
    policy = load_policy(tiny_model, lora=LoraConfig(rank=4, targets=r".*layers\.0.*_proj"))
    odd = _trainer(tiny_model, rows, tmp_path, policy=policy, memory_budget_gib=4.0)
    assert "LoRA on some of the layers alone is not planned" in odd.memory.to_dict()["not_planned"]


def test_a_tracker_that_is_not_installed_or_unknown_is_an_error_before_weights_load(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    from transformers.integrations import get_available_reporting_integrations

    trackers = ("wandb", "mlflow", "trackio", "swanlab", "clearml")
    lacking = [t for t in trackers if t not in get_available_reporting_integrations()]
    if not lacking:
        pytest.skip("every tracker is installed")
    values = _values(tiny_model, pairs, tmp_path, report_to=[lacking[0]])
    with pytest.raises(ConfigError, match=rf"{lacking[0]} is not installed; install it \(pip"):
        train(values)
    assert not (tmp_path / "run").exists()
    values["train"]["report_to"] = "tensorbord"
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        Config.parse(values)


def test_a_file_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("counting", 5, "rows") as advance:
        advance(5)
    assert capsys.readouterr() == ("", "")


WIDTH = 110


def _in_a_terminal(command: list[str], **environment: str) -> str:
    """Return all that a command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    streams: Any = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    settings = {**os.environ, "TERM": "xterm-256color", **environment}
    found = b""
    with subprocess.Popen(command, env=settings, **streams) as process:
        os.close(theirs)
        try:
            while piece := os.read(ours, 65536):
                found += piece
        except OSError:  # the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0, found.decode()
    return found.decode()


def _screen(output: str) -> list[str]:
    """Return the lines that stand on a terminal in the end: of its controls, those that rich uses."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.startswith("\x1b["):
            count, letter = piece[2:-1], piece[-1]
            if letter == "A":
                row -= int(count or 1)
            elif letter == "K":
                lines[row] = "" if count == "2" else lines[row][:column]
            else:
                assert letter in "mhl", piece
        else:
            lines[row] = (
                lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            )
            column += len(piece)
    return lines


def test_a_terminal_shows_progress_whole_lines_above_it_and_nothing_of_it_in_the_end(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    values = _values(tiny_model, pairs, tmp_path, cache_reference=True)
    values["train"]["reference_cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "lora_dpo", "train", str(tmp_path / "config.yaml")]
    output = _in_a_terminal(command)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    # drawn at once where what is done changes; a step between may be too quick to be drawn
    for shown in ("reference log-probs ━", "step 3/6 ━", "evaluating 1/", "sampling"):
        assert shown in plain, shown
    figures = re.search(
        r"loss 0\.\d+  margin \S+  accuracy \S+  \S+ pairs/s  peak \d+\.\d GiB", plain
    )
    assert figures and re.search(r"left \d:\d\d \+ 1 evaluation", plain)
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") > 0  # the cursor is back
    screen = _screen(output)
    assert not [line for line in screen if "━" in line or "evaluating" in line]
    heads = [line for line in screen if line.startswith("step ")]
    assert max(map(len, heads)) <= WIDTH
    lines = [line for line in heads if " loss " in line]
    assert [line.split()[1] for line in lines if "held-out" not in line] == [
        f"{i}/6" for i in range(1, 7)
    ]
    assert [line.split()[1] for line in lines if "held-out" in line] == ["3/6", "6/6"]
    assert "prompts sampled in" in "".join(heads)
    assert any(line.startswith("adapter and metrics are in") for line in screen)


NOTEBOOK = """
from lora_dpo import train
train({config!r})
"""


def test_a_notebook_gets_plain_lines_and_a_short_result(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """A real kernel; neither ipywidgets nor a control character."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    values = _values(tiny_model, pairs, tmp_path)
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(config=values))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    streams: dict[str, str] = {"stdout": "", "stderr": ""}
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            streams[output["name"]] += output["text"]
    assert not CONTROL.search(streams["stdout"] + streams["stderr"])
    assert streams["stderr"] == ""
    assert len(re.findall(r"^step \d/6 loss ", streams["stdout"], re.MULTILINE)) == 6
    assert len(re.findall(r"^step \d/6 held-out loss ", streams["stdout"], re.MULTILINE)) == 2
    result = cell["outputs"][-1]["data"]["text/plain"]
    assert re.fullmatch(r"Run\('.*': dpo, 6 steps, held-out accuracy \d\.\d+\)", result)


def test_lines_beyond_a_step_and_torn_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert lines_until(path, 3) == [] and not path.exists()
    hostile = "a\u2028b\x85\x1c\r\n\ud800"
    add_lines(path, [{"step": 1}, {"step": 3, "text": hostile}, {"step": 4}])
    with path.open("a") as stream:
        stream.write('{"step": 2')
    kept = [{"step": 1}, {"step": 3, "text": hostile}]
    assert lines_until(path, 3) == kept and lines_until(path, 9) == kept
    assert len(path.read_text().splitlines()) == 2  # for readers who know more line ends than \n
