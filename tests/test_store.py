"""A folder is whole or not there; a manifest notices every change; a lock holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dpo.errors import OutputError
from lora_dpo.journal import open_journal
from lora_dpo.lines import lines_until, whole_lines
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


def test_a_manifest_notices_every_flipped_bit_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"abcdef")
    write_manifest(tmp_path, {"step": 3})
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (1, 32):  # of letters: another one, and the other case
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(OutputError):
                read_manifest(tmp_path)
    path.write_bytes(content)
    assert read_manifest(tmp_path) == {"step": 3}


def test_files_are_on_the_disk_before_the_manifest_that_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power leaves is what was synced: seen from outside, as the system is asked."""
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def renamed(source: str, target: Path) -> None:
        done.append(f"name {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (folder / name).write_text(name)
    write_manifest(folder)
    named = done.index("name manifest.json")
    assert {"sync a", "sync b", "sync sub", "sync checkpoint"} <= set(done[:named])
    assert done[named - 1].startswith("sync .manifest.json.")  # its own content
    assert done[named + 1 :] == ["sync checkpoint"]  # and its name


_KILLED = """
import os, signal, sys
from pathlib import Path
from lora_dpo import store
target, moment = Path(sys.argv[1]), sys.argv[2]
rename, seen = os.replace, []
def killing(source, to):
    rename(source, to)
    seen.append(to)
    if moment == f"rename {len(seen)}":
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
with store.new_folder(target, overwrite=True) as work:
    (work / "file").write_text("new")
    if moment == "filling":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["filling", "rename 1", "rename 2"])
def test_a_folder_whose_writer_is_killed_is_the_old_one_or_the_new_one(
    tmp_path: Path, moment: str
) -> None:
    """Between its two renames there is none for a moment; the next writer puts the old one back."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(target), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.exists() is (moment != "rename 1")
    with pytest.raises(OutputError, match="not empty"), new_folder(target):
        pass
    assert (target / "file").read_text() == ("new" if moment == "rename 2" else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_work_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as mine:
        (mine / "file").write_text("mine")
        with new_folder(target) as other:
            (other / "file").write_text("other")
        assert (mine / "file").read_text() == "mine"
        for path in target.iterdir():
            path.unlink()  # an empty folder may be replaced
    assert (target / "file").read_text() == "mine"


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


def test_a_line_that_is_damaged_is_told_and_a_torn_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "te')
    assert lines_until(path, 3) == [{"step": 1}]
    assert not caplog.records
    path.write_bytes(b'{"step": 1}\n{"st\x05p": 2}\n{"step": 3}\n')
    assert lines_until(path, 3) == [{"step": 1}, {"step": 3}]
    assert "notes.jsonl: 1 lines that cannot be read are left out" in caplog.text


def test_lines_that_a_killed_process_tore_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(whole_lines(path)) == []
    path.write_bytes(
        b'{"step": 1}\n[1]\n{"loss": 2}\n{"step": 2, "text": "\xc3\xa9"}\n{"step": 3, "te\xc3'
    )
    assert [entry for _, entry in whole_lines(path)] == [{"step": 1}, {"step": 2, "text": "é"}]
