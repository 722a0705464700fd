"""What comes from other people (models, adapters, checkpoints, data, templates, servers) stays material.

Each test plants something that would act if it were obeyed: a pickle that makes a file, code beside a
model, a name that leads elsewhere, a secret that could be repeated.
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lora_dpo
from lora_dpo import run as runs
from lora_dpo.card import base_licence
from lora_dpo.checkpoints import list_checkpoints
from lora_dpo.cli import app
from lora_dpo.config import Config, ModelConfig
from lora_dpo.config.reading import read_yaml
from lora_dpo.data import load_preferences, tokenise
from lora_dpo.data.caching import load as load_cached
from lora_dpo.ends import end_of_turn
from lora_dpo.errors import ConfigError, DataError, LoraDpoError, ModelError, OutputError
from lora_dpo.guards import check_scaler
from lora_dpo.handing import push, smoke, write_gguf
from lora_dpo.handing.asking import Endpoint
from lora_dpo.handing.modelfile import read_turns
from lora_dpo.handing.plain_reload import reload
from lora_dpo.judging import open_judge
from lora_dpo.lines import add_lines
from lora_dpo.policy import as_published, check_base, load_policy
from lora_dpo.preparing import load_tokenizer
from lora_dpo.prompt_tokens import encode_prompt
from lora_dpo.reference_store import stored_reference_logps
from lora_dpo.run_folder import Run
from lora_dpo.showing import Lines, page
from lora_dpo.store import MANIFEST, fingerprint, read_json, write_json, write_manifest
from tests.conftest import byte_tokenizer
from tests.judge_server import Reply, completion, serving

PACKAGE = Path(lora_dpo.__file__).parent


class Bomb:
    """Unpickled by anything that obeys pickles, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    """The file that must not be there at the end; the bomb itself is shown to work."""
    tried = tmp_path / "tried"
    pickle.loads(pickle.dumps(Bomb(tried))).close()
    assert tried.exists()
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists(), "a pickle or a program was run"


def _plant(path: Path, mark: Path) -> None:
    """Write the bomb as torch does, in its zip file."""
    torch.save(Bomb(mark), path)


