"""What is handed on is held against its checksums before it is used; a stranger's folder is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import lora_dpo
from lora_dpo.config import Config, ModelConfig
from lora_dpo.errors import OutputError
from lora_dpo.exporting import export_merged
from lora_dpo.handing import export, push, smoke, write_gguf
from lora_dpo.policy import load_base, load_policy, save_adapter
from lora_dpo.reproducing import reproduce
from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.sealing import check_seal, seal
from lora_dpo.store import MANIFEST, fingerprint, read_manifest, write_json

WEIGHTS = "adapter_model.safetensors"


def flip(path: Path) -> None:
    """Change the last bit of a file: of a weight, in safetensors, which load all the same."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Two steps from a starting adapter, which is the reference."""
    folder = tmp_path_factory.mktemp("sealed")
    save_adapter(load_policy(tiny_model), folder / "start")
    data = folder / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    values = {
        "model": {"base": str(tiny_model), "adapter": str(folder / "start")},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_length": 128},
        "train": {"max_steps": 2, "save_steps": 100, "use_cpu": True, "learning_rate": 0.01},
        "output": {"dir": str(folder / "run"), "diagnose": False, "samples": 0},
    }
    return train(Config.parse(values))


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(run.folder, tmp_path / "run"))


USES: dict[str, Callable[[Run, Path], Any]] = {
    "eval": lambda run, to: lora_dpo.evaluate(run),
    "compare": lambda run, to: lora_dpo.compare([run], max_new_tokens=1, limit=1),
    "export": lambda run, to: export(run, to / "out"),
    "merge": lambda run, to: export(run, to / "out", merge=True),
    "generate": lambda run, to: lora_dpo.generate(run, ["a"], max_new_tokens=1),
    "reproduce": lambda run, to: reproduce(run, to=to / "again"),
    "start": lambda run, to: load_policy(run.config.model.base, adapter=run.folder),
}


@pytest.mark.parametrize("use", USES)
def test_a_flipped_bit_in_an_adapter_is_one_error_that_names_the_file(
    copied: Run, tmp_path: Path, use: str
) -> None:
    flip(copied.folder / "adapter" / WEIGHTS)
    with pytest.raises(OutputError, match=rf"adapter/{WEIGHTS}: not what was written"):
        USES[use](copied, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # and nothing is left behind


def test_so_is_one_in_the_settings_or_in_the_reference(copied: Run) -> None:
    before = (copied.folder / "adapter" / "adapter_config.json").read_text()
    path = copied.folder / "adapter" / "adapter_config.json"
    path.write_text(re.sub(r'"lora_alpha": \d+', '"lora_alpha": 7', before))
    assert path.read_text() != before
    with pytest.raises(OutputError, match=r"adapter_config\.json: not what was written"):
        copied.load_policy()
    path.write_text(before)
    copied.load_policy()
    flip(copied.folder / "reference" / WEIGHTS)
    with pytest.raises(OutputError, match=rf"reference/{WEIGHTS}: not what was written"):
        copied.load_policy()


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_is_held_against_its_manifest_wherever_it_is_read(
    run: Run, tiny_model: Path, tmp_path: Path, merge: bool
) -> None:
    folder = tmp_path / "out"
    if merge:  # as export does, less the fresh process that loads it
        rows = [run.proof_rows().rows[i] for i in range(2)]
        sequences = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
        export_merged(run.load_policy, run.tokenizer(), folder, sequences=sequences)
    else:
        export(run, folder)
    read_manifest(folder)  # the format is the one of checkpoints
    base = None if merge else tiny_model
    found = smoke(folder, base=base)
    assert (found.checks[0].name, found.checks[0].state) == ("files", "ok")
    (folder / "README.md").write_text("what its owner says of it")  # no seal on what people write
    assert check_seal(folder)
    if merge:
        AutoModelForCausalLM.from_pretrained(folder)  # to others the manifest is nothing
        load_base(ModelConfig(base=str(folder), quantisation="none"))
    else:
        load_policy(tiny_model, adapter=folder)
    name = "model.safetensors" if merge else WEIGHTS
    flip(folder / name)
    told = f"{name}: not what was written"
    with pytest.raises(OutputError, match=told):
        push(folder, "me/model")
    broken = smoke(folder, base=base)
    assert not broken.passed and told in broken.checks[0].what
    with pytest.raises(OutputError, match=told):
        if merge:
            load_base(ModelConfig(base=str(folder), quantisation="none"))
        else:
            load_policy(tiny_model, adapter=folder)
    if merge:
        with pytest.raises(OutputError, match=told):
            write_gguf(folder)


def test_a_folder_without_a_manifest_of_ours_is_read_as_it_is(
    tiny_model: Path, tmp_path: Path
) -> None:
    save_adapter(load_policy(tiny_model), tmp_path / "theirs")
    flip(tmp_path / "theirs" / WEIGHTS)
    for text in (None, "[1]", '{"name": "a page of the web", "icons": []}'):
        if text is not None:
            (tmp_path / "theirs" / MANIFEST).write_text(text)
        assert not check_seal(tmp_path / "theirs")
        load_policy(tiny_model, adapter=tmp_path / "theirs")


def test_a_manifest_that_is_damaged_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("weights")
    (tmp_path / "README.md").write_text("card")
    seal(tmp_path, "adapter")
    assert check_seal(tmp_path)
    path = tmp_path / MANIFEST
    whole = path.read_text()
    assert "README" not in whole
    for text in (whole[:-10], whole.replace('"bytes": 7', '"bytes": 8')):
        path.write_text(text)
        with pytest.raises(OutputError, match=rf"{MANIFEST}: .*delete {MANIFEST} there"):
            check_seal(tmp_path)
    path.write_text(whole)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(OutputError, match=r"a\.safetensors: missing"):
        check_seal(tmp_path)
    content = {"facts": {}, "files": {"../x": {"bytes": 0, "sha256": ""}}}
    write_json(path, {**content, "sha256": fingerprint(content)})
    with pytest.raises(OutputError, match="lies outside of"):
        check_seal(tmp_path)
