"""``doctor``: whether this machine can train, and the fix for whatever is in the way.

Nothing heavy is imported before a check asks for it, and no check can stop the others: a broken
installation is what this is for.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import RenderableType
from rich.text import Text

from lora_dpo.showing import Displayed, hanging

State = Literal["ok", "warns", "blocks"]

# Lowest and newest version that the tests have run with; those of pyproject.toml and constraints.txt.
TESTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.23"),
    "peft": ("0.21", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
    "accelerate": ("1.15", "1.15"),
    "datasets": ("5.2", "5.2"),
}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
GIB = 1024**3
DISK_GIB = (1.0, 20.0)  # blocks below, warns below: a 7B base in 16 bits is some 15 GB
MEMORY_GIB = (1.0, 8.0)


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``warns`` is worth a look, ``blocks`` is in the way; both have a fix."""

    name: str
    state: State
    what: str
    fix: str = ""

    def lines(self) -> list[str]:
        """Return the check for people."""
        mark = {"ok": "ok", "warns": "LOOK", "blocks": "BLOCK"}[self.state]
        return [
            f"{mark:<5}  {self.name}: {self.what}",
            *([f"       fix: {self.fix}"] * bool(self.fix)),
        ]


def shown_checks(checks: Iterable[Check], verdict: str) -> list[RenderableType]:
    """Return checks and the sentence that they come to, for a terminal."""
    styles = {"ok": "green", "warns": "yellow", "blocks": "bold red"}
    parts: list[RenderableType] = []
    for check in checks:
        first, *rest = check.lines()
        parts.append(hanging(first, 7, styles[check.state]))
        parts += [hanging(line, 7) for line in rest]
    return [*parts, Text(verdict, style="bold")]


@dataclass(frozen=True, repr=False)
class Checkup(Displayed):
    """What ``doctor`` found. ``print(checkup)``; in a notebook, its name alone."""

    checks: tuple[Check, ...]

    template: ClassVar[str] = "checkup"

    @property
    def title(self) -> str:
        """The page's."""
        return "lora-dpo doctor"

    @property
    def blocks(self) -> bool:
        """Whether anything is in the way of training."""
        return any(check.state == "blocks" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __repr__(self) -> str:
        states = Counter(check.state for check in self.checks)
        found = ", ".join(f"{states[name]} {name}" for name in ("ok", "warns", "blocks"))
        bad = [check.name for check in self.checks if check.state != "ok"]
        return f"Checkup({found}{': ' if bad else ''}{', '.join(bad)})"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        return shown_checks(self.checks, self.verdict)

    @property
    def verdict(self) -> str:
        """The end of it in one sentence."""
        if self.blocks:
            return "something blocks; mend what is marked BLOCK first"
        return "nothing blocks"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"blocks": self.blocks, "checks": [asdict(check) for check in self.checks]}


def doctor(folder: str | Path = ".") -> Checkup:
    """Look at versions, GPU, 4-bit kernels, disk, memory and known traps.

    Args:
        folder: where runs would be written, for its free disk.
    """
    checks: list[Check] = [_python(), *map(_version, TESTED)]
    checks += _caught("GPU", _gpu)
    checks += _caught("4-bit kernel", _kernel)
    checks += _caught("free disk", lambda: _disks(Path(folder)))
    checks += _caught("free memory", _memory)
    checks += _traps()
    checks += _caught("lora_dpo", _package)
    return Checkup(tuple(checks))


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _version(name: str) -> Check:
    found = installed_version(name)
    low, high = TESTED[name]
    fix = f"pip install '{name}>={low},<={high}.99'"
    if found is None:
        return Check(name, "blocks", "not installed", fix)
    if _numbers(found) < _numbers(low):
        return Check(name, "blocks", f"{found}, and {low} is the oldest that works", fix)
    if _numbers(found)[0] > _numbers(high)[0]:
        return Check(
            name, "blocks", f"{found}: a major version above {high}, the newest tested", fix
        )
    if _numbers(found) > _numbers(high):
        what = f"{found}, newer than {high}, the newest tested"
        return Check(name, "warns", what, f"{fix}, if something fails")
    return Check(name, "ok", found)


def _numbers(text: str) -> tuple[int, ...]:
    """Return major and minor of a version."""
    from packaging.version import Version

    found = Version(text)
    return found.major, found.minor


def _caught(name: str, look: Callable[[], Any]) -> list[Check]:
    """Run one check; whatever it raises is a finding."""
    try:
        return list(look())
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        fix = "install again: pip install --force-reinstall --no-deps lora-dpo and what it names"
        return [Check(name, "blocks", what, fix)]


def _gpu() -> Iterator[Check]:
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        yield _without_gpu(torch, _nvidia_driver())
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (facts.major, facts.minor)
        what = (
            f"{facts.name}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), compute capability "
            f"{facts.major}.{facts.minor}, CUDA {torch.version.cuda or torch.version.hip}"
        )
        name = f"GPU {index}"
        if torch.version.hip is None and capability < (6, 0):
            fix = "use another GPU, or set model.quantisation: none"
            yield Check(name, "blocks", f"{what}: too old for 4-bit kernels (6.0)", fix)
        elif free < total / 2:
            yield Check(
                name, "warns", what, "see with nvidia-smi what holds its memory, and end it"
            )
        else:
            yield Check(name, "ok", what)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Check("dtype", "ok", "bfloat16 (and float16, float32)")
    else:
        fix = "nothing to do: model.compute_dtype auto takes float16 here"
        yield Check("dtype", "warns", "no bfloat16 on this GPU", fix)


