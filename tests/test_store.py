"""A folder is whole or not there; a manifest notices every change; a lock holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dpo.errors import OutputError
from lora_dpo.journal import open_journal
from lora_dpo.store import (
    fingerprint,
    lock,
    new_folder,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)


def test_a_broken_off_folder_leaves_nothing_and_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target) as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as work:
        (work / "file").write_text("old")
    with pytest.raises(OutputError, match="not empty"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True) as work:
        raise RuntimeError
    assert (target / "file").read_text() == "old"
    with new_folder(target, overwrite=True) as work:
        (work / "other").write_text("new")
    assert [p.name for p in target.iterdir()] == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_a_manifest_notices_every_change(tmp_path: Path, damage: str) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "data"
    path.write_bytes(b"abcdef")
    write_manifest(tmp_path, {"step": 3})
    assert read_manifest(tmp_path) == {"step": 3}
    if damage == "flip":
        path.write_bytes(b"abcdeg")
    elif damage == "truncate":
        path.write_bytes(b"abc")
    elif damage == "remove":
        path.unlink()
    else:
        (tmp_path / "manifest.json").unlink()
    with pytest.raises(OutputError):
        read_manifest(tmp_path)


def test_fingerprints_do_not_depend_on_the_order_of_keys_and_do_on_values() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})


def test_a_journal_leaves_a_file_that_is_not_its_own_as_it_is(tmp_path: Path) -> None:
    path, head = tmp_path / "mine.drawn.jsonl", {"drawn_by": "us", "k": 4}
    first = (json.dumps(head) + "\n").encode()
    for mine in (b'{"prompt": "a"}\n{"prompt": "b"}', b'{"prompt": "a"}', first + b"no json\n{"):
        path.write_bytes(mine)
        with pytest.raises(OutputError), open_journal(path, head):
            pass
        assert path.read_bytes() == mine
    for torn in (b"", first[:9], first[:-1], first, first + b'{"dra'):
        path.write_bytes(torn)
        with open_journal(path, head) as journal:
            assert journal.lines == []
        assert path.read_bytes() == first


def test_broken_json_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    assert read_json(tmp_path / "a.json") == {"é": 1}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(OutputError, match=r"b\.json: not readable as JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(OutputError, match=r"c\.json: no such file"):
        read_json(tmp_path / "c.json")


def test_a_second_process_does_not_get_a_folder_that_is_held(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_dpo.store import lock\n"
        "with lock(Path(sys.argv[1])): print('held')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with lock(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is writing here" in second.stderr
    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert third.stdout == "held\n"
