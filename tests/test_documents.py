"""What the documents say is executed: README's commands and snippets, every YAML, every example."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lora_dpo
from lora_dpo.arguments import build_arguments
from lora_dpo.cli import app
from lora_dpo.config import Config
from lora_dpo.evaluation import Estimate
from lora_dpo.objectives import OBJECTIVES
from lora_dpo.policy import check_base
from lora_dpo.preparing import load_tokenizer, prepare_data
from lora_dpo.run import _build_trainer
from lora_dpo.run_folder import bound_objective
from tests.pages import make_checkout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_readmes_commands_run_on_the_bundled_model(
    tmp_path: Path, quickstart_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, but for the 7B base, the user's file, the length of training and the folders."""
    make_checkout(tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    lines = [line.strip() for line in README.splitlines() if line.startswith("    lora-dpo ")]
    assert [line.split()[1] for line in lines] == [
        "doctor",
        "inspect",
        "init",
        "plan",
        "train",
        "report",
        "eval",
        "generate",
        "compare",
        "export",
        "objectives",
    ]
    changes = {
        "model.base": quickstart_model,
        "data.train": tmp_path / "checkout" / "lora_dpo" / "quickstart" / "data" / "train.jsonl",
        "data.max_length": 256,
        "train.max_steps": 2,
        "train.gradient_accumulation_steps": 2,
        "output.dir": tmp_path / "run",
    }
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        words = [word.replace("runs/mistral-7b-dpo", str(tmp_path / "run")) for word in words]
        words = [word.replace("out/merged", str(tmp_path / "merged")) for word in words]
        words = [word.replace("out/", f"{tmp_path}/") for word in words]
        if words[0] == "init":
            given = {
                "mistralai/Mistral-7B-v0.1": quickstart_model,
                "prefs.jsonl": changes["data.train"],
                "my.yaml": tmp_path / "my.yaml",
            }
            words = [str(given.get(word, word)) for word in words]
        if words[0] == "compare":
            words += ["--limit", "2", "--max-new-tokens", "8"]
        if words[0] == "train":
            words = [w for w in words if w not in ("--set", "data.train=prefs.jsonl")]
            words = [x for w in words for x in (("--set", w) if "=" in w else (w,))]
            words += [x for key, value in changes.items() for x in ("--set", f"{key}={value}")]
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 0, f"{line}\n{found.output}"
    assert "show token ids" in (tmp_path / "look.html").read_text()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "# strength of the pull" in (tmp_path / "my.yaml").read_text()
    for name in ("report.html", "compare.html"):
        assert "</html>" in (tmp_path / name).read_text()[-20:]
    assert "beta: 0.05" in (tmp_path / "run" / "config.yaml").read_text()


def test_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    make_checkout(tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    first = blocks[0].replace("runs/readme", str(tmp_path / "readme"))
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["exported"].proof.kl < 1e-4
    exec(blocks[1], {})


def test_readmes_map_names_every_room_and_no_other() -> None:
    table = README.split("## The house")[1]
    named = set(re.findall(r"`(?:lora_dpo/)?([a-z_0-9]+)(?:\.py|/)`", table))
    package = Path(lora_dpo.__file__).parent
    rooms = {p.stem for p in package.glob("*.py") if not p.name.startswith("__")}
    rooms |= {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= named
    assert named - rooms == {"configs", "docs", "examples", "benchmarks", "tests"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_is_loaded_validated_and_built_on_a_tiny_model(
    path: Path, tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    overrides = [f"model.base={tiny_model}", f"data.train={data}", f"output.dir={tmp_path / 'run'}"]
    overrides += ["data.eval=null", "train.use_cpu=true", "train.shard_base=false"]  # one process
    config = Config.load(path, overrides)
    objective = bound_objective(config)
    check_base(config.model)
    arguments = build_arguments(config.train.further, output_dir=str(tmp_path), evaluates=True)
    rows = prepare_data(config, load_tokenizer(config), objective.objective.data)
    trainer = _build_trainer(config, objective, arguments, rows, {})
    expected = "loss 0.6931 = its start value" if objective.reference else "reads no reference"
    assert expected in trainer.self_check()[-1]
    asked = config.train.further
    step = asked["per_device_train_batch_size"] * asked["gradient_accumulation_steps"]
    assert trainer.args.per_device_train_batch_size == step
    if "8bit" not in str(asked.get("optim")):  # the 8-bit optimisers run on GPUs alone
        trainer.args.max_steps = 1
        trainer.train()
        assert trainer.state.global_step == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_every_yaml_is_explained(path: Path) -> None:
    keys = [line for line in path.read_text().splitlines() if re.match(r"  \w+: \S", line)]
    assert keys
    assert [line for line in keys if " # " not in line] == []


def _example(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_loop", "own_objective", "own_model"])
def test_every_example_runs_and_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = dict(OBJECTIVES)
    try:
        found = _example(name).main(6)
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(before)
    if name == "plain_loop":
        assert found[0] == pytest.approx(0.693147, abs=1e-6) and found[-1] < 0.69
    else:
        assert found > 0.6 if name == "own_objective" else found < 0.693


@pytest.mark.slow
def test_the_frontier_runs_in_small_and_says_where_it_cannot_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference's own KL is 0 exactly; every run moved; the files hold what was returned."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    frontier = _example("reward_kl_frontier")
    reference, *points = frontier.main(["--smoke", "--to", str(tmp_path)])
    assert (reference.kl.mean, reference.kl.low, reference.kl.high) == (0, 0, 0)
    families = [name for name, _ in frontier.SMOKE.runs]
    assert [(p.objective.split()[0], p.step) for p in points] == [
        (name, step) for name in families for step in frontier.SMOKE.steps
    ]
    assert all(p.kl.low < p.kl.high and -1 <= p.reward.mean <= 1 for p in points)
    written = json.loads((tmp_path / "reward_kl_frontier.json").read_text())["points"]
    assert [p["kl"]["mean"] for p in written] == [p.kl.mean for p in (reference, *points)]
    table = (tmp_path / "reward_kl_frontier.md").read_text()
    assert len(table.splitlines()) == 2 + len(written)
    assert not (tmp_path / "reward_kl_frontier.png").exists()
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out


def test_readmes_table_of_objectives_is_the_table() -> None:
    shown = README.split("<!-- objectives: lora-dpo objectives --markdown -->\n")[1]
    printed = CliRunner().invoke(app, ["objectives", "--markdown"]).output
    assert shown.split("<!-- end of objectives -->")[0] == printed
    assert len(printed.splitlines()) == len(OBJECTIVES) + 2 > 32


def test_readmes_figures_of_the_frontier_are_those_that_were_measured() -> None:
    frontier = _example("reward_kl_frontier")
    found = json.loads((ROOT / "docs" / "reward_kl_frontier.json").read_text())["points"]
    points = [
        frontier.Point(**{**p, "reward": Estimate(**p["reward"]), "kl": Estimate(**p["kl"])})
        for p in found
    ]
    section = " ".join(README.split("## Reward against KL")[1].split("\n## ")[0].split())
    told = re.findall(r"`([a-z_]+[^`]*)` (-?[\d.]+) at ([\d.]+) nats", section)
    assert len(told) == section.count("nats") - 2  # two are of no point
    assert set(told) <= {(p.objective, f"{p.reward.mean:.2f}", f"{p.kl.mean:.1f}") for p in points}
    last = [p for p in points if p.step == max(q.step for q in points)]
    assert max(points, key=lambda p: p.reward.mean).objective == "kto_running beta 0.1"
    assert min(last, key=lambda p: p.kl.mean).objective == "sft"
    assert max(last, key=lambda p: p.unfinished).objective == "simpo beta 2, gamma 1"
    assert max(p.unfinished for p in last) > 0.5
    assert frontier.table(points) == (ROOT / "docs" / "reward_kl_frontier.md").read_text()


def test_the_command_prints_every_objective_and_all_of_one() -> None:
    table = CliRunner().invoke(app, ["objectives"]).output
    for name in OBJECTIVES:
        assert name in table
        one = CliRunner().invoke(app, ["objectives", name]).output
        assert "Limits:" in one and OBJECTIVES[name].arxiv in one
    wrong = CliRunner().invoke(app, ["objectives", "dpoo"])
    assert wrong.exit_code == 1 and "Did you mean 'dpo'?" in wrong.output
