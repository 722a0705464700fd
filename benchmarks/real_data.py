"""Real preference data and small real models through train, eval and merged export.

    python benchmarks/real_data.py --shared ../shared --out benchmarks/results/real_data_cpu.json

Every paired file of ``SHARED/data`` is trained on with TinyStories-656K in NF4, and the stories with
two smaller models besides. The subject is the path, not the models: 656,000 parameters that know
children's stories do not learn to be helpful from a hundred rows, and their held-out accuracy says
so. Only the stories (judged by a written rule, sampled from the model itself) can be learned; there
the accuracy is a result. Everything is written to a temporary folder; the JSON holds no path of it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lora_dpo
from lora_dpo.evaluation import Evaluation
from lora_dpo.run_folder import versions

STORIES = "stories656k_positive.standard.jsonl"
TINY = "TinyStories-656K"

# ChatML in spirit: the end of a turn is the end token of the model, which it knows how to stop on.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """One file with one model and one recipe.

    Args:
        data: file below ``SHARED/data``.
        model: folder below ``SHARED/models``.
        batch: pairs of an optimiser step.
        epochs: passes over the training rows.
        eval_fraction: share of the prompts that is held out, of at most 200 rows.
    """

    data: str
    model: str = TINY
    batch: int = 8
    epochs: int = 1
    eval_fraction: float = 0.3
    rank: int = 16
    beta: float = 0.1
    learning_rate: float = 1e-3
    max_length: int = 512

    def config(self, shared: Path, out: Path, template: Path) -> dict[str, Any]:
        """Return the config of the run."""
        source = shared / "data" / self.data
        return {
            "objective": {"name": "dpo", "beta": self.beta},
            "model": {"base": str(shared / "models" / self.model), "quantisation": "nf4"},
            "lora": {"rank": self.rank, "targets": "all-linear"},
            "data": {
                "train": str(source),
                "eval_fraction": self.eval_fraction,
                "eval_max_rows": 200,
                "chat_template": str(template) if holds_messages(source) else None,
                "max_length": self.max_length,
                "overflow": "drop",
            },
            "train": {
                "per_device_train_batch_size": self.batch,
                "gradient_accumulation_steps": 1,
                "per_device_eval_batch_size": 16,
                "num_train_epochs": self.epochs,
                "learning_rate": self.learning_rate,
                "gradient_checkpointing": False,
                "eval_strategy": "no",
                "save_strategy": "no",
                "logging_steps": 1,  # the first line is the loss at the reference: ln 2
            },
            "output": {"dir": str(out)},
        }


@dataclass(frozen=True)
class Result:
    """What one case gave. Estimates are [mean, low, high] with 95 % intervals over prompts."""

    data: str
    model: str
    read: int
    dropped: int
    trained: int
    held_out: int
    prompts: int
    reasons: dict[str, int]
    steps: int
    accuracy: list[float]
    loss: list[float]
    margin: list[float]
    first_loss: float
    merge_kl: float
    merge_positions: int
    merge_top1: float
    seconds: dict[str, float]


def paired_cases(data: Path) -> list[Case]:
    """Return a case for every paired file, and two more models for the stories."""
    names = sorted(str(p.relative_to(data)) for p in data.rglob("*.jsonl") if is_paired(p))
    stories = {"batch": 16, "epochs": 2, "eval_fraction": 0.2}
    cases = [Case(name, **(stories if name == STORIES else {})) for name in names]  # type: ignore[arg-type]
    # The first has an MLP of 172, no multiple of the 64 weights of a block: a case to survive.
    smaller = ("stories260K", "stories260K-pad192")
    return cases + [Case(STORIES, model, 16, 1, 0.2) for model in smaller]


def is_paired(path: Path) -> bool:
    """Whether a file's first row has two answers."""
    return {"chosen", "rejected"} <= _first_row(path).keys()


