"""One timed training run in a process of its own; ``compare_trl.py`` starts it, not you.

python benchmarks/one_run.py SPEC.json RESULT.json
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import profiling
import shapes
import sides
import telling

GIB = 1024**3


def cpu_seconds() -> float:
    """Return user and system seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(
        f"/proc/self/status has no {key}; memory on the CPU is measured on Linux alone."
    )


class Meter:
    """Wall and CPU seconds of every optimiser step, and the peak memory of the training."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.resets = True
        self.began = self._last = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        """Return wall and CPU seconds, when all work of the device is done."""
        import torch

        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), cpu_seconds()

    def built(self) -> None:
        """The model is there: what is measured of memory is counted from here."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.resident = torch.cuda.memory_allocated(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        except OSError:
            self.resets = False
        self.resident = _status("VmRSS")

    def begin(self) -> None:
        """Start the first step."""
        self.began = self._last = self.now()

    def step(self) -> None:
        """Count a step."""
        now = self.now()
        self.wall.append(now[0] - self._last[0])
        self.cpu.append(now[1] - self._last[1])
        self._last = now

    def memory(self) -> dict[str, Any]:
        """Return the peak: on CUDA the allocator's, on the CPU resident memory above the model."""
        import torch

        if self.cuda:
            found = {
                "measure": "CUDA allocator",
                "peak": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        else:
            what = "resident above the built model"
            what += "" if self.resets else " (peak of building included: clear_refs not writable)"
            found = {"measure": what, "peak": _status("VmHWM") - self.resident}
        found["after_model"] = self.resident
        return {k: v if isinstance(v, str) else round(v / GIB, 4) for k, v in found.items()}


def timer(meter: Meter) -> Any:
    """Return the callback that both trainers get."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step()

    return Timer()


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what was measured."""
    import datasets  # noqa: F401  (imported before memory is counted, on both sides)
    import torch
    import trl

    import lora_dpo.trainer  # noqa: F401

    _ = trl.DPOTrainer, trl.DPOConfig
    device = torch.device(spec["device"])
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        if cap := spec["mem_cap_gib"]:
            share = cap * GIB / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    torch.manual_seed(spec["seed"])
    pairs = shapes.read_pairs(Path(spec["pairs_file"]))
    meter = Meter(device)
    model = sides.build(spec, device)
    meter.built()
    began = meter.now()
    with tempfile.TemporaryDirectory() as folder:
        side = sides.ours if spec["side"] == "ours" else sides.theirs
        watch = profiling.OneStep(meter, spec["warmup"], spec["rank"]) if spec["profile"] else None
        callbacks = [timer(meter)] if watch is None else [watch.callback()]
        trainer = side(spec, model, pairs, meter, callbacks, folder)
        ready = meter.now()
        with watch.annotated() if watch else nullcontext():
            trainer.train()
    log = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    facts = {"first_loss": log[0], "layout": sides.layout(trainer)}
    if watch is not None:
        return {**facts, "profile": watch.parts()}
    facts["init_s"] = round(ready[0] - began[0], 2)
    # what lies before the first step: of ours the self-check and the longest micro-batch, tried out
    facts["start_s"] = round(meter.began[0] - ready[0], 2)
    return {**timings(spec, trainer, meter, pairs), **facts}


def timings(spec: dict[str, Any], trainer: Any, meter: Meter, pairs: list[Any]) -> dict[str, Any]:
    """Return the rates and the memory of a run; the pass of a stored reference is charged to them."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    per_step, skip = spec["micro"] * spec["accum"], spec["warmup"]
    timed = pairs[skip * per_step :]
    wall, cpu = meter.wall[skip:], meter.cpu[skip:]
    reference = getattr(trainer, "reference_pass", (0.0, 0.0))
    # The pass belongs to all epochs that read it. Ours runs a repeated pair once, so a file that is
    # gone through twice must not halve its price.
    distinct = len({json.dumps(pair) for pair in pairs}) if spec["side"] == "ours" else len(pairs)
    share = len(timed) / distinct / spec["epochs"]
    whole = (sum(wall) + reference[0] * share, sum(cpu) + reference[1] * share)
    result = {
        "pairs_per_s": round(len(timed) / whole[0], 4),
        "cpu_s_per_pair": round(whole[1] / len(timed), 5),
        "tokens_per_s": round(sum(map(shapes.usual_tokens, timed)) / whole[0], 1),
        "step_s": telling.spread(wall),
        "step_cpu_s": telling.spread(cpu),
        "memory_gib": meter.memory(),
        "adapter_dtype": str(trained[0].dtype),
        "adapter_parameters": sum(p.numel() for p in trained),
        "optimiser": optimiser_of(trainer),
    }
    if reference != (0.0, 0.0):
        result["reference_pass"] = {
            "wall_s": round(reference[0], 3),
            "cpu_s": round(reference[1], 3),
            "pairs": distinct,
        }
    if "padding_free" in spec["variant"]:
        result["padding_free_active"] = bool(trainer.padding_free)
    return result


def optimiser_of(trainer: Any) -> str:
    """Return the library, class and bits of an optimiser, without accelerate's wrapper."""
    found = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    bits = getattr(getattr(found, "args", None), "optim_bits", 32)
    return f"{type(found).__module__.partition('.')[0]} {type(found).__name__}, {bits} bits"


def main(spec_file: str, result_file: str) -> None:
    """Run one specification; running out of memory is a result."""
    import torch

    warnings.simplefilter("ignore")
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    try:
        result = run(spec)
    except torch.OutOfMemoryError as error:
        result = {"error": "out of memory: " + str(error).splitlines()[0][:200]}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
