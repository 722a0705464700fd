"""Bit-identical runs: what torch and CUDA are told for the time of one run, and put back behind it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_dpo.errors import TrainingError

logger = logging.getLogger("lora_dpo")

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_SET = {_WORKSPACE: ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
# what transformers sets beside these for `full_determinism`, and leaves set
_THEIRS = ("CUDA_LAUNCH_BLOCKING", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC")


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Let torch take algorithms whose sums have one order, inside the block.

    An operation that has none raises instead of giving other bits the next time. Every setting of
    torch and of the environment is afterwards what it was before.

    Args:
        asked: whether anything is done at all (``train.full_determinism``).

    Raises:
        TrainingError: an operation without such an algorithm on this device.
    """
    if not asked:
        yield
        return
    if torch.cuda.is_initialized() and _WORKSPACE not in os.environ:
        logger.warning(
            "train.full_determinism: CUDA has begun in this process, and cuBLAS may have chosen its "
            "workspace. To be certain, set %s=%s before Python starts.",
            _WORKSPACE,
            _SET[_WORKSPACE],
        )
    kept = {name: os.environ.get(name) for name in (*_SET, *_THEIRS)}
    cudnn = torch.backends.cudnn
    modes = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    for name, value in _SET.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"train.full_determinism: {' '.join(str(error).split())[:300]}. Leave the setting out, or "
            "train on another device."
        ) from error
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=warns)
        cudnn.deterministic, cudnn.benchmark = modes[1:]
        for name, before in kept.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