def _without_gpu(torch: Any, driver: str) -> Check:
    if not driver:
        what = "none found; on the CPU, in float32, small models alone are trained in time"
        return Check("GPU", "ok", what)
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return Check(
            "GPU",
            "blocks",
            f"an NVIDIA driver is there ({driver}), and torch {torch.__version__} is built for the "
            "CPU alone",
            "install a CUDA build of torch: choose it at pytorch.org/get-started (pip install torch "
            "--index-url with a cu... index)",
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip(" -1"):
        what = f"an NVIDIA driver is there, and CUDA_VISIBLE_DEVICES is {hidden!r}: no GPU is shown"
        return Check("GPU", "blocks", what, "unset CUDA_VISIBLE_DEVICES, or give it a number")
    return Check(
        "GPU",
        "blocks",
        f"an NVIDIA driver is there ({driver}), and torch {torch.__version__} finds no GPU",
        "see whether nvidia-smi works; update the driver, or install a torch for an older CUDA",
    )


def _nvidia_driver() -> str:
    """Return where an NVIDIA driver shows itself, or nothing."""
    loaded = Path("/proc/driver/nvidia/version")
    if loaded.is_file():
        return str(loaded)
    return shutil.which("nvidia-smi") or ""


def _kernel() -> Iterator[Check]:
    from lora_dpo.policy.kernels import nf4_layer_error, nf4_round_trip

    error, gradient = nf4_round_trip(), nf4_layer_error()
    what = (
        f"a random weight comes back from NF4 with a relative error of {error:.3f} (0.09 is right); "
        f"a layer's gradient after an evaluation is off by {gradient:.2g}"
    )
    if 0.05 < error < 0.15 and gradient < 0.02:
        yield Check("4-bit kernel", "ok", what)
    else:
        fix = "install bitsandbytes again: pip install --force-reinstall --no-deps bitsandbytes"
        yield Check("4-bit kernel", "blocks", what, fix)


def _disks(folder: Path) -> Iterator[Check]:
    """Look at the disks of runs, of downloaded models and of temporary files, each disk once."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    seen = set()
    for what, place in (("runs", folder), ("models", hub)):
        there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        if there.stat().st_dev in seen:
            continue
        seen.add(there.stat().st_dev)
        fix = "free some" if what == "runs" else "free some, or set HF_HOME to a folder elsewhere"
        free = shutil.disk_usage(there).free / GIB
        yield _amount("free disk", free, DISK_GIB, f"where {what} are written, {there}", fix)
        if not os.access(there, os.W_OK):
            yield Check("free disk", "blocks", f"{there} may not be written to", "choose another")


def free_memory() -> int:
    """Return the bytes of memory that this machine or container has left."""
    psutil: Any = importlib.import_module("psutil")
    free = int(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
    return free


def _memory() -> Iterator[Check]:
    free = free_memory()
    fix = "end other programs; loading a base takes some 6 GiB for 7 billion parameters in shards"
    yield _amount("free memory", free / GIB, MEMORY_GIB, "of this machine or container", fix)


def _amount(name: str, found: float, least: tuple[float, float], of: str, fix: str) -> Check:
    state: State = "blocks" if found < least[0] else "warns" if found < least[1] else "ok"
    return Check(name, state, f"{found:.1f} GiB {of}", fix if state != "ok" else "")


def _traps() -> Iterator[Check]:
    yield _spinning_threads()
    offline = [
        name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "on", "yes")
    ]
    if offline:
        what = f"{', '.join(offline)} set: hub ids load only from the cache"
        yield Check("offline", "warns", what, f"unset {' '.join(offline)}, unless that is meant")
    else:
        yield Check("offline", "ok", "hub ids may be fetched")
    yield from _caught("AVX512-BF16", _repacking)


def _spinning_threads() -> Check:
    policy, block = (os.environ.get(name, "") for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"))
    fix = "export OMP_WAIT_POLICY=PASSIVE KMP_BLOCKTIME=0 before Python starts"
    given = f"OMP_WAIT_POLICY={policy or 'unset'}, KMP_BLOCKTIME={block or 'unset'}"
    if policy.upper() == "PASSIVE" and block in ("", "0"):
        return Check("threads", "ok", f"{given}: they sleep while they wait")
    what = f"{given}: threads wait by spinning, many times slower on a CPU that is shared"
    return Check("threads", "warns", what, f"{fix} (the command lora-dpo does so itself if unset)")


def _repacking() -> Iterator[Check]:
    has: Any = importlib.import_module("lora_dpo.policy.kernels").repacks_on_cpu
    if not has():
        yield Check("AVX512-BF16", "ok", "this CPU does not repack 4-bit weights")
        return
    what = (
        "bitsandbytes repacks 4-bit weights on this CPU at the first evaluation, and gradients and "
        "merges are wrong afterwards; bases that lora_dpo loads are guarded, and so was the layer "
        "of the 4-bit kernel above"
    )
    fix = "for a model of your own: load_policy(...), or support_avx512bf16_for_cpu = False on each Linear4bit"
    yield Check("AVX512-BF16", "warns", what, fix)


def _package() -> Iterator[Check]:
    """Import everything that a run imports."""
    importlib.import_module("lora_dpo.run")
    found = importlib.import_module("lora_dpo").__version__
    yield Check("lora_dpo", "ok", f"{found}, and all of it imports")
