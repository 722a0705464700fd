"""Sample, judge, train, and once more: the bundled model improves on its own answers.

A round draws four answers a prompt from the policy as it is, scores them (here with the bundled
model's true reward, as a judge would), trains on the best against the worst of each prompt, and
measures the true reward of fresh answers to prompts that no round has trained on.

The second round starts from the first one's adapter (``model.adapter``): its policy goes on, and its
reference is the first round's policy, frozen. That is where its answers come from, so the data are on
the reference's own ground, and the pull is to the last round and not to the base: each round may go
as far again. With the base as reference the second round would spend its room on where the first
one is already.

python examples/self_improve.py    # some minutes on 2 cores; --quick: a taste, in seconds
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from lora_dpo import load_policy, sample, train
from lora_dpo.evaluation import Estimate, mean_interval
from lora_dpo.generation import draw
from lora_dpo.quickstart import DATA_DIR, MODEL_DIR
from lora_dpo.quickstart.main import quickstart_config
from lora_dpo.quickstart.reward import true_reward
from lora_dpo.run_folder import Run


@dataclass(frozen=True)
class Effort:
    """How much of everything: the whole loop, or a taste of it.

    Args:
        rounds: of sampling and training.
        prompts: that each round trains on, its own.
        fresh: prompts whose answers are measured, the same after each round.
        epochs: passes over a round's pairs.
        rows: pairs of a step.
        tokens: of the longest answer; the bundled model's end before 120.
    """

    rounds: int = 2
    prompts: int = 240
    fresh: int = 200
    epochs: int = 2
    rows: int = 16
    tokens: int = 120


QUICK = Effort(prompts=6, fresh=5, rows=3, tokens=64)


@dataclass(frozen=True)
class Point:
    """The true reward of fresh answers, 95 % intervals; the gain is over the round before."""

    name: str
    reward: Estimate
    gain: Estimate | None


def kindness(prompt: Any, completion: str) -> float:
    """Score a completion as ``sample --by`` asks for: the rule in lora_dpo/quickstart/reward.py."""
    return true_reward(completion)


def prompts_of(name: str) -> list[Any]:
    """Return the prompts of a bundled file."""
    lines = (DATA_DIR / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def rewards(policy: Any, tokenizer: Any, prompts: Sequence[Any], tokens: int) -> Any:
    """Return the true reward of one fresh answer a prompt; the same random numbers each time."""
    seeds = range(len(prompts))
    found = draw(policy, tokenizer, prompts, seeds, max_new_tokens=tokens, batch_size=100)
    return np.array([true_reward(one.text) for one in found])


def one_round(number: int, before: Run | None, effort: Effort, to: Path) -> Run:
    """Sample from the policy as it is, score, and train; return the run."""
    first = (number - 1) * effort.prompts
    prompts = prompts_of("train.jsonl")[first : first + effort.prompts]
    samples = sample(
        before or MODEL_DIR,
        prompts,
        to / f"samples-{number}.jsonl",
        by=kindness,
        max_new_tokens=effort.tokens,
        seed=number,
        batch_size=160,
    )
    print(samples, flush=True)
    config = quickstart_config(to)
    for key, value in {
        "data.train": [{"path": samples.to}],
        "data.eval": None,
        "data.eval_fraction": 0.0,
        "model.adapter": str(before.folder / "adapter") if before else None,
        "train.num_train_epochs": effort.epochs,
        "train.per_device_train_batch_size": effort.rows,
        "output.diagnose": False,
        "output.dir": str(to / f"round-{number}"),
    }.items():
        config = config.replace(key, value)
    return train(config)


def loop(effort: Effort, to: Path) -> list[Point]:
    """Run the rounds; return the base's point and one a round."""
    fresh = prompts_of("eval_prompts.jsonl")[: effort.fresh]
    each, run = np.arange(len(fresh)), None
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    last = rewards(load_policy(MODEL_DIR), tokenizer, fresh, effort.tokens)
    points = [Point("base", mean_interval(last, each), None)]
    for number in range(1, effort.rounds + 1):
        run = one_round(number, run, effort, to)
        now = rewards(run.load_policy(), run.tokenizer(), fresh, effort.tokens)
        gain = mean_interval(now - last, each)
        points.append(Point(f"round {number}", mean_interval(now, each), gain))
        last = now
    return points


def table(points: Sequence[Point]) -> str:
    """Return the points as a markdown table."""
    lines = ["| policy | true reward of fresh answers | gain, same prompts |", "|---|---|---|"]
    lines += [f"| {p.name} | {p.reward} | {p.gain or ''} |" for p in points]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Point]:
    """Run the loop, print the table and return its points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="a new folder to keep everything; default: none")
    parser.add_argument("--quick", action="store_true", help="a taste of it, in seconds")
    asked = parser.parse_args(arguments)
    began, effort = time.monotonic(), QUICK if asked.quick else Effort()
    with tempfile.TemporaryDirectory() as folder:
        points = loop(effort, asked.to or Path(folder))
    print(f"{table(points)}\n{time.monotonic() - began:.0f} s")
    return points


if __name__ == "__main__":
    main()
