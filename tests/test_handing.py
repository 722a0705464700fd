"""A run handed on: whole, proven, by a fresh process too, with nothing of the machine in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from lora_dpo import exporting, train
from lora_dpo.card import model_card
from lora_dpo.cli import app
from lora_dpo.config import Config
from lora_dpo.errors import ConfigError, ExportError, OutputError
from lora_dpo.exporting import export_merged
from lora_dpo.handing import export, push, smoke
from lora_dpo.handing.reloading import reload_in_a_fresh_process
from lora_dpo.policy import load_policy
from lora_dpo.run_folder import Run
from lora_dpo.smoking import SMOKE_FILE, greedy_answer
from tests.conftest import ROOT
from tests.fake_hub import fake_hub
from tests.helpers import move_adapter

HELD_OUT = Path(__file__).parents[1] / "lora_dpo" / "quickstart" / "data" / "heldout.jsonl"


@pytest.fixture(scope="module")
def run(quickstart_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("handing")
    rows = HELD_OUT.read_text(encoding="utf-8").splitlines()[:16]
    (folder / "prefs.jsonl").write_text("\n".join(rows))
    (folder / "model").symlink_to(quickstart_model)
    settings = {
        "model": {"base": str(folder / "model")},
        "lora": {"rank": 4, "alpha": 8, "rslora": True},
        "data": {"train": str(folder / "prefs.jsonl"), "eval_fraction": 0.3, "max_length": 256},
        "train": {"max_steps": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 4},
        "output": {"dir": str(folder / "run"), "diagnose": False},
    }
    return train(Config.parse(settings))


@pytest.fixture(scope="module")
def merged(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    to = tmp_path_factory.mktemp("out") / "new" / "merged"
    return export(run, to, merge=True, gguf="q8_0", measure_both=True)


@pytest.fixture(scope="module")
def adapter(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export(run, tmp_path_factory.mktemp("out") / "adapter", base_id="owner/base")


def test_a_merge_is_proven_measured_on_both_bases_and_reloaded_by_a_fresh_process(
    merged: Any,
) -> None:
    assert merged.proof.kl < 1e-4 == merged.proof.gate
    other = merged.others["original"]
    assert other.gate is None and other.kl > 3 * merged.proof.kl  # the rounding of NF4
    assert merged.proof.nll == pytest.approx(other.nll)
    assert merged.proof.nll_exported == pytest.approx(merged.proof.nll, abs=1e-2)
    assert "no missing and no further weights" in merged.reloaded
    assert merged.gguf.compared == merged.gguf.tensors
    said = str(merged)
    for part in ("into the trained base", "into the original base", "which base", "GGUF"):
        assert part in said
    names = {path.name for path in merged.folder.iterdir()}
    assert {"Modelfile", "SERVE.md", "README.md", SMOKE_FILE, "model-q8_0.gguf"} <= names
    assert [path.name for path in merged.folder.parent.iterdir()] == ["merged"]
    assert "FROM ./model-q8_0.gguf" in (merged.folder / "Modelfile").read_text()


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_no_path_of_this_machine_and_no_placeholder_is_in_an_export(
    run: Run, kind: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(kind)
    marks = [str(run.folder.parent), str(Path.home()) + "/", "/tmp/", "More Information Needed"]
    for path in found.folder.iterdir():
        content = path.read_bytes()
        assert not [mark for mark in marks if mark.encode() in content], path


def test_the_card_says_what_it_was_made_of_and_its_header_is_the_hubs(
    run: Run, merged: Any, adapter: Any
) -> None:
    card = (merged.folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert "base_model" not in header  # a folder is no hub id
    assert set(header["tags"]) == {"lora_dpo", "dpo"}
    assert run.results["train_rows"][:16] in card
    assert "| rewards/margins | 0 |" in card
    moved = run.results["held_out"]["mean_low_high"]
    before = moved["logps/chosen"][0] - moved["logratios/chosen"][0]
    assert f"| logps/chosen | {before:.4g} |" in card
    assert "KL(policy || exported)" in card
    card = (adapter.folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("owner/base", "adapter")
    assert header["library_name"] == "peft"
    assert "rsLoRA folded in" in card


def test_a_runs_exports_are_listed_in_its_folder(run: Run, merged: Any, adapter: Any) -> None:
    lines = [json.loads(x) for x in (run.folder / "exports.jsonl").read_text().splitlines()]
    by_place = {line["to"]: line for line in lines}
    line = by_place[str(merged.folder)]
    assert (line["kind"], line["base"], line["dtype"]) == ("merged", "trained", "bfloat16")
    assert line["proof"] == merged.proof.to_dict()
    assert by_place[str(adapter.folder)]["proof"] is None


def test_the_adapter_passes_its_smoke_test_on_the_base(adapter: Any, run: Run) -> None:
    found = smoke(adapter.folder, base=run.config.model.base)
    assert found.passed  # on the plain base: the rounding of NF4 is within the tolerance
    guide = (adapter.folder / "SERVE.md").read_text()
    assert "vllm serve owner/base --enable-lora --max-lora-rank 8 --lora-modules policy=." in guide
    assert "REFUSES" not in str(adapter)


def test_the_python_in_the_guide_runs(merged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (merged.folder / "SERVE.md").read_text()
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL)
    assert code is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(merged.folder)
        exec(compile(code[1], "SERVE.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 5


def test_a_fresh_process_refuses_a_folder_that_lacks_a_weight_and_stops_elsewhere(
    merged: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for path in merged.folder.iterdir():
        if path.suffix != ".gguf":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings["eos_token_id"] = 4
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    message = r"does not load cleanly: .*up_proj.*stops on \[4\].*nats apart"
    with pytest.raises(ExportError, match=message):
        reload_in_a_fresh_process(tmp_path, gated=True)


def test_generation_ends_where_the_template_ends_a_turn_whatever_the_base_said(
    quickstart_model: Path, tmp_path: Path
) -> None:
    """The base's own settings know another end; the answers that it learnt end with the template's."""
    policy = load_policy(quickstart_model, quantisation="none").eval()
    move_adapter(policy, std=0.01)
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    text, end = tokenizer.chat_template, tokenizer.eos_token_id
    tokenizer.chat_template = text.replace("eos_token", "'<|end|>'")
    tokenizer.eos_token = "<|pad|>"
    policy.get_base_model().generation_config.eos_token_id = tokenizer.eos_token_id
    policy.get_base_model().generation_config.temperature = 0.7  # without do_sample: not valid
    rows = [([0, 1, 50, 3, 2], [60, 61, 3])]
    export_merged(lambda: policy, tokenizer, tmp_path / "merged", sequences=rows)
    settings = GenerationConfig.from_pretrained(tmp_path / "merged")
    settings.validate(strict=True)
    assert settings.eos_token_id == [tokenizer.eos_token_id, end]
    record = json.loads((tmp_path / "merged" / SMOKE_FILE).read_text())
    ids = record["prompts"][0]["token_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert greedy_answer(model.eval(), ids, None, 200)[-1] == end
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.chat_template == tokenizer.chat_template
    stored = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert stored["chat_template"] == tokenizer.chat_template
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_tokenizer_that_comes_back_as_another_stops_the_export(
    quickstart_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(quickstart_model, quantisation="none").eval()
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    kept = exporting._save_tokenizer

    def spoilt(tokenizer: Any, folder: Path) -> None:
        kept(tokenizer, folder)
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace("<|assistant|>", "<|user|>"))

    monkeypatch.setattr(exporting, "_save_tokenizer", spoilt)
    with pytest.raises(ExportError, match="reads 'How are you"):
        export_merged(
            lambda: policy, tokenizer, tmp_path / "merged", sequences=[([0, 1, 5], [6, 3])]
        )
    assert not (tmp_path / "merged").exists()


def test_options_that_do_not_go_together_are_told_before_weights_load(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("lora_dpo.run_folder.Run.load_policy", None)  # nothing may ask for it
    to = tmp_path / "x"
    for options, error, message in (
        ({"gguf": "q8_0"}, ExportError, "give --merge"),
        ({"measure_both": True}, ExportError, "give --merge"),
        ({"merge": True, "llama_cpp": tmp_path}, ConfigError, "say which, as --gguf"),
        ({"merge": True, "gguf": "q5_k_m"}, ConfigError, "none of f32, f16"),
        ({"merge": True, "gguf": "f16", "llama_cpp": tmp_path}, ConfigError, "give a checkout"),
        ({"base_id": "alone"}, ConfigError, "expected owner/name"),
        ({"private": True}, ConfigError, "belongs to --push"),
        ({"push_to": "a/b/c"}, ConfigError, "no repository id"),
        ({"push_to": "me/model"}, OutputError, "no token for the hub"),
    ):
        with pytest.raises(error, match=message):
            export(run, to, **options)
    assert not to.exists()


def test_the_commands_have_examples_and_exit_with_one_on_a_mistake(
    run: Run, tmp_path: Path
) -> None:
    runner = CliRunner()
    for name in ("export", "smoke", "push"):
        assert "Example: lora-dpo" in runner.invoke(app, [name, "--help"]).output
    for words in (
        ["smoke", str(tmp_path)],
        ["push", str(tmp_path), "me/model"],
        ["export", str(run.folder), "--to", str(run.folder / "inside")],
    ):
        done = runner.invoke(app, words)
        assert done.exit_code == 1, words


def test_a_checkpoint_of_a_chat_run_that_did_not_end_is_exported_as_chats_without_final_figures(
    run: Run, tmp_path: Path
) -> None:
    stopped = Path(shutil.copytree(run.folder, tmp_path / "run"))
    (stopped / "run.json").unlink()
    shutil.rmtree(stopped / "adapter")
    assert Run.open(stopped).is_chat is run.is_chat is True
    newest = max(int(p.name.split("-")[1]) for p in stopped.glob("checkpoint-*"))
    found = export(stopped, tmp_path / "out", checkpoint=str(newest))
    assert json.loads((found.folder / SMOKE_FILE).read_text())["chat"] is True
    line = (stopped / "exports.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["checkpoint"] == found.checkpoint == f"checkpoint-{newest}"
    # the whole run's checkpoint has figures of the run, which are not its own
    card = model_card(run.config, run.results, checkpoint=found.checkpoint)
    assert f"training: step {newest} of {run.results['steps']}, a checkpoint" in card
    assert "Held-out pairs" not in card
    assert "Held-out pairs" in model_card(run.config, run.results)


def test_the_card_tells_no_setting_that_may_hold_a_path_and_no_reference_where_there_is_none(
    run: Run,
) -> None:
    further = {"run_name": "~/alice", "project": "../secret", "learning_rate": 1e-3, "optim": "sgd"}
    settings = run.config.to_dict()
    settings["train"] |= further
    card = model_card(Config.parse(settings), run.results)
    assert "learning_rate 0.001" in card and "optim sgd" in card
    assert "alice" not in card and "secret" not in card
    bare = {"rewards/chosen": [1.0, 0.9, 1.1], "rewards/accuracies": [0.7, 0.6, 0.8]}
    card = model_card(run.config, {"held_out": {"mean_low_high": bare}})
    assert "| rewards/chosen |  | 1 |" in card and "| rewards/accuracies |  | 0.7 |" in card


def test_a_runs_own_adapter_is_no_export(run: Run, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.folder / "adapter", tmp_path / "other" / "adapter"))
    before = sorted(path.name for path in other.iterdir())
    with pytest.raises(OutputError, match="holds no export of ours"):
        push(other, "me/model")
    with pytest.raises(OutputError, match="holds something else than an export"):
        export(run, other, overwrite=True)
    assert sorted(path.name for path in other.iterdir()) == before


def test_a_base_that_cannot_be_merged_into_is_told_before_weights_load(
    run: Run, quickstart_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_dpo.run_folder.Run.load_policy", None)  # nothing may ask for it
    base = Path(shutil.copytree(quickstart_model, tmp_path / "base"))
    settings = run.config.to_dict()
    settings["model"]["base"] = str(base)
    other = Run(run.folder, Config.parse(settings), run.results)
    plain = json.loads((base / "config.json").read_text())
    for change, options, message in (
        ({"auto_map": {"AutoConfig": "own.Config"}}, {}, "code of its own"),
        ({"quantization_config": {"load_in_4bit": True}}, {"base": "original"}, "itself is quant"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            {"measure_both": True},
            "itself is quant",
        ),
    ):
        (base / "config.json").write_text(json.dumps(plain | change))
        with pytest.raises(ExportError, match=message):
            export(other, tmp_path / "out", merge=True, **options)


def test_a_push_is_in_the_runs_list_and_an_export_whose_push_failed_too(
    run: Run, tmp_path: Path
) -> None:
    calls = "import sys; from lora_dpo.handing import export\n"
    calls += "export(sys.argv[1], sys.argv[2], push_to='me/adapter')\n"
    calls += "try: export(sys.argv[1], sys.argv[3], push_to='me/fails')\n"
    calls += "except Exception as error: print(error)"
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with fake_hub() as hub:
        hub.fails_for = "me/fails"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_TOKEN": "hf_ofTheTest", "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", calls, str(run.folder), first, second],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
    lines = [json.loads(x) for x in (run.folder / "exports.jsonl").read_text().splitlines()]
    pushed = {line["to"]: line["pushed"] for line in lines}
    assert pushed[first]["repo"] == "me/adapter"
    assert pushed[second] is None
