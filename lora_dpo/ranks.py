"""Several processes, as torchrun and accelerate start them: who does what, and what all agree on.

Every process reads all rows of a step and runs its share of them; what they find is gathered, so that
losses, states, metrics and decisions are those of one process, on each of them. There is no runtime of
our own: groups of processes are torch's, gradients are added up by DDP.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler

from lora_dpo.errors import ConfigError, TrainingError

logger = logging.getLogger("lora_dpo")

Part = TypeVar("Part")

_TOLD = "_lora_dpo_told"  # an error that the other processes know of
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def launched_as() -> int:
    """Return the number of this process as its launcher gave it, before any group is formed."""
    return int(os.environ.get("RANK") or 0)


def launched_processes() -> int:
    """Return how many processes the launcher started, before any group is formed."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def under_deepspeed(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether accelerate's launcher asks for DeepSpeed."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1", "yes")


def rank() -> int:
    """Return the number of this process in the group, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def processes() -> int:
    """Return how many processes train together."""
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def refuse_launch(args: Any = None, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what a launcher has set up and training here would do otherwise, or not at all.

    Args:
        args: ``TrainingArguments``, which may ask for the same.
        environment: of this process.

    Raises:
        ConfigError: weights would be sharded, or several processes were asked for and one was started.
    """
    asked = {
        name for name in _SHARDING if environment.get(name, "").lower() in ("true", "1", "yes")
    }
    if args is not None and args.world_size < processes():
        raise ConfigError(
            f"args: {processes()} processes are started, and accelerate takes this one for the only one. On "
            "a CPU give use_cpu=True."
        )
    if getattr(args, "deepspeed", None):
        raise ConfigError(
            "args.deepspeed: DeepSpeed is set up by accelerate; start with configs/accelerate/zero2.yaml."
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if under_deepspeed(environment) and stage not in ("1", "2"):
        raise ConfigError(
            f"launcher: DeepSpeed's zero_stage is {stage}; expected 1 or 2, which deal out what belongs to "
            "adapters. A base that is too large for one card is dealt out by train.shard_base: true, without "
            "DeepSpeed."
        )
    for name, what in _SHARDING.items():
        if name in asked or (what == "FSDP" and getattr(args, "fsdp", None)):
            raise ConfigError(
                f"launcher: {what} is asked for ({name}), which wraps the whole policy or runs steps of "
                "its own. Start with configs/accelerate/ddp.yaml, or with torchrun; where the base is too "
                "large for one card, train.shard_base: true deals it out among them (FSDP2)."
            )
    # accelerate's simple launcher sets the first always, and the second where several are asked for
    several = "ACCELERATE_USE_CPU" in environment and "MASTER_PORT" in environment
    if several and not any(name in environment for name in _SIZES):
        raise ConfigError(
            "launcher: accelerate was asked for several processes and has started this one alone, as it "
            "does with --cpu or without several GPUs. A step would have fewer rows than was meant. Start "
            "with torchrun --nproc_per_node N, or accelerate launch --multi_gpu --num_processes N; for "
            "one process give --num_processes 1 (and unset MASTER_PORT)."
        )


# ---- what every process knows ------------------------------------------------------------------


def largest(value: float) -> float:
    """Return the largest of the processes' values."""
    if processes() == 1:
        return value
    on_card = dist.get_backend() == "nccl"
    found = torch.tensor(value, dtype=torch.float64, device="cuda" if on_card else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def wait() -> None:
    """Wait until every process is here; in ``agreed`` blocks of others too.

    Raises:
        TrainingError: another process has raised in such a block.
    """
    if processes() > 1:
        _hear()


@contextmanager
def agreed() -> Iterator[None]:
    """Go on behind the block when every process has come through it; else end in each of them.

    Not around what waits for other processes itself, unless by ``wait`` or ``agreed``.

    Raises:
        TrainingError: another process raised in its block; what it raised is in the message.
    """
    if processes() == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not _is_told(error):
            setattr(error, _TOLD, True)
            _tell(f"{type(error).__name__}: {error}")
        raise
    _hear()


@contextmanager
def first_alone() -> Iterator[None]:
    """Run the block in the first process, then in the others, which find what it has stored.

    Raises:
        TrainingError: as ``agreed``.
    """
    if rank() > 0:
        wait()
    with agreed():
        yield
        if rank() == 0:
            wait()


def _is_told(error: BaseException | None) -> bool:
    while error is not None and not hasattr(error, _TOLD):
        error = error.__cause__ or error.__context__
    return error is not None


def _tell(problem: str) -> list[str]:
    found: list[Any] = [""] * processes()
    dist.all_gather_object(found, problem)
    return found


def _hear() -> None:
    for number, problem in enumerate(_tell("")):
        if problem:
            error = TrainingError(f"process {number} of {processes()} ended: {problem}")
            setattr(error, _TOLD, True)
            raise error


def check_averaged(model: nn.Module) -> None:
    """Hold that gradients of this model are averaged over the processes.

    Raises:
        TrainingError: each process would train a model of its own.
    """
    if processes() > 1 and not (isinstance(model, DistributedDataParallel) or is_engine(model)):
        raise TrainingError(
            f"{processes()} processes train a {type(model).__name__} that nothing keeps equal among them; "
            "a model is prepared for them once, by accelerate. Hand over a new policy."
        )


def is_engine(model: nn.Module) -> bool:
    """Whether a model is wrapped in DeepSpeed's engine, which makes the updates itself."""
    return type(model).__name__ == "DeepSpeedEngine"


def forget_preparation(model: nn.Module) -> None:
    """Let accelerate prepare a model for training that an evaluation had prepared without DDP."""
    if processes() > 1:
        vars(model).pop("_is_accelerate_prepared", None)


# ---- rows ---------------------------------------------------------------------------------------


def whole_steps(loader: Any) -> Any:
    """Let every process read all rows of a batch over all processes, as one process would.

    accelerate would give each its own, and fill up the last batch with rows that had their turn.

    Args:
        loader: as ``accelerator.prepare`` returns it.
    """
    shard = loader.batch_sampler
    if processes() == 1 or shard.num_processes == 1:  # a loader that is kept comes again
        return loader
    sampler, count = shard.batch_sampler.sampler, shard.batch_size * processes()
    shard.batch_sampler = BatchSampler(sampler, count, shard.drop_last)
    shard.sampler = sampler  # where the epoch is set, in a resumed epoch too
    shard.num_processes, shard.process_index = 1, 0
    shard.batch_size, shard.even_batches = count, False
    return loader


def share(parts: Sequence[Part]) -> list[Part]:
    """Return the parts of a step that this process runs: they are dealt in turn."""
    return list(parts[rank() :: processes()])


def dealt(parts: Sequence[Sequence[Part]]) -> list[tuple[Sequence[Part], bool]]:
    """Return the parts of a step that this process runs, and whether each counts; as many in each process.

    Where none is left for a process it runs a row that counts nothing: the others wait for it, when
    gradients are added up and when weights that are dealt out are gathered.
    """
    own: list[tuple[Sequence[Part], bool]] = [(part, True) for part in share(parts)]
    rounds = -(-len(parts) // processes())
    return own + [(parts[0][:1], False)] * (rounds - len(own))


def places(parts: Sequence[Sequence[Any]], number: int) -> list[int]:
    """Return where the rows of a process stand among those of all parts.

    Args:
        parts: of the step, in their order.
        number: of the process.
    """
    found: list[int] = []
    start = 0
    for i, part in enumerate(parts):
        if i % processes() == number:
            found += range(start, start + len(part))
        start += len(part)
    return found


def gathered(values: Mapping[str, Tensor], parts: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Return what all processes found of the rows of a step, in the order of its parts.

    Args:
        values: ``[rows]`` each, of the parts of this process; further rows are left out.
        parts: of the step, the same in every process.
    """
    if processes() == 1:
        return dict(values)
    owners = [places(parts, number) for number in range(processes())]
    own, most = len(owners[rank()]), max(map(len, owners))
    found = torch.stack([value[:own].double() for value in values.values()], dim=1)
    sent = found.new_zeros(most, len(values))
    sent[:own] = found
    received = [torch.empty_like(sent) for _ in owners]
    dist.all_gather(received, sent)
    whole = found.new_empty(sum(map(len, parts)), len(values))
    for rows, table in zip(owners, received, strict=True):
        whole[rows] = table[: len(rows)]
    columns = zip(values.items(), whole.unbind(1), strict=True)
    return {name: column.to(value.dtype) for (name, value), column in columns}


def of_all(
    rows: Sequence[Any], width: int, collect: Callable[[Sequence[Any]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what processes find of so many rows each, all in one go, in the order of the rows.

    Args:
        rows: of all processes.
        width: rows of each.
        collect: returns ``[rows]`` of a few rows.
    """
    parts = [rows[i : i + width] for i in range(0, len(rows), width)]
    own = share(parts) or [rows[:1]]  # the others wait for a process without rows
    return gathered(collect(own[0]), parts)
