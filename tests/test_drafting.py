"""``init``: what it writes is explained line by line, loads, fits, and trains; nothing is overwritten."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.cli.asking import Wishes, completed
from lora_dpo.config import Config
from lora_dpo.config.comments import COMMENTS
from lora_dpo.drafting import Draft, commented, init_config
from lora_dpo.errors import ConfigError, DataError, OutputError
from lora_dpo.planning import plan
from lora_dpo.run import train

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DATA = ROOT / "lora_dpo" / "quickstart" / "data"
LINE = re.compile(r"  (\w+): (.*?) +# (.*)")


def _comments(text: str) -> dict[str, str]:
    found, section = {}, ""
    for line in text.splitlines():
        if match := re.match(r"(\w+):$", line):
            section = match[1]
        elif match := LINE.match(line):
            found[f"{section}.{match[1]}"] = match[3]
    return found


@pytest.fixture(scope="module")
def tailed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pairs of the bundled model's: most short, fifteen of twice the length, one of far more."""
    path = tmp_path_factory.mktemp("tailed") / "pairs.jsonl"
    rows = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()[:200]]
    for i, times in [*((i, 8) for i in range(15)), (15, 60)]:
        turn = rows[i]["prompt"][-1]
        turn["content"] = " ".join([turn["content"]] * times)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def draft(quickstart_model: Path, tailed: Path) -> Draft:
    return init_config(quickstart_model, tailed, gpu="2GiB")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_yamls_carry_the_comments_that_init_writes(path: Path) -> None:
    found = _comments(path.read_text())
    assert found
    for where, comment in found.items():
        assert comment.startswith(COMMENTS[where]), where


def test_every_line_is_explained_and_the_text_is_the_config(draft: Draft, tmp_path: Path) -> None:
    lines = [line for line in draft.text.splitlines() if line.startswith("  ")]
    assert len(_comments(draft.text)) == len(lines) > 30
    for where, comment in _comments(draft.text).items():
        assert comment.startswith(COMMENTS[where]), where
    path = draft.write(tmp_path / "my.yaml")
    assert Config.load(path) == draft.config
    assert max(map(len, draft.text.splitlines())) < 200


def test_it_fits_by_the_planners_word_and_trains(draft: Draft, tmp_path: Path) -> None:
    """The plan of the file is the plan that chose: same rows, same batches, same peak."""
    path = draft.write(tmp_path / "my.yaml")
    changes = ["data.eval_fraction=0"]  # init plans with every row
    again = plan(Config.load(path, changes), gpu="2GiB")
    assert again.fits and again.peak == draft.plan.peak
    short = [f"output.dir={tmp_path / 'run'}", "train.max_steps=2", "output.diagnose=false"]
    short += ["data.eval_fraction=0", "train.use_cpu=true"]
    run = train(Config.load(path, short))
    assert run.results["steps"] == 2


