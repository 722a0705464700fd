"""True reward against KL to the reference, for several objectives: DPO's controlled experiment.

The experiment of arXiv:2305.18290 (figure 2, left) in small, on the bundled model, whose true
reward is a visible rule. Every run starts at the same fresh adapter on the one base in memory, and
the reference's log-probs of the preferences are computed once for all runs. At several steps of each
run the policy answers held-out prompts; of its samples are taken the mean true reward and the mean
of ``log pi - log ref``, summed over tokens, which is an unbiased estimate of the KL in nats.

python examples/reward_kl_frontier.py --to docs    # 15 minutes on 2 cores; --smoke: seconds
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from lora_dpo import PreferenceTrainer, load_policy, load_preferences, objectives, tokenise
from lora_dpo.data import Tokenised, collate_labelled
from lora_dpo.evaluation import Estimate, mean_interval
from lora_dpo.forward import completion_logps
from lora_dpo.policy import reference
from lora_dpo.prompt_tokens import encode_prompt
from lora_dpo.quickstart import DATA_DIR, MODEL_DIR
from lora_dpo.quickstart.reward import true_reward
from lora_dpo.reference_cache import with_reference_logps

NAME = "reward_kl_frontier"
MAX_NEW_TOKENS = 120  # the bundled model's stories end before
ROWS_A_STEP = {"paired": 16, "unpaired": 32}  # as many answers either way

# Objective and its hyperparameters. IPO's and SimPO's beta is per token, of which an answer has 50.
RUNS: list[tuple[str, dict[str, float]]] = [
    ("dpo", {"beta": 0.1}),
    ("dpo", {"beta": 0.5}),
    ("dpo", {"beta": 2.0}),
    ("ipo", {"beta": 1.0}),
    ("ipo", {"beta": 10.0}),
    ("kto_running", {"beta": 0.1}),
    ("kto_running", {"beta": 0.5}),
    ("simpo", {"beta": 2.0, "gamma": 1.0}),
    ("simpo", {"beta": 10.0, "gamma": 3.0}),
    ("orpo", {"beta": 0.1}),
    ("orpo", {"beta": 1.0}),
    ("sft", {}),
]
COLOURS = {
    "dpo": "tab:blue",
    "ipo": "tab:orange",
    "kto_running": "tab:green",
    "simpo": "tab:red",
    "orpo": "tab:purple",
    "sft": "tab:gray",
}


@dataclass(frozen=True)
class Sweep:
    """How much of everything: the whole experiment, or a taste of it.

    Args:
        runs: objectives with their hyperparameters.
        steps: optimiser steps after which a policy is measured; the last ends the run.
        pairs: preferences to train on; None for all.
        prompts: held-out prompts that are answered at each measurement.
    """

    runs: Sequence[tuple[str, dict[str, float]]] = field(default_factory=lambda: RUNS)
    steps: tuple[int, ...] = (10, 25, 50, 75)
    pairs: int | None = None
    prompts: int = 200


SMOKE = Sweep(runs=[RUNS[1], RUNS[5], RUNS[7]], steps=(3,), pairs=64, prompts=8)


@dataclass(frozen=True)
class Point:
    """What a policy is worth, and how far it has gone; 95 % intervals."""

    objective: str
    step: int
    reward: Estimate
    kl: Estimate
    words: float
    unfinished: float  # share of samples that had not ended


class Bench:
    """The one policy, the data with the reference's log-probs, and the prompts."""

    def __init__(self, sweep: Sweep) -> None:
        torch.manual_seed(0)
        self.policy = load_policy(MODEL_DIR)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.start = {name: p.detach().clone() for name, p in self._trained()}
        self.data = {kind: self._with_reference(kind, sweep.pairs) for kind in ROWS_A_STEP}
        lines = (DATA_DIR / "eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines[: sweep.prompts]]
        self.prompts = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    def _with_reference(self, kind: Any, pairs: int | None) -> Tokenised:
        rows = [json.loads(line) for line in (DATA_DIR / "train.jsonl").read_text().splitlines()]
        loaded = load_preferences(rows[:pairs], kind=kind)
        data = tokenise(loaded, self.tokenizer, max_length=256)
        return with_reference_logps(self.policy, data, batch_size=32)

    def reset(self) -> None:
        """Return the adapter to where every run begins; the policy is its reference there."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self.start[name])

    def measure(self, name: str, step: int) -> Point:
        """Answer every held-out prompt once and take reward and KL of the answers."""
        with evaluating(self.policy):
            answers = self._sample()
            ratios = self._logratios(answers)
        end = self.tokenizer.eos_token_id
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        each = np.arange(len(answers))
        return Point(
            objective=name,
            step=step,
            reward=mean_interval(np.array([true_reward(text) for text in texts]), each),
            kl=mean_interval(ratios, each),
            words=float(np.mean([len(text.split()) for text in texts])),
            unfinished=float(np.mean([ids[-1] != end for ids in answers])),
        )

    def _sample(self) -> list[list[int]]:
        """Return one answer a prompt at temperature 1, up to and with its end token."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        longest = max(map(len, self.prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in self.prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts])
        out = self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=pad,
        )
        rows: list[list[int]] = out[:, longest:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def _logratios(self, answers: list[list[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = []
        for start in range(0, len(answers), 50):
            rows = [
                {"prompt_ids": p, "completion_ids": a, "label": True, "file": "<samples>", "row": 0}
                for p, a in zip(self.prompts[start:][:50], answers[start:][:50], strict=True)
            ]
            batch = collate_labelled(rows, pad_id=self.tokenizer.pad_token_id)
            mine = completion_logps(self.policy, batch)
            with reference(self.policy):
                found.append((mine - completion_logps(self.policy, batch)).double().numpy())
        return np.concatenate(found)


@contextmanager
def evaluating(policy: torch.nn.Module) -> Iterator[None]:
    """Switch training off inside, with random numbers of its own, the same each time."""
    was_training = policy.training
    policy.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        yield
    policy.train(was_training)


class Measuring(TrainerCallback):
    """Measures the policy after certain steps."""

    def __init__(self, bench: Bench, name: str, steps: tuple[int, ...]) -> None:
        self.bench, self.name, self.steps = bench, name, steps
        self.points: list[Point] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **further: Any) -> None:
        """Measure after the update of these steps."""
        if state.global_step in self.steps:
            self.points.append(self.bench.measure(self.name, state.global_step))


def run(
    bench: Bench, sweep: Sweep, name: str, values: dict[str, float], folder: str
) -> list[Point]:
    """Train one objective from the common start and return its points."""
    bench.reset()
    objective = objectives.get(name).bind(**values)
    said = ", ".join(f"{key} {value:g}" for key, value in values.items())
    watch = Measuring(bench, f"{name} {said}".strip(), sweep.steps)
    trainer = PreferenceTrainer(
        bench.policy,
        objective=objective,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS_A_STEP[objective.data],
            max_steps=max(sweep.steps),
            learning_rate=5e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=0.1,
            logging_steps=max(sweep.steps),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=0,
        ),
        train_data=bench.data[objective.data],
        callbacks=[watch],
        reference_is="base",
    )
    trainer.train()
    return watch.points


def table(points: Sequence[Point]) -> str:
    """Return the points as a markdown table."""
    lines = [
        "| objective | step | true reward [95 %] | KL to the reference, nats [95 %] | words | unfinished |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        reward, kl = (f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in (p.reward, p.kl))
        lines.append(
            f"| {p.objective} | {p.step} | {reward} | {kl} | {p.words:.1f} | {p.unfinished:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Path) -> bool:
    """Draw reward against KL, a line a run; say so and return False where matplotlib is absent."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"no picture: matplotlib is not installed (pip install lora-dpo[docs]); {path.name}")
        return False
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    base, *moved = points
    axes.axhline(base.reward.mean, color="black", linewidth=0.8, linestyle=":")
    for name in dict.fromkeys(p.objective for p in moved):
        own = [p for p in moved if p.objective == name]
        family = [n for n in dict.fromkeys(p.objective for p in moved) if same_family(n, name)]
        axes.errorbar(
            [0.0, *(p.kl.mean for p in own)],
            [base.reward.mean, *(p.reward.mean for p in own)],
            yerr=[0.0, *((p.reward.high - p.reward.low) / 2 for p in own)],
            color=COLOURS[name.split()[0]],
            linestyle=["-", "--", ":"][family.index(name) % 3],
            marker="osD"[family.index(name) % 3],
            markersize=4,
            linewidth=1.2,
            elinewidth=0.5,
            label=name,
        )
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=-0.05)  # an estimate of a small KL may fall below 0
    axes.set_xlabel("KL(policy || reference), nats an answer, from the policy's samples")
    axes.set_ylabel("true reward of the samples (95 % bars)")
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)
    return True


def same_family(one: str, other: str) -> bool:
    """Whether two runs are of one objective."""
    return one.split()[0] == other.split()[0]


def main(arguments: Sequence[str] | None = None) -> list[Point]:
    """Run the sweep, write table and picture, and return the points, the reference first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="folder of the .json, .md and .png; default: none")
    parser.add_argument("--smoke", action="store_true", help="a taste of it, in seconds")
    asked = parser.parse_args(arguments)
    sweep, began = SMOKE if asked.smoke else Sweep(), time.monotonic()
    bench = Bench(sweep)
    points = [bench.measure("reference", 0)]
    with tempfile.TemporaryDirectory() as folder:
        for name, values in sweep.runs:
            points += run(bench, sweep, name, values, folder)
            print(f"{time.monotonic() - began:5.0f} s  {points[-1].objective}", flush=True)
    seconds = time.monotonic() - began
    print(table(points))
    if asked.to is not None:
        asked.to.mkdir(parents=True, exist_ok=True)
        found = {
            "points": [asdict(point) for point in points],
            "steps": sweep.steps,
            "prompts": len(bench.prompts),
            "pairs": len(bench.data["paired"]),
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        (asked.to / f"{NAME}.json").write_text(text, encoding="utf-8")
        (asked.to / f"{NAME}.md").write_text(table(points), encoding="utf-8")
        draw(points, asked.to / f"{NAME}.png")
    return points


if __name__ == "__main__":
    main()