def _model_without_weights(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors*")))


def _values(model: Path, data: Path, folder: Path, **further: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(model)},
        "lora": {"rank": 4},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_length": 128},
        "train": {"max_steps": 4, "save_steps": 2, "eval_steps": 4, "use_cpu": True, **further},
        "output": {"dir": str(folder), "diagnose": False, "samples": 0},
    }


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory, pairs: list[dict[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def half(tiny_model: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left after two of its four steps."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    runs.train(_values(tiny_model, preferences, folder), stop_after=2)
    return folder


# ---- pickles -------------------------------------------------------------------------------------


def test_the_package_itself_opens_no_pickle_starts_no_shell_and_evaluates_no_text() -> None:
    """By its own source: nothing in it could, whatever it is given."""
    acting = re.compile(
        r"\b(pickle|torch|np|numpy|joblib|dill)\.loads?\(|(?<![.\w])(eval|exec)\(|shell=|os\.system"
        r"|os\.popen|unsafe_load|full_load|allow_pickle|weights_only=False"
    )
    for bad in ("torch.load(f)", "x = eval(text)", "run(c, shell=True)", "pickle.loads(b)"):
        assert acting.search(bad)
    for path in PACKAGE.rglob("*.py"):
        assert not acting.search(path.read_text(encoding="utf-8")), path


def test_a_base_of_pickles_is_refused_before_anything_loads_also_as_a_judge_and_in_smoke(
    tiny_model: Path, tmp_path: Path, mark: Path
) -> None:
    folder = _model_without_weights(tiny_model, tmp_path / "pickled")
    _plant(folder / "pytorch_model.bin", mark)
    told = r"weights are pickles \(pytorch_model\.bin\).*save_pretrained\(NEW_FOLDER\)"
    with pytest.raises(ModelError, match=told):
        check_base(ModelConfig(base=str(folder)))
    with pytest.raises(ModelError, match=told):
        load_policy(folder)
    with pytest.raises(ModelError, match=told):
        open_judge(folder)
    write_json(folder / "smoke_test.json", _record(tiny_model))
    found = smoke(folder)
    assert not found.passed and any("pickles" in check.what for check in found.checks)
    with pytest.raises(OSError, match="safetensors"):
        reload(folder, 2**30)


def _record(model: Path) -> dict[str, Any]:
    prompt = {"text": "Hi", "messages": None, "token_ids": [1, 5], "answer_ids": [2], "answer": ""}
    first = [{"id": 2, "token": "</s>", "logprob": -0.1}]
    prompts = [{**prompt, "first_token": first, "stopped": True}]
    return {"prompts": prompts, "tolerance": 0.1, "stop_ids": [2], "template_arguments": {}}


def test_a_smoke_test_of_a_stranger_is_read_as_one_or_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    record = _record(tiny_model)
    (prompt,) = record["prompts"]
    for change, told in (
        ({"tolerance": "wide"}, "tolerance: "),
        ({"stop_ids": None}, "stop_ids: "),
        ({"prompts": [{**prompt, "token_ids": [-1]}]}, r"prompts\.0\.token_ids\.0: "),
        ({"prompts": [{**prompt, "first_token": []}]}, r"prompts\.0\.first_token: "),
        ({"prompts": ["x"]}, r"prompts\.0: "),
    ):
        write_json(folder / "smoke_test.json", {**record, **change})
        with pytest.raises(OutputError, match=rf"not what 'lora-dpo export' writes \({told}"):
            smoke(folder)
    write_json(folder / "smoke_test.json", {**record, "prompts": [{**prompt, "token_ids": [999]}]})
    found = smoke(folder)
    assert any("tokens that the model does not have" in check.what for check in found.checks)


@pytest.mark.parametrize(
    "named",
    ["pytorch_model.bin", "../elsewhere/model.safetensors", "/etc/x.safetensors", 7],
)
def test_an_index_names_safetensors_of_its_own_folder_or_is_refused(
    tiny_model: Path, tmp_path: Path, mark: Path, named: Any
) -> None:
    folder = _model_without_weights(tiny_model, tmp_path / "model")
    _plant(folder / "pytorch_model.bin", mark)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names .*files of the same folder that end in"):
        load_policy(folder)


def test_a_config_that_names_other_weights_or_kernels_of_the_hub_is_refused(
    tiny_model: Path, tmp_path: Path, mark: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    _plant(folder / "adapter_model.bin", mark)
    values = json.loads((folder / "config.json").read_text())
    for change, told in (
        ({"transformers_weights": "adapter_model.bin"}, "names 'adapter_model.bin' as its weights"),
        (
            {"attn_implementation": "evil/kernel"},
            "asks for 'evil/kernel', which is code on the hub",
        ),
    ):
        (folder / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ModelError, match=told):
            load_policy(folder)


@pytest.fixture(scope="module")
def adapter(half: Path) -> Path:
    return half / "adapter"


def test_an_adapter_is_read_from_safetensors_alone(
    tiny_model: Path, adapter: Path, tmp_path: Path, mark: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    _plant(folder / "adapter_model.bin", mark)
    load_policy(tiny_model, adapter=folder)  # beside safetensors it is not looked at
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weights are pickles \(adapter_model\.bin\)"):
        load_policy(tiny_model, adapter=folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights there"):  # and the hub is not asked
        load_policy(tiny_model, adapter=folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil_module"}, "megatron_config names"),
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA'; only LoRA"),
    ],
)
def test_an_adapter_imports_nothing(
    tiny_model: Path, adapter: Path, tmp_path: Path, change: Any, told: str
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=told):
        load_policy(tiny_model, adapter=folder)
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "rng_state.pth", "training_args.bin"],
)
def test_a_checkpoint_whose_checksums_pass_still_runs_nothing(
    tiny_model: Path, preferences: Path, half: Path, tmp_path: Path, mark: Path, name: str
) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    (folder / "run.json").unlink()  # as after a kill
    (checkpoint,) = list_checkpoints(folder)
    facts = read_json(checkpoint / MANIFEST)["facts"]
    was_there = (checkpoint / name).is_file()
    _plant(checkpoint / name, mark)
    write_manifest(checkpoint, facts)
    values = _values(tiny_model, preferences, folder)
    if was_there:  # what is read of a checkpoint
        with pytest.raises(OutputError, match="holds more than numbers, and was not loaded"):
            runs.train(values, resume=True)
    else:  # what is never read
        _plant(checkpoint / "adapter_model.bin", mark)  # beside safetensors
        write_manifest(checkpoint, facts)
        assert runs.train(values, resume=True).results["steps"] == 4


def test_the_state_of_a_scaler_that_is_not_there_is_told(tmp_path: Path, mark: Path) -> None:
    check_scaler(tmp_path, None)
    _plant(tmp_path / "scaler.pt", mark)
    check_scaler(tmp_path, torch.amp.GradScaler("cpu"))
    with pytest.raises(OutputError, match=r"written in float16.*computes without one"):
        check_scaler(tmp_path, None)


def test_data_are_never_unpickled_or_run_and_name_no_file_to_open(
    tmp_path: Path, mark: Path, pairs: list[dict[str, str]]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("rows.pkl", "rows.pt", "rows.bin", "rows.npy"):
        _plant(folder / name, mark)
        with pytest.raises(DataError, match="not known by its name"):
            load_preferences(folder / name)
    (folder / "data.py").write_text(f"open({str(mark)!r}, 'w')")
    (folder / "dataset_infos.json").write_text('{"default": {"builder_name": "data"}}')
    with pytest.raises(DataError, match="a folder without data"):
        load_preferences(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert len(load_preferences(folder)) == len(pairs)
    csv = tmp_path / "cells.csv"
    call = f"[{{'role': open({str(mark)!r}, 'w')}}]"
    csv.write_text(f'prompt,chosen,rejected\n"{call}",a,b\n')
    assert load_preferences(csv).rows[0].prompt == call


def test_a_saved_dataset_with_pictures_opens_none_of_them(tmp_path: Path) -> None:
    """A feature that would be fetched when it is looked at: rows are taken as they are stored."""
    import datasets

    asked: list[Any] = []
    address = "http://127.0.0.1:9/picture.png"
    folder = tmp_path / "saved"
    texts = {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {**dict.fromkeys(texts, datasets.Value("string")), "image": image}
    datasets.Dataset.from_dict(
        {**texts, "image": [{"bytes": None, "path": address}]}, datasets.Features(features)
    ).save_to_disk(str(folder))
    info = read_json(folder / "dataset_info.json")
    info["features"]["image"] = {"_type": "Image"}
    write_json(folder / "dataset_info.json", info)
    assert datasets.load_from_disk(str(folder)).features["image"] == datasets.Image()

    def hear(event: str, args: Any) -> None:
        if asked and event == "socket.connect":
            asked.append(args)

    sys.addaudithook(hear)
    asked.append("listening")
    try:
        assert len(load_preferences(tmp_path / "saved")) == 1
    finally:
        found, asked[:] = list(asked), []
    assert found == ["listening"]


def test_caches_hold_no_program(
    tiny_model: Path, tmp_path: Path, mark: Path, pairs: list[dict[str, str]]
) -> None:
    entry = tmp_path / "tokens"
    entry.mkdir()
    (entry / "rows").mkdir()
    (entry / "rows" / "data-00000-of-00001.arrow").write_bytes(pickle.dumps(Bomb(mark)))
    (entry / "rows" / "state.json").write_bytes(pickle.dumps(Bomb(mark)))
    (entry / "facts.json").write_text("{}")
    write_manifest(entry, {"key": "k"})
    assert load_cached(entry, "k") is None

    store, policy = tmp_path / "store", load_policy(tiny_model)
    data = tokenise(load_preferences(pairs[:2]), byte_tokenizer(), max_length=64)
    stored_reference_logps(policy, data, store)
    content = pickle.dumps(Bomb(mark))
    content += b"\0" * (-len(content) % 24)
    import hashlib

    (kept,) = {path.parent for path in store.rglob("*.logps")}
    (kept / f"{hashlib.sha256(content).hexdigest()}.logps").write_bytes(content)
    again = stored_reference_logps(policy, data, store)
    assert len(again) == len(data)


# ---- code of a model's repository -----------------------------------------------------------------


@pytest.fixture
def with_code(tiny_model: Path, tmp_path: Path, mark: Path) -> Path:
    """A base whose config and tokenizer name Python files beside them."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "with_code"))
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "auto_map": classes}))
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nConfig = Model = Tokenizer = None\n"
    )
    return folder


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_does_not_run_even_if_someone_answers_yes(
    with_code: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Left unsaid, transformers asks on standard input, where a pipe may say yes to all."""
    if not known:  # a model that only its own code could load
        for name in ("config.json", "tokenizer_config.json"):
            values = json.loads((with_code / name).read_text())
            values |= {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
            (with_code / name).write_text(json.dumps(values))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    write_json(with_code / "smoke_test.json", _record(tiny_model))
    config = Config.parse(
        {"model": {"base": str(with_code)}, "data": {"train": "-"}, "output": {"dir": "-"}}
    )
    for call in (
        lambda: load_policy(with_code),
        lambda: load_tokenizer(config),
        lambda: open_judge(with_code),
        lambda: smoke(with_code),
        lambda: write_gguf(with_code, "f32"),
        lambda: reload(with_code, 2**30),
        lambda: lora_dpo.plan(config, gpu="4GiB"),
    ):
        with suppress(LoraDpoError, ValueError):  # that nothing ran is asked at the end
            call()


def test_code_that_was_asked_for_is_named_in_the_log(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        check_base(ModelConfig(base=str(tiny_model)))
        assert not caplog.messages
        check_base(ModelConfig(base=str(tiny_model), trust_remote_code=True))
    assert caplog.messages == [
        f"model.trust_remote_code: Python code of {tiny_model} runs in this process (this folder's)"
    ]


def test_no_service_is_asked_to_convert_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "DISABLE_SAFETENSORS_CONVERSION"
    monkeypatch.delenv(name, raising=False)
    with as_published():
        from transformers.modeling_utils import is_env_variable_true

        assert is_env_variable_true(name)
    assert name not in os.environ


# ---- texts that would act -------------------------------------------------------------------------


def test_yaml_makes_no_objects(tmp_path: Path, mark: Path) -> None:
    text = f"model: !!python/object/apply:builtins.open [{str(mark)!r}, 'w']\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"not valid YAML.*python/object"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="python/object"):
        Config.load(PACKAGE.parent / "configs" / "quickstart.yaml", [text.replace(": ", "=", 1)])
    (tmp_path / "README.md").write_text(f"---\nlicense: {text.partition(': ')[2]}---\n")
    assert base_licence(str(tmp_path)) is None
    assert "config.yaml: not readable as YAML" in str(lora_dpo.report([tmp_path]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ raise_exception('no \x1b[2J') }}",
        "{{ nonsense.x.y }}",
        "{% if %}",
    ],
)
def test_a_template_stays_in_its_sandbox_and_is_an_error_of_ours(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "q"}]
    row = {"prompt": chat, "chosen": [{"role": "assistant", "content": "a"}]}
    rows = [{**row, "rejected": [{"role": "assistant", "content": "b"}]}]
    with pytest.raises(DataError, match="the chat template cannot render this conversation"):
        tokenise(load_preferences(rows), tokenizer, max_length=64)
    with pytest.raises(ModelError, match="the chat template cannot render the prompt"):
        encode_prompt(tokenizer, chat)
    assert end_of_turn(tokenizer) is None
    assert read_turns(tokenizer) is None


def test_names_of_files_are_arguments_and_never_commands(tiny_model: Path, tmp_path: Path) -> None:
    """A folder whose name a shell would obey, and an option parser too, reaches the converter whole."""
    name = "-a b;touch pwned;$(touch pwned)`touch pwned`\n&|x"
    folder = Path(shutil.copytree(tiny_model, tmp_path / name))
    checkout = tmp_path / "llama cpp;touch pwned"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text(
        "import json, os, pathlib, sys\n"
        "said = pathlib.Path(__file__).with_name('said.json')\n"
        "said.write_text(json.dumps([sys.argv[1:], sys.stdin.read()]))\n"
        "sys.exit(3)\n"
    )
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(LoraDpoError, match="ended with 3"):
            write_gguf(name, "f16", llama_cpp=checkout)
    finally:
        os.chdir(before)
    arguments, stdin = json.loads((checkout / "said.json").read_text())
    assert arguments[0] == str(folder) and arguments[1] == "--outfile" and stdin == ""
    assert not list(tmp_path.rglob("pwned"))


def test_git_starts_no_program_that_a_repository_names(tmp_path: Path, mark: Path) -> None:
    from lora_dpo.surroundings import git_state

    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    assert (
        git_state(tmp_path) is None
    )  # no repository, unless the machine's temporary folder is one

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "x")
    script = tmp_path / "monitor.sh"
    script.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    script.chmod(0o755)
    git("config", "core.fsmonitor", str(script))
    found = git_state(tmp_path)
    assert (
        found is not None
        and found["dirty"] is False
        and re.fullmatch("[0-9a-f]{40}", found["commit"])
    )
    (tmp_path / "file").write_text("2")
    changed = git_state(tmp_path)
    assert changed == {**found, "dirty": True}


def test_what_would_move_a_cursor_is_shown_in_log_lines_and_in_errors_of_the_system(
    tmp_path: Path,
) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a %s\nb", ("\x1b[2J\x07\u202e",), None)
    assert Lines().format(record) == "a ⟨ESC⟩[2J⟨U+0007⟩⟨U+202E⟩\nb"
    name = tmp_path / "run\x1b[2J"
    name.mkdir()
    (name / "config.yaml").mkdir()
    (name / "page").mkdir()
    said = CliRunner().invoke(app, ["report", str(name), "--to", str(name / "page")])
    assert said.exit_code == 1 and "\x1b" not in said.output + said.stderr


# ---- names that lead elsewhere --------------------------------------------------------------------


def test_names_in_a_run_stay_in_its_folder(half: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    shutil.copytree(adapter, tmp_path / "elsewhere")
    results = read_json(folder / "run.json")
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "checkpoint-2/../../elsewhere"):
        write_json(folder / "run.json", {**results, "best_checkpoint": name})
        with pytest.raises(OutputError, match="expected final, best, or the step"):
            Run.open(folder).adapter_folder("best")
    for name in ("2/../../elsewhere", "checkpoint-../elsewhere", "\n2"):
        with pytest.raises(OutputError, match="expected final, best, or the step"):
            Run.open(folder).adapter_folder(name)
    write_json(folder / "run.json", {**results, "best_checkpoint": "checkpoint-2"})
    assert Run.open(folder).adapter_folder("best").name == "checkpoint-2"


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt"])
def test_a_manifest_speaks_of_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    from lora_dpo.store import read_manifest

    folder, outside = tmp_path / "folder", tmp_path / "outside.txt"
    (folder / "a").mkdir(parents=True)
    outside.write_text("secret")
    write_manifest(folder)
    manifest = read_json(folder / MANIFEST)
    for listed in (name, str(outside)):
        content = {"facts": manifest["facts"], "files": {listed: {"bytes": 6, "sha256": ""}}}
        write_json(folder / MANIFEST, {**content, "sha256": fingerprint(content)})
        with pytest.raises(OutputError, match="which lies outside of"):
            read_manifest(folder)


def test_a_link_in_a_folder_from_elsewhere_is_neither_sent_nor_written_through(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("keep")
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "export_proof.json").write_text("{}")
    (folder / "inside").symlink_to(folder / "export_proof.json")
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(OutputError, match=r"notes\.txt: is a link to a file outside of"):
        push(folder, "me/model")
    (folder / "exports.jsonl").symlink_to(secret)
    with pytest.raises(OutputError, match="is a link, to which nothing is appended"):
        add_lines(folder / "exports.jsonl", [{"a": 1}])
    assert secret.read_text() == "keep"


# ---- pages and servers ----------------------------------------------------------------------------


def test_a_page_without_a_script_of_ours_allows_none() -> None:
    text = page("told", "<script>title</script>", facts="<script>x</script>")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; style-src") and "script-src" not in policy
    assert "<script" not in text


def test_the_label_page_answers_every_broken_request_and_goes_on(tmp_path: Path) -> None:
    from tests.test_labelling import _ask, _rows, _served, _session

    with _session(_rows(1), tmp_path / "labels.jsonl") as session, _served(session) as server:
        own = f"/{server.token}/choose"
        assert _ask(server, "POST", own, b"[" * 4000)[0] == 400  # deeper than Python recurses
        for length in ("\xb2", "1" * 5000, "-1", "1_0"):  # digits to Python, some of them
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
            connection.putrequest("POST", own, skip_host=True)
            at = f"127.0.0.1:{server.server_port}"
            sent = {"Host": at, "Origin": f"http://{at}", "Content-Type": "application/json"}
            for name, value in {**sent, "Content-Length": length}.items():
                connection.putheader(name, value)
            connection.endheaders()
            assert connection.getresponse().status in (413, 415)
            connection.close()
        assert session.state()["done"] == 0


def test_a_served_model_gets_the_key_and_nobody_else_hears_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "sk-of-the-served-model-0123456789"
    monkeypatch.setenv("SERVED_KEY", key)
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")  # what stays here needs no proxy
    with serving(lambda number, body: Reply(401, f"bad {key}\x1b[2J".encode())) as server:
        endpoint = Endpoint(server.address, model="m", key_variable="SERVED_KEY")
        with pytest.raises(ModelError, match=r"answered 401 \(bad \[key\]⟨ESC⟩\[2J\)"):
            endpoint.ask({"messages": None, "text": "x"}, {}, 1)
        assert server.requests[0]["headers"]["authorization"] == f"Bearer {key}"
    for address in ("http://me:secret@127.0.0.1:9", "http://127.0.0.1:9/?key=secret"):
        with pytest.raises(ConfigError) as caught:
            Endpoint(address, model="m")
        assert "secret" not in str(caught.value) and "--api-key-variable" in str(caught.value)


# ---- secrets --------------------------------------------------------------------------------------

HUB = "hf_" + "aB3" * 11
# In pieces, so that no program that looks for tokens in repositories finds any here.
SECRETS = {
    "a token of the hub": HUB,
    "an API key": "sk-" + "ant-api03-" + "aB3" * 11,
    "a token of GitHub": "gh" + "p_" + "aB3" * 12,
    "a token of GitHub, fine-grained": "github" + "_pat_" + "aB3" * 12,
    "a token of GitLab": "glp" + "at-" + "aB3-" * 5,
    "a key of AWS": "AK" + "IA" + "IOSFODNN7EXAMPLE",
    "a key of Google": "AI" + "za" + "aB3-_" * 7,
    "a token of Slack": "xo" + "xb-123456789012-aB3",
    "a token of Slack, as an address": "https://hooks." + "slack.com/services/T0/B0/aB3",
    "a signed token (JWT)": "eyJhbGciOiJI" + ".eyJzdWIiOiIx" + ".aB3",
    "a bearer token": "Bearer " + "aB3/+" * 5,
    "a private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "the value of MY_JUDGE_KEY": "judge" + "-aB3.0123456789",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.run_name", f"mine {HUB}"),
        ("model.base", HUB),
        ("train.hub_token", HUB),
        (HUB, 1),
        ("data.columns.prompt", "sk-proj-abcdefgh0123456789ABCDEFG"),
        ("data.train", "https://me:pass1word@example.org/rows.jsonl"),
        ("train.run_name", "x my-wandb-key-0123"),
        ("data.train", [{"path": HUB}]),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(
    key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "my-wandb-key-0123")
    values = {"model": {"base": "b"}, "data": {"train": "d"}, "output": {"dir": "o"}}
    *sections, name = key.split(".")
    place: Any = values
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    with pytest.raises(ConfigError, match="a config is copied into the run's folder") as caught:
        Config.parse(values)
    said = str(caught.value)
    for secret in (HUB, "sk-proj", "pass1word", "my-wandb-key"):
        assert secret not in said


@pytest.mark.parametrize("kind", SECRETS)
def test_no_kind_of_secret_in_a_config_or_an_option_is_said_or_written_anywhere(
    kind: str, preferences: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Through the command, by the file and by ``--set``: refused before there is a folder of a run."""
    secret = SECRETS[kind]
    monkeypatch.setenv("MY_JUDGE_KEY", SECRETS["the value of MY_JUDGE_KEY"])
    values = _values(tiny_model, preferences, tmp_path / "run")
    (tmp_path / "ours.yaml").write_text(json.dumps(values))
    words = ["train", str(tmp_path / "ours.yaml"), "--set", f"train.run_name=x {secret}"]
    said = [CliRunner().invoke(app, words)]
    values["train"]["run_name"] = f"mine: {secret}"
    (tmp_path / "theirs.yaml").write_text(json.dumps(values))
    said.append(CliRunner().invoke(app, ["train", str(tmp_path / "theirs.yaml")]))
    for found in said:
        assert found.exit_code == 1, found.output
        assert kind.split(",")[0] in " ".join(found.output.split())
        assert secret not in found.output.replace("\n", "") + caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"ours.yaml", "theirs.yaml"}


def test_ordinary_names_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SSH_KEY": "/home/me/.ssh/id_ed25519", "KEY": "quickstart", "A_TOKEN": "a-word-and-another",
        "MONKEY": "tiny-llama-15m-0123456789",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    names = ["hf_models/x", "sk-learn", "runs/task-sk-2024-something-long-enough-0", "a@b:c"]
    names += ["ghp_model", "xoxb", "AKIA-runs", "eyJust.a.name", "a bearer of good news in 2024"]
    names += ["0123456789abcdef0123456789abcdef01234567"]  # of a commit
    names += ["/home/me/.ssh/id_ed25519", "quickstart", "a-word-and-another"]
    names += ["tiny-llama-15m-0123456789", "org/AIza-7B", "glpat", "BEGIN PUBLIC KEY"]
    for name in (*names, "https://example.org/a:b@c"):
        values = {"model": {"base": name}, "data": {"train": name}, "output": {"dir": name}}
        assert Config.parse(values).model.base == name


def test_no_file_and_no_line_of_a_whole_journey_holds_a_key_or_a_token(
    tiny_model: Path, preferences: Path, half: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Train, compare by a judge, export and report with secrets in the environment."""
    secrets = {"HF_TOKEN": HUB, "OPENAI_API_KEY": "sk-journey-0123456789abcdef"}
    secrets |= {"MY_JUDGE": "judge-key-0123456789", "WANDB_API_KEY": "wandb-0123456789"}
    secrets |= {"GITHUB_TOKEN": SECRETS["a token of GitHub"]}
    secrets |= {"AWS_ACCESS_KEY_ID": SECRETS["a key of AWS"], "AWS_SECRET_ACCESS_KEY": "aB3/" * 10}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    said = []
    with caplog.at_level(logging.DEBUG), serving(lambda number, body: completion("A")) as judge:
        run = runs.train(_values(tiny_model, preferences, folder, max_steps=1))
        compared = lora_dpo.compare(
            [run], judge=judge.address, judge_model="m", judge_key="MY_JUDGE", limit=2,
            max_new_tokens=4,
        )  # fmt: skip
        compared.write_html(tmp_path / "compare.html")
        said.append(json.dumps(compared.to_dict()))
        said.append(str(lora_dpo.export(run, tmp_path / "exported")))
        said.append(str(lora_dpo.report([folder], to=tmp_path / "report.html")))
        assert judge.requests[0]["headers"]["authorization"].endswith(secrets["MY_JUDGE"])
    told = caplog.text + "".join(said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 25 and {"run.json", "environment.json"} <= {path.name for path in files}
    for secret in secrets.values():
        assert secret not in told
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


def test_no_file_of_a_run_names_this_machine_or_its_user(half: Path) -> None:
    """``environment.json`` is the part that is made of what the machine says of itself."""
    text = (half / "environment.json").read_text()
    import getpass
    import socket

    for name in {socket.gethostname(), getpass.getuser(), str(Path.home()), str(half)}:
        assert len(name) < 4 or name not in text


# ---- no telemetry ---------------------------------------------------------------------------------

# Taken in by every Python that is started with this in its path, children of children too.
HEARING = """
import os, sys
_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_LOCAL = {None, "", "localhost", "127.0.0.1", "::1"}
def _tell(text):
    with open(os.environ["HEARD"], "a") as stream:
        stream.write(text + "\\n")
def _hear(event, args):
    if event not in _EVENTS:
        return
    where = args[0] if event.startswith("socket.get") else args[1]
    host = where[0] if isinstance(where, tuple) else where
    ours = isinstance(where, (str, bytes)) and event == "socket.connect"  # a socket of this machine
    if not ours and host not in _LOCAL:
        _tell(f"{event} {where!r}")
_tell("listening")
sys.addaudithook(_hear)
"""
JOURNEY = """
import socket, sys
import lora_dpo
config, to, merge = sys.argv[1:]
run = lora_dpo.train(config)
lora_dpo.evaluate(run)
lora_dpo.export(run, to, merge=bool(merge))
socket.getaddrinfo("192.0.2.1", 9)  # what hears nothing hears this
"""


@pytest.mark.parametrize("merge", ["", pytest.param("merge", marks=pytest.mark.slow)])
def test_a_whole_journey_asks_no_other_machine_for_anything(
    quickstart_model: Path, tmp_path: Path, merge: str
) -> None:
    """Train, evaluate and export the bundled model in a process of its own, and in what that starts.

    It may go online, and none of the libraries is told to be silent.
    """
    (tmp_path / "ears").mkdir()
    (tmp_path / "ears" / "sitecustomize.py").write_text(HEARING)
    data = quickstart_model.parent / "data" / "train.jsonl"
    rows = data.read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    values = _values(quickstart_model, tmp_path / "rows.jsonl", tmp_path / "run", max_steps=1)
    values["data"]["max_length"] = 256
    values["train"] |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    silent = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DO_NOT_TRACK")
    silent += ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY")
    own = {name: value for name, value in os.environ.items() if name not in silent}
    path = os.pathsep.join([str(tmp_path / "ears"), str(PACKAGE.parent)])
    own |= {"PYTHONPATH": path, "HEARD": str(tmp_path / "heard"), "HF_HOME": str(tmp_path / "hf")}
    own["LORA_DPO_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", JOURNEY, str(tmp_path / "config.yaml"), str(tmp_path / "out")]
    command.append(merge)
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / MANIFEST).is_file()
    heard = (tmp_path / "heard").read_text().splitlines()
    # of a merge, the fresh process that loads it too
    assert heard.count("listening") >= (2 if merge else 1)
    assert [line for line in heard if line != "listening"] == ["socket.getaddrinfo '192.0.2.1'"]