def holds_messages(path: Path) -> bool:
    """Whether a file's answers are lists of messages and need a chat template."""
    return isinstance(_first_row(path)["chosen"], list)


def _first_row(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as lines:
        row: dict[str, Any] = json.loads(next(lines))
    return row


def run_case(case: Case, shared: Path, work: Path) -> Result:
    """Train, evaluate from disk, and export merged with its proof."""
    template = work / "template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    run = lora_dpo.train(case.config(shared, work / "run", template))
    lap("train")
    found = lora_dpo.evaluate(run)
    lap("eval")
    proof = lora_dpo.export(run, work / "merged", merge=True).proof
    lap("export")
    assert proof is not None, "a merged export always has a proof"
    reports = json.loads((run.folder / "data.json").read_text(encoding="utf-8"))
    reasons = _reasons(reports.values())
    rows = run.results["rows"]
    result = Result(
        data=case.data.removesuffix(".jsonl"),
        model=case.model,
        read=reports["read"]["read"],
        dropped=sum(n for reason, n in reasons.items() if reason.startswith("dropped")),
        trained=rows["train"],
        held_out=rows["held_out"],
        prompts=found.prompts,
        reasons=reasons,
        steps=run.results["steps"],
        accuracy=_three(found, "rewards/accuracies"),
        loss=_three(found, "loss"),
        margin=_three(found, "rewards/margins"),
        first_loss=next(entry["loss"] for entry in run.history if "loss" in entry),
        merge_kl=proof.kl,
        merge_positions=proof.positions,
        merge_top1=proof.top1,
        seconds=seconds,
    )
    if result.read != result.dropped + result.trained + result.held_out:
        raise AssertionError(f"{case.data}: rows do not add up: {result}")
    return result


def _reasons(reports: Iterable[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for report in reports:
        for entry in report["entries"]:
            counts[entry["reason"]] = counts.get(entry["reason"], 0) + entry["count"]
    return counts


def _three(found: Evaluation, name: str) -> list[float]:
    estimate = found[name]
    return [round(value, 4) for value in (estimate.mean, estimate.low, estimate.high)]


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    head = ["data", "model", "read", "dropped", "trained", "held out", "steps"]
    head += ["accuracy [95 %]", "loss", "margin", "merge KL", "train s", "eval s", "export s"]
    rows = [head, ["---"] * len(head)]
    for r in results:
        mean, low, high = r.accuracy
        rows.append(
            [
                r.data,
                r.model,
                *map(str, (r.read, r.dropped, r.trained, r.held_out, r.steps)),
                f"{mean:.3f} [{low:.3f}, {high:.3f}]",
                f"{r.loss[0]:.3f}",
                f"{r.margin[0]:.3f}",
                f"{r.merge_kl:.1e}",
                *(f"{r.seconds[name]:.1f}" for name in ("train", "eval", "export")),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run every case, print a table and keep a JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data and models")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--only", default="", help="only cases whose data or model contains this")
    options = parser.parse_args()
    if not (options.shared / "data").is_dir():
        parser.error(f"--shared {options.shared}: there is no folder data in it")
    known = paired_cases(options.shared / "data")
    cases = [case for case in known if options.only in f"{case.data} {case.model}"]
    if not cases:
        parser.error(f"--only {options.only}: no case has that in its name")
    results = []
    for case in cases:
        print(f"\n== {case.data} with {case.model}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            os.environ["LORA_DPO_CACHE"] = f"{work}/cache"
            results.append(run_case(case, options.shared, Path(work)))
    print(f"\n{table(results)}")
    if options.out:
        recipes = [asdict(case) for case in cases]
        kept = {
            "versions": versions(),
            "cores": os.cpu_count(),
            "results": [
                {**asdict(result), "recipe": {k: v for k, v in recipe.items() if k not in _NAMES}}
                for result, recipe in zip(results, recipes, strict=True)
            ],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {options.out}")


_NAMES = ("data", "model")

if __name__ == "__main__":
    main()
