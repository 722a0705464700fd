"""Where the time of one warm step goes, by parts that a reader knows; the same rules on both sides.

torch.profiler records every operation. Head, dequantisation, attention and optimiser are recognised
by what an operation lies in: ranges put around functions here, and names that the libraries give
their own. Matrix products of the rest belong to LoRA where one of their sides is its rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

RANGE = "part: "
PARTS = (
    "base products",
    "LoRA products",
    "dequantisation",
    "attention",
    "head",
    "elementwise",
    "optimiser",
    "other",
)
# what an operation lies in; the nearest one decides
INSIDE = (
    (re.compile(r"gem[mv]_4bit"), "base products"),  # with the dequantisation in the kernel
    (re.compile(r"dequantize"), "dequantisation"),
    (re.compile(r"UnitGradient|ChunkedLogProb"), "head"),
    (re.compile(r"scaled_?dot_?product|flash_attn", re.IGNORECASE), "attention"),
    (re.compile(r"^Optimizer\.|_foreach_"), "optimiser"),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_scaled_mm")
# those of attention that is written out in single operations
ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data")


def part_of(event: Any, rank: int) -> str:
    """Return the part of the step that an operation belongs to.

    Args:
        event: a ``FunctionEvent`` of torch.profiler.
        rank: of the LoRA layers.
    """
    at = event
    while at is not None:
        if at.name.startswith(RANGE):
            return str(at.name.removeprefix(RANGE))
        for pattern, part in INSIDE:
            if pattern.search(at.name):
                return part
        at = at.cpu_parent
    if event.name in PRODUCTS:
        sides = [side for shape in event.input_shapes for side in shape if len(shape) == 2]
        return "LoRA products" if rank in sides else "base products"
    if event.name in ATTENTION:
        return "attention"
    return "elementwise" if _computes(event) else "other"


def _computes(event: Any) -> bool:
    return "::" in event.name and not event.name.startswith("autograd::")


class OneStep:
    """Profiles one optimiser step of a trainer.

    Args:
        meter: the clock of ``one_run.py``; waits for the device.
        after: steps before the one that is profiled.
        rank: of the LoRA layers.
    """

    def __init__(self, meter: Any, after: int, rank: int) -> None:
        self.meter, self.after, self.rank = meter, after, rank
        self.seconds = 0.0
        self.profiler: Any = None

    def callback(self) -> Any:
        """Return the callback for the trainer."""
        from transformers import TrainerCallback

        watch = self

        class Profiled(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step == watch.after:
                    watch.start()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step == watch.after + 1:
                    watch.stop()

        return Profiled()

    def start(self) -> None:
        """Begin, before the first micro-batch of the step."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.meter.cuda:
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, record_shapes=True)
        self.profiler.start()
        self._began = self.meter.now()[0]

    def stop(self) -> None:
        """End, after the update."""
        self.seconds = self.meter.now()[0] - self._began
        self.profiler.stop()

    @contextmanager
    def annotated(self) -> Iterator[None]:
        """Put ranges around functions of both sides that have no name of their own in a profile."""
        import bitsandbytes.functional

        import lora_dpo.forward

        places = (
            (bitsandbytes.functional, "dequantize_4bit", "dequantisation"),
            (lora_dpo.forward, "token_values", "head"),
        )
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        for owner, name, part in places:
            setattr(owner, name, ranged(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def parts(self) -> dict[str, Any]:
        """Return seconds and per cent of the step by part."""
        from torch.autograd import DeviceType

        seconds = dict.fromkeys(PARTS, 0.0)
        counted = dict.fromkeys(PARTS, 0)
        for event in self.profiler.events():
            if event.device_type != DeviceType.CPU or event.is_async:
                continue
            if self.meter.cuda:
                spent = event.self_device_time_total
            else:  # what lies between operations is Python's and the gradient engine's
                spent = event.self_cpu_time_total if _computes(event) else 0.0
            if spent > 0:
                part = part_of(event, self.rank)
                seconds[part] += spent / 1e6
                counted[part] += 1
        seconds["other"] += max(0.0, self.seconds - sum(seconds.values()))
        return {
            "measure": "kernels of the device" if self.meter.cuda else "operations on the CPU",
            "other_is": "the device idle" if self.meter.cuda else "Python, between operations",
            "step_s": round(self.seconds, 5),
            "parts": {
                part: {
                    "s": round(spent, 5),
                    "percent": round(100 * spent / self.seconds, 1),
                    "operations": counted[part],
                }
                for part, spent in seconds.items()
            },
        }


def ranged(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Return the function with a range of the profiler around each call."""
    from torch.profiler import record_function

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + part):
            return function(*args, **kwargs)

    return call


def show(profiles: dict[str, dict[str, Any]]) -> None:
    """Print the profiles of several runs beside each other."""
    good = {name: found["profile"] for name, found in profiles.items() if "profile" in found}
    for name in profiles.keys() - good.keys():
        print(f"{name}: {profiles[name].get('error', 'no profile')[:90]}")
    if not good:
        return
    print(f"\n{'one profiled step':18s}" + "".join(f"{name:>26s}" for name in good))
    for part in PARTS:
        cells = [found["parts"][part] for found in good.values()]
        line = "".join(f"{cell['s']:15.4f} s {cell['percent']:6.1f} %" for cell in cells)
        print(f"{part:18s}{line}")
    print(
        f"{'whole step':18s}"
        + "".join(f"{found['step_s']:15.4f} s {'':8s}" for found in good.values())
    )
    print("(other: " + ", ".join(sorted({found["other_is"] for found in good.values()})) + ")")
