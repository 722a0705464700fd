"""Trains many objectives in one group of processes: ``torchrun -m tests.processes.worker``.

Steps have so many rows in all, whatever the number of processes.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback

from lora_dpo import objectives
from lora_dpo.arguments import build_arguments
from lora_dpo.config import LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import LoraDpoError
from lora_dpo.moving_reference import NEVER, ReferenceMoves
from lora_dpo.policy import load_policy
from lora_dpo.ranks import processes, rank
from lora_dpo.sharding import shard_base
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter

ROWS_A_STEP = 4
DONE = "done.txt"  # names of the cases that are done, for who watches
BAD = "Z"  # a byte that stands in no pair; the policy may give no number there
# What depends on the clock or the machine, and the library's own sums.
OF_THE_MOMENT = ("second", "memory/", "runtime", "flos", "train_loss", "preparation")


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        name: of the case.
        objective: name of the table.
        settings: of the objective.
        trainer: further arguments of ``PreferenceTrainer``.
        arguments: further ``TrainingArguments``.
        moves: how the reference follows the policy.
        resume: checkpoint to go on from.
        store: folder of reference log-probs; ``{rank}`` stands for the number of the process.
        signal_at: step at which the last process gets a SIGTERM, and no other.
        sharded: whether the base is dealt out among the processes.
        bad_row: the training row, from 1, whose log-prob is no number from the start of training on; 0 for none.
    """

    name: str
    objective: str
    settings: dict[str, float] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    moves: str = "none"
    resume: str = ""
    store: str = ""
    signal_at: int = 0
    sharded: bool = False
    bad_row: int = 0


class Terminated(TrainerCallback):
    """Sends a signal to one process of several."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.step == state.global_step + 1 and rank() == processes() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Spoilt(TrainerCallback):
    """Spoils a token's embedding once the run has begun, when nothing can be foreseen any more."""

    def __init__(self, token: list[int]) -> None:
        self.token = token

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        kw["model"].get_input_embeddings().weight.data[self.token] = torch.inf


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Return what of a log line every number of processes must agree on."""
    return {k: v for k, v in line.items() if not any(part in k for part in OF_THE_MOMENT)}


def run(case: Case, model: Path, pairs: list[dict[str, str]], out: Path) -> dict[str, Any]:
    """Evaluate and train; return what was logged, the states, and where the adapter is."""
    bound = objectives.get(case.objective).bind(**case.settings)
    folder = out / case.name
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(some: list[dict[str, str]]) -> Tokenised:
        return tokenise(load_preferences(some, kind=bound.data), tokenizer, max_length=128)

    values = {
        "per_device_train_batch_size": ROWS_A_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "optim": "sgd",  # adaptive ones divide by gradients, and blow up what is rounding
        "max_grad_norm": 1.0,
        "logging_steps": 2,
        "save_strategy": "no",
        "seed": 5,
    }
    torch.manual_seed(11)
    settings = {**values, **case.arguments}
    arguments = build_arguments(settings, output_dir=str(folder), evaluates=False)
    policy = load_policy(model, lora=LoraConfig(rank=4))
    move_adapter(policy, std=0.02)
    spoilt: list[TrainerCallback] = []
    if case.bad_row:
        place = case.bad_row - 1
        bad = {**pairs[place], "chosen": pairs[place]["chosen"] + BAD}
        pairs = [*pairs[:place], bad, *pairs[place + 1 :]]
        spoilt = [Spoilt(tokenizer(BAD, add_special_tokens=False).input_ids)]
    if case.sharded:
        shard_base(policy)
    trainer = PreferenceTrainer(
        policy,
        objective=bound,
        args=arguments,
        train_data=tokens(pairs[:9]),  # steps of 4, 4 and 1: one process has no row in the last
        eval_data=tokens(pairs[9:14]),  # batches of 2, 2 and 1
        reference_is="base",
        reference_moves=NEVER if case.moves == "none" else ReferenceMoves(case.moves, 2),  # type: ignore[arg-type]
        reference_cache=case.store.format(rank=rank()) or None,
        callbacks=[Terminated(case.signal_at), *spoilt],
        **case.trainer,
    )
    trainer.write_metrics_to(folder / "metrics.jsonl")
    held_out = {} if case.resume else trainer.evaluate()
    trainer.train(resume_from_checkpoint=case.resume or None)
    if rank() == 0:
        adapter = {n: p.detach() for n, p in trainer.model.named_parameters() if ".default" in n}
        save_file(adapter, out / f"{case.name}.safetensors")
    return {
        "held_out": numbers(held_out),
        "logs": [numbers(line) for line in trainer.state.log_history],
        "states": trainer.states,
        "skipped": trainer.steps.skipped,
        "processes": processes(),
        "dealt out": _dealt_out(policy),
    }


def _dealt_out(policy: Any) -> dict[str, list[int]]:
    """Return the bytes of each weight that FSDP has dealt out: here, and in all."""
    return {
        name: [weight.to_local().nbytes, weight.full_tensor().nbytes]
        for name, weight in policy.named_parameters()
        if isinstance(weight, DTensor)
    }


def main(plan: Path, out: Path) -> None:
    """Run the cases of a plan; write ``OUT/results-RANK.json``."""
    gc.freeze()  # the library collects before each training, which takes long after these imports
    given = json.loads(plan.read_text(encoding="utf-8"))
    results = {}
    for values in given["cases"]:
        case = Case(**values)
        try:
            results[case.name] = run(case, Path(given["model"]), given["pairs"], out)
        except LoraDpoError as error:
            results[case.name] = {"error": f"{type(error).__name__}: {error}"}
        if rank() == 0:
            with (out / DONE).open("a", encoding="utf-8") as stream:
                stream.write(case.name + "\n")
    (out / f"results-{rank()}.json").write_text(json.dumps(results), encoding="utf-8")


def write_plan(path: Path, cases: list[Case], model: Path, pairs: list[dict[str, str]]) -> None:
    """Write what ``main`` reads."""
    plan = {"model": str(model), "pairs": pairs, "cases": [asdict(case) for case in cases]}
    path.write_text(json.dumps(plan), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