def test_a_long_tail_is_left_out_and_short_rows_share_the_room_of_the_longest(
    draft: Draft,
) -> None:
    """One row of 200 is far longer than all others; fifteen more are twice the median and above."""
    lengths, settings = draft.plan.lengths, draft.config.train
    assert lengths.rows == 199 and lengths.longest > 2 * lengths.median
    assert draft.config.data.max_length == 64 * -(-lengths.longest // 64)
    comment = _comments(draft.text)["data.max_length"]
    assert "holds 99.5 % of the rows whole; the longest has" in comment
    assert int(comment.split()[-1]) > 2 * lengths.longest
    assert settings.max_tokens_per_batch and settings.max_tokens_per_batch >= 2 * lengths.longest
    step = settings.further
    assert step["per_device_train_batch_size"] * step["gradient_accumulation_steps"] == 8


def test_what_the_user_sets_is_kept_and_the_objective_follows_the_kind_of_rows(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["train.per_device_train_batch_size=3", "data.max_length=60", "lora.rank=2"]
    changes += ["train.learning_rate=3e-3", "output.dir=elsewhere", "train.engine=plain"]
    found = init_config(tiny_model, data, overrides=changes).config
    assert found.objective.to_dict() == {"name": "sft_demonstrations"}
    assert found.train.further["per_device_train_batch_size"] == 3
    assert (found.data.max_length, found.lora.rank, found.output.dir) == (60, 2, "elsewhere")
    assert float(found.train.further["learning_rate"]) == 3e-3
    with pytest.raises(DataError, match="lora-dpo sft"):
        init_config(tiny_model, data, objective="dpo")
    with pytest.raises(ConfigError, match="here it is dpo"):
        init_config(tiny_model, data, objective="sigmoid")
    with pytest.raises(ConfigError, match=r"lora\.rnk: unknown key"):
        init_config(tiny_model, data, overrides=["lora.rnk=2"])


def test_chats_for_a_base_without_a_template_are_an_error_that_names_the_setting(
    tiny_model: Path,
) -> None:
    with pytest.raises(DataError, match=r"no chat template. Set data.chat_template"):
        init_config(tiny_model, DATA / "heldout.jsonl")


def test_what_fits_at_no_setting_is_refused_with_the_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}\n')
    changes = ["train.memory_budget_gib=0.0001", "train.engine=plain"]
    changes += ["model.embeddings_on_cpu=false", "train.per_device_train_batch_size=1"]
    with pytest.raises(
        ConfigError, match=r"nothing that was tried fits.*GiB of 0\.00, .* before the first row"
    ):
        init_config(tiny_model, data, overrides=changes)


def test_hostile_names_stay_one_value_on_one_line() -> None:
    names = ["a: b # c", "x\ny: 1", "'\"", "- z", "{q}", "null", "1e5", "‮txt"]
    for name in names:
        text = commented({"model": {"base": name}}, header=[f"of {name}"])
        assert yaml.safe_load(text) == {"model": {"base": name}}
        assert len(text.splitlines()) == 3


def test_nothing_is_overwritten_without_being_asked_and_missing_flags_are_named(
    quickstart_model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    words = ["--model", str(quickstart_model), "--data", str(DATA / "heldout.jsonl")]
    refused = CliRunner().invoke(app, ["init", *words, "--to", str(target)])
    assert refused.exit_code == 1 and "exists already" in refused.output
    assert target.read_text() == "mine"
    nothing = CliRunner().invoke(app, ["init"])
    assert nothing.exit_code == 1 and "--model and --data missing" in nothing.output
    with pytest.raises(OutputError, match="exists already"):
        Draft(None, "new", None, ()).write(target)  # type: ignore[arg-type]
    assert Draft(None, "new", None, ()).write(target, overwrite=True).read_text() == "new"  # type: ignore[arg-type]


def test_on_a_terminal_it_asks_for_what_was_not_given(tmp_path: Path) -> None:
    """A real terminal of the operating system's, and a typist."""
    answers = {
        "Base model": "some/model", "Preferences": "a.jsonl", "Held-out": "", "Objective": "ipo",
        "Write to": str(tmp_path / "asked.yaml"),
    }  # fmt: skip
    ours, theirs = pty.openpty()
    code = "from lora_dpo.cli.asking import Wishes, completed;"
    code += "print(completed(Wishes(None, None, gpu='2GiB'), overwrite=False))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    shown = _typed(ours, answers)
    assert process.wait(60) == 0, shown
    assert "model='some/model', data='a.jsonl', objective='ipo', held_out=None, gpu='2GiB'" in shown
    assert "Card" not in shown  # it was given
    assert str(tmp_path / "asked.yaml") in shown.splitlines()[-1]


def test_with_json_nothing_is_asked_on_a_terminal_and_the_output_is_json_alone(
    quickstart_model: Path, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "lora_dpo", "init", "--json"]
    given = ["--model", str(quickstart_model), "--data", str(DATA / "heldout.jsonl")]
    given += ["--gpu", "2GiB", "--to", str(tmp_path / "new.yaml")]
    done = subprocess.run([*words, *given], stdin=theirs, capture_output=True, check=True)
    os.close(ours)
    os.close(theirs)
    assert json.loads(done.stdout)["text"] == (tmp_path / "new.yaml").read_text()
    with pytest.raises(ConfigError, match="nothing is asked with --json"):
        completed(Wishes(None, None), overwrite=False, asks=False)


def _typed(terminal: int, answers: dict[str, str]) -> str:
    """Answer each question as it appears, and return all that was shown."""
    shown, seen, waiting = "", 0, dict(answers)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end has closed
            break
        if not piece:
            break
        shown += piece.decode(errors="replace")
        question = next((q for q in waiting if q in shown[seen:] and ":" in shown[seen:]), None)
        if question and re.search(r":\s*$", shown):
            os.write(terminal, f"{waiting.pop(question)}\n".encode())
            seen = len(shown)
    assert not waiting, shown
    return shown


def test_as_json_it_is_the_same_draft(draft: Draft) -> None:
    found: dict[str, Any] = json.loads(json.dumps(draft.to_dict()))
    assert found["text"] == draft.text and found["plan"]["fits"] is True
    assert "dpo on" in repr(draft) and "data: 200 rows read" in str(draft)
    assert "<pre" in draft._repr_html_()
