"""An export reaches the hub byte for byte, and comes back as a base; on a hub of loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.handing import push
from tests.conftest import ROOT
from tests.fake_hub import Hub, fake_hub

TOKEN = "hf_thisIsTheSecretOfTheTest"
# one process for all of it: the hub's library reads its settings when it is imported
CALLS = """
import json, sys
from lora_dpo.errors import LoraDpoError
from lora_dpo.handing import push
folder, said = sys.argv[1], []
def call(*names, **options):
    try:
        said.append(str(push(folder, *names, **options)))
    except LoraDpoError as error:
        said.append("error: " + str(error))
call("me/model", private=True)
call("me/model")
call("me/model", overwrite=True)
call("me/fails")
call("me/damaged")
from huggingface_hub import snapshot_download
back = snapshot_download("me/model")
from lora_dpo.config import Config
from lora_dpo.card import base_licence
from lora_dpo.policy import check_base, load_base
from lora_dpo.preparing import load_tokenizer, prepare_data, stop_ids
config = Config.parse({
    "model": {"base": "me/model", "quantisation": "none"},
    "data": {"train": "me/prefs", "max_length": 256, "eval_fraction": 0.1},
    "output": {"dir": "unused"},
})
check_base(config.model)
base = load_base(config.model)
data = prepare_data(config, load_tokenizer(config), "paired")
facts = {
    "name": base.config._name_or_path, "parameters": base.num_parameters(),
    "rows": len(data.train) + len(data.held_out), "stops": stop_ids(config),
    "licence": base_licence("me/model"), "said": said, "back": back,
}
print("FACTS " + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def folder(quickstart_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = Path(shutil.copytree(quickstart_model, tmp_path_factory.mktemp("hub") / "merged"))
    (to / "export_proof.json").write_text("{}")
    (to / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# a model\n")
    (to / ".hidden").write_text("stays here")
    return to


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was said, what the hub has, and the whole output."""
    with fake_hub() as hub:
        rows = (ROOT / "lora_dpo" / "quickstart" / "data" / "heldout.jsonl").read_bytes()
        hub.files["datasets/me/prefs"] = {"data.jsonl": rows}
        hub.fails_for, hub.damages = "me/fails", {"me/damaged": "model.safetensors"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        run = subprocess.run(
            [sys.executable, "-c", CALLS, str(folder)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        line = next(x for x in run.stdout.splitlines() if x.startswith("FACTS "))
        return json.loads(line.removeprefix("FACTS ")), hub, run.stdout + run.stderr


def test_every_byte_arrives_and_comes_back(done: tuple[Any, Hub, str], folder: Path) -> None:
    facts, hub, _ = done
    mine = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".hidden"}
    arrived = {k: v for k, v in hub.files["me/model"].items() if k != ".gitattributes"}
    assert arrived == mine
    for name, content in mine.items():
        assert (Path(facts["back"]) / name).read_bytes() == content
    assert f"{len(mine)} files, each as it is here" in facts["said"][0]
    assert hub.private["me/model"] is True


def test_a_repository_that_holds_a_model_is_replaced_only_when_asked(
    done: tuple[Any, Hub, str],
) -> None:
    said = done[0]["said"]
    assert "holds" in said[1] and "--overwrite" in said[1] and said[1].startswith("error")
    assert "each as it is here" in said[2]


def test_a_failure_leaves_the_folder_and_says_how_to_go_on(
    done: tuple[Any, Hub, str], folder: Path
) -> None:
    said = done[0]["said"]
    assert "is whole and as it was" in said[3]
    assert f"lora-dpo push {folder} me/fails --overwrite" in said[3]  # a part of it may be there
    assert "model.safetensors arrived otherwise than sent" in said[4]
    assert (folder / ".hidden").read_text() == "stays here"


def test_the_token_goes_to_the_hub_and_nowhere_else(
    done: tuple[Any, Hub, str], folder: Path
) -> None:
    facts, hub, output = done
    assert any(key == f"Bearer {TOKEN}" for _, _, key in hub.requests)
    assert TOKEN not in output + json.dumps(facts)
    assert not any(TOKEN.encode() in p.read_bytes() for p in folder.iterdir())


def test_a_base_and_preferences_load_by_their_hub_ids(done: tuple[Any, Hub, str]) -> None:
    facts = done[0]
    assert facts["name"] == "me/model"
    assert facts["parameters"] == 918_656
    assert (facts["rows"], facts["stops"], facts["licence"]) == (240, [3], "apache-2.0")


def test_what_is_no_repository_and_what_is_no_export_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("alone", "a/b/c", "me/..", "me/ space"):
        with pytest.raises(ConfigError, match="push: "):
            push(folder, name)
    with pytest.raises(OutputError, match="holds no export of ours"):
        push(tmp_path, "me/model")
    with pytest.raises(OutputError, match="offline mode is enabled"):  # HF_HUB_OFFLINE of the tests
        push(folder, "me/model")
