"""What PyTorch's CPU allocator gave out: every allocation and release, in kernels too."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import profile


def peak_allocated(run: Callable[[], Any]) -> int:
    """Return the most bytes that ``run`` held at one time beyond what was there before."""
    gc.collect()  # what an earlier test has left must not be given back on the way
    with profile(profile_memory=True) as profiled:
        run()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
