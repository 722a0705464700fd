"""DPO without a trainer: policy, reference, objective and optimiser in one loop of plain torch.

python examples/plain_loop.py [steps]
"""

from __future__ import annotations

import random
import sys

import torch
from transformers import AutoTokenizer

from lora_dpo import load_policy, load_preferences, objectives, pair_stats, tokenise
from lora_dpo.data import collate_pairs
from lora_dpo.quickstart import DATA_DIR, MODEL_DIR


def main(steps: int = 20, batch_size: int = 8, beta: float = 0.5) -> list[float]:
    """Train for a few steps and return the losses."""
    torch.manual_seed(0)
    policy = load_policy(MODEL_DIR)  # NF4 base, LoRA on all linear layers
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    pairs = tokenise(load_preferences(DATA_DIR / "train.jsonl"), tokenizer, max_length=256)
    optimiser = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=5e-4)
    draw, losses = random.Random(0), []
    for step in range(steps):
        rows = [pairs.rows[i] for i in draw.sample(range(len(pairs)), batch_size)]
        batch = collate_pairs(rows, pad_id=tokenizer.pad_token_id)
        stats = pair_stats(policy, batch)  # runs the reference, then the policy
        loss = objectives.dpo(stats, beta=beta).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}  loss {losses[-1]:.4f}  margin {stats.margins.mean().item():+.3f}")
    return losses


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
