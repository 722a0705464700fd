"""``doctor``: a planted trap is found and its fix is named; what is well is said to be well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_dpo
from lora_dpo import checkup, doctor
from lora_dpo.checkup import GIB, TESTED, Check, Checkup, State
from lora_dpo.policy import kernels
from tests.browsing import HOSTILE, check_strangers_stay_text

ROOT = Path(__file__).parents[1]


@pytest.fixture
def well(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without traps, whatever the one that runs the tests has."""
    for name in (*checkup.OFFLINE, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    monkeypatch.setattr(checkup, "_nvidia_driver", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "repacks_on_cpu", lambda: False)
    disk = SimpleNamespace(free=100 * GIB)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: disk)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(checkup, "MEMORY_GIB", (0.0, 0.0))  # a container's limit is real
    return monkeypatch


def test_a_machine_without_traps_is_well(well: pytest.MonkeyPatch) -> None:
    found = doctor()
    assert {check.state for check in found.checks} == {"ok"}, str(found)
    assert not found.blocks and found.verdict == "nothing blocks"
    names = [check.name for check in found.checks]
    assert names[:7] == ["python", *TESTED] and names[-1] == "lora_dpo"
    assert repr(found) == f"Checkup({len(names)} ok, 0 warns, 0 blocks)"
    assert lora_dpo.__version__ in found["lora_dpo"].what


def _versions(well: pytest.MonkeyPatch, **planted: str | None) -> None:
    real = checkup.installed_version
    well.setattr(checkup, "installed_version", lambda n: planted[n] if n in planted else real(n))


def _shown(free: int, total: int, capability: tuple[int, int]) -> dict[str, Any]:
    major, minor = capability
    facts = SimpleNamespace(name="Card", major=major, minor=minor)
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _: facts,
        "mem_get_info": lambda _: (free * GIB, total * GIB),
        "is_bf16_supported": lambda including_emulation: capability >= (8, 0),
    }


def _card(well: pytest.MonkeyPatch, *facts: Any) -> None:
    for name, value in _shown(*facts).items():
        well.setattr(torch.cuda, name, value)


def _disk(well: pytest.MonkeyPatch, gib: float) -> None:
    well.setattr(checkup.shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * GIB))


def _driver(well: pytest.MonkeyPatch, cuda: str | None) -> None:
    well.setattr(checkup, "_nvidia_driver", lambda: "/proc/driver/nvidia/version")
    well.setattr(torch.version, "cuda", cuda)


def _memory(well: pytest.MonkeyPatch, gib: float) -> None:
    well.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=gib * GIB))
    well.setattr(checkup, "MEMORY_GIB", (1.0, 8.0))


