"""The main job, start to end, on the bundled model: what ``lora-dpo quickstart`` runs.

Load in NF4, train with DPO, evaluate, sample policy and reference, merge, prove the merge, and
show what changed. The same functions as in any other run; only model and data are small.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_dpo.config import Config
from lora_dpo.data import collate_labelled
from lora_dpo.evaluation import Estimate, mean_interval
from lora_dpo.forward import completion_logps
from lora_dpo.generation import SideBySide, generate_side_by_side
from lora_dpo.handing import export
from lora_dpo.heads import home_device
from lora_dpo.policy import reference
from lora_dpo.prompt_tokens import encode_prompt, prompt_text
from lora_dpo.quickstart import DATA_DIR, HERE, MODEL_DIR
from lora_dpo.quickstart.reward import true_reward
from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.store import write_json

logger = logging.getLogger("lora_dpo")

SAMPLES = 200
TOKENS = 120


@dataclass(frozen=True)
class Summary:
    """What the quickstart found: before is the reference, after the policy."""

    accuracy: Estimate
    reward_before: Estimate
    reward_after: Estimate
    reward_gain: Estimate
    kl: Estimate
    words_before: float
    words_after: float
    merge_kl: float
    seconds: float

    def table(self) -> str:
        """Return the before/after table, 95 % intervals in brackets."""
        rows = [
            ("", "reference", "policy"),
            ("true reward of fresh samples", str(self.reward_before), str(self.reward_after)),
            ("  gain, same prompts", "", str(self.reward_gain)),
            ("held-out reward accuracy", "0.5 (a tie)", str(self.accuracy)),
            ("KL to the reference, nats a sample", "0", str(self.kl)),
            ("words a sample", f"{self.words_before:.1f}", f"{self.words_after:.1f}"),
            ("KL policy to merged model, nats a token", "", f"{self.merge_kl:.2e}"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def quickstart_config(to: Path) -> Config:
    """Return the quickstart's config with its paths inside this package and its output in ``to``."""
    config = Config.load(HERE / "quickstart.yaml")
    for key, value in {
        "model.base": str(MODEL_DIR),
        "data.train": [{"path": str(DATA_DIR / "train.jsonl")}],
        "data.eval": [{"path": str(DATA_DIR / "heldout.jsonl")}],
        "output.dir": str(to / "run"),
    }.items():
        config = config.replace(key, value)
    return config


def run_quickstart(to: str | Path) -> Summary:
    """Run it all and print the table; everything is written below ``to``.

    Raises:
        OutputError: ``to`` holds an earlier quickstart.
    """
    folder, began = Path(to), time.monotonic()
    config = quickstart_config(folder)
    run = train(config)
    policy, tokenizer = run.load_policy(), run.tokenizer()
    prompts = _eval_prompts()
    samples = generate_side_by_side(
        policy, tokenizer, prompts, max_new_tokens=TOKENS, temperature=1.0, batch_size=SAMPLES
    )
    kl = _kl_to_reference(policy, tokenizer, prompts, [s.policy for s in samples])
    proof = export(run, folder / "merged", merge=True).proof
    assert proof is not None  # a merge always has one
    summary = _summarise(run, samples, kl, proof.kl, time.monotonic() - began)
    write_json(folder / "summary.json", asdict(summary))
    _show(folder, samples, summary, str(proof))
    return summary


def _eval_prompts() -> list[Any]:
    text = (DATA_DIR / "eval_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()][:SAMPLES]


def _kl_to_reference(
    policy: Any, tokenizer: Any, prompts: list[Any], completions: list[str]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-ratio of each of the policy's own samples: unbiased for its KL to the reference."""
    rows = [
        {
            "prompt_ids": encode_prompt(tokenizer, prompt),
            "completion_ids": [
                *tokenizer(text, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ],
            "label": True,
            "file": "<samples>",
            "row": i + 1,
        }
        for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
    ]
    found = []
    policy.eval()
    for start in range(0, len(rows), 50):
        batch = collate_labelled(rows[start : start + 50], pad_id=tokenizer.pad_token_id)
        batch = batch.to(home_device(policy))
        with torch.no_grad():
            mine = completion_logps(policy, batch)
        with reference(policy):
            found.append((mine - completion_logps(policy, batch)).double().cpu().numpy())
    return np.concatenate(found)


def _summarise(
    run: Run, samples: list[SideBySide], kl: Any, merge_kl: float, seconds: float
) -> Summary:
    each = np.arange(len(samples))
    before = np.array([true_reward(s.reference) for s in samples])
    after = np.array([true_reward(s.policy) for s in samples])
    return Summary(
        accuracy=Estimate(*run.results["held_out"]["mean_low_high"]["rewards/accuracies"]),
        reward_before=mean_interval(before, each),
        reward_after=mean_interval(after, each),
        reward_gain=mean_interval(after - before, each),
        kl=mean_interval(kl, each),
        words_before=float(np.mean([len(s.reference.split()) for s in samples])),
        words_after=float(np.mean([len(s.policy.split()) for s in samples])),
        merge_kl=merge_kl,
        seconds=seconds,
    )


def _show(folder: Path, samples: list[SideBySide], summary: Summary, proof: str) -> None:
    print("\n--- the same prompt, before and after " + "-" * 40)
    for sample in samples[:3]:
        print(f"{prompt_text(sample.prompt)}")
        print(f"  reference: {sample.reference}")
        print(f"  policy:    {sample.policy}\n")
    print("--- before and after: mean [95 % interval] " + "-" * 35)
    print(summary.table())
    print(f"\nproof of the merge: {proof}")
    print(
        f"\n{summary.seconds:.0f} s. The reward is the rule in {HERE / 'reward.py'}.\n"
        f"run: {folder / 'run'}   merged model: {folder / 'merged'}   figures: {folder / 'summary.json'}\n"
        f'next: lora-dpo generate {folder / "run"} --prompt "Tell me a story about a fox."'
    )