PLANTED: dict[str, tuple[Any, str, str, str]] = {
    "threads that spin": (
        lambda m: m.setenv("OMP_WAIT_POLICY", "active"),
        "threads", "warns", "OMP_WAIT_POLICY=PASSIVE",
    ),
    "threads with no word about waiting": (
        lambda m: m.delenv("OMP_WAIT_POLICY"), "threads", "warns", "OMP_WAIT_POLICY=PASSIVE",
    ),
    "threads that spin for a while": (
        lambda m: m.setenv("KMP_BLOCKTIME", "200"), "threads", "warns", "KMP_BLOCKTIME=0",
    ),
    "offline": (
        lambda m: m.setenv("TRANSFORMERS_OFFLINE", "1"), "offline", "warns", "unset TRANSFORMERS_OFFLINE",
    ),
    "old transformers": (
        lambda m: _versions(m, transformers="4.57.1"), "transformers", "blocks", "transformers>=5.17",
    ),
    "next major of transformers": (
        lambda m: _versions(m, transformers="6.0"), "transformers", "blocks", "<=5.23",
    ),
    "untested peft": (lambda m: _versions(m, peft="0.99"), "peft", "warns", "peft>=0.21"),
    "no bitsandbytes": (
        lambda m: _versions(m, bitsandbytes=None), "bitsandbytes", "blocks", "pip install",
    ),
    "torch for the CPU beside a driver": (
        lambda m: _driver(m, None), "GPU", "blocks", "CUDA build of torch",
    ),
    "torch for a newer driver": (lambda m: _driver(m, "13.0"), "GPU", "blocks", "update the driver"),
    "a hidden GPU": (
        lambda m: (_driver(m, "13.0"), m.setenv("CUDA_VISIBLE_DEVICES", "")),
        "GPU", "blocks", "unset CUDA_VISIBLE_DEVICES",
    ),
    "an old GPU": (
        lambda m: _card(m, 10, 11, (5, 2)), "GPU 0", "blocks", "model.quantisation: none",
    ),
    "a GPU in use": (lambda m: _card(m, 2, 24, (8, 9)), "GPU 0", "warns", "nvidia-smi"),
    "a GPU without bfloat16": (
        lambda m: _card(m, 15, 16, (7, 5)), "dtype", "warns", "float16",
    ),
    "wrong 4-bit kernel": (
        lambda m: m.setattr(kernels, "nf4_round_trip", lambda: 1.3),
        "4-bit kernel", "blocks", "bitsandbytes again",
    ),
    "wrong gradients": (
        lambda m: m.setattr(kernels, "nf4_layer_error", lambda: 0.6),
        "4-bit kernel", "blocks", "bitsandbytes again",
    ),
    "repacked weights": (
        lambda m: m.setattr(kernels, "repacks_on_cpu", lambda: True),
        "AVX512-BF16", "warns", "support_avx512bf16_for_cpu = False",
    ),
    "little disk": (lambda m: _disk(m, 5), "free disk", "warns", "free some"),
    "no disk": (lambda m: _disk(m, 0.2), "free disk", "blocks", "free some"),
    "little memory": (lambda m: _memory(m, 4), "free memory", "warns", "end other programs"),
    "no memory": (lambda m: _memory(m, 0.5), "free memory", "blocks", "end other programs"),
    "a package that does not import": (
        lambda m: m.setitem(sys.modules, "lora_dpo.run", None), "lora_dpo", "blocks", "install again",
    ),
    "a library that raises": (
        lambda m: m.setattr(kernels, "nf4_round_trip", lambda: 1 / 0),
        "4-bit kernel", "blocks", "install again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("trap", PLANTED)
def test_a_planted_trap_is_found_and_its_fix_named(trap: str, well: pytest.MonkeyPatch) -> None:
    plant, name, state, fix = PLANTED[trap]
    if trap != "wrong 4-bit kernel":  # the real one on the CPU, where a card is only pretended
        well.setattr(kernels, "default_device", lambda: torch.device("cpu"))
    plant(well)
    found = doctor()
    check = found[name]
    assert check.state == state and fix in check.fix, check
    assert found.blocks is (state == "blocks")
    shown = " ".join(str(found).split())
    assert " ".join(f"fix: {check.fix}".split()) in shown
    others = {c.name for c in found.checks if c.state != "ok"} - {name}
    assert others <= {"dtype"}, str(found)


def test_a_real_weight_comes_back_from_nf4_with_its_known_error() -> None:
    """16 levels fitted to a normal distribution in blocks of 64: some 9 % of its deviation."""
    assert kernels.nf4_round_trip(torch.device("cpu")) == pytest.approx(0.0925, abs=0.005)
    assert kernels.nf4_layer_error(torch.device("cpu")) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_of_the_gpu_are_right() -> None:
    assert kernels.nf4_round_trip() == pytest.approx(0.0925, abs=0.005)
    assert kernels.nf4_layer_error() < 0.02


def test_the_tested_versions_are_those_of_the_project_and_of_the_pins() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted)  # type: ignore[union-attr]
    pins = (ROOT / "constraints.txt").read_text()
    newest = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", pins, re.MULTILINE))
    assert {name: (lowest[name], newest[name]) for name in TESTED} == TESTED


def test_a_checkup_is_shown_in_a_notebook_with_every_string_as_text() -> None:
    found = Checkup((Check("disk", "blocks", "<script>x</script> \x1b[2J", "[red]free[/red]"),))
    html = found._repr_html_()
    assert "&lt;script&gt;" in html and "<script" not in html and "\x1b" not in html
    assert "[red]free[/red]" in html and "[red]free[/red]" in str(found)
    assert "BLOCK  disk: <script>x</script> ⟨ESC⟩[2J" in str(found)
    assert repr(found) == "Checkup(0 ok, 0 warns, 1 blocks: disk)"


def test_strangers_strings_stay_text_in_a_browser(tmp_path: Path) -> None:
    """What a driver or a package says of itself is no more trusted than data."""
    states: tuple[State, ...] = ("ok", "warns", "blocks")
    found = Checkup(tuple(Check(HOSTILE, state, HOSTILE, "w" * 300) for state in states))
    found.write_html(tmp_path / "doctor.html")
    check_strangers_stay_text(tmp_path / "doctor.html", times=6)


def test_the_command_exits_with_1_only_if_something_blocks() -> None:
    """With a torch that cannot be imported nothing crashes: it is what the command is for."""
    command = [sys.executable, "-m", "lora_dpo", "doctor", "--json"]
    well = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(well.stdout)
    assert well.returncode == int(found["blocks"]) and found["checks"][0]["name"] == "python"
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["4-bit kernel"] == states["lora_dpo"] == states["threads"] == "ok"
    broken = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['lora-dpo', 'doctor'];"
        "from lora_dpo.cli import main; main()"
    )
    ill = subprocess.run(
        [sys.executable, "-c", broken], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ill.returncode == 1 and "Traceback" not in ill.stderr
    assert "BLOCK  lora_dpo:" in ill.stdout and "LOOK   offline: HF_HUB_OFFLINE" in ill.stdout
    assert "fix: unset HF_HUB_OFFLINE" in ill.stdout and "something blocks" in ill.stdout
