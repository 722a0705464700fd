"""Optimisers that keep their state in 8 bits: real ones, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

from lora_dpo.config import LoraConfig
from lora_dpo.policy import load_policy
from lora_dpo.trainer import PreferenceTrainer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimisers_train_with_states_of_a_byte(
    optim: str, tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    options = {"save_strategy": "no", "report_to": [], "use_cpu": True, "logging_steps": 1}
    trainer = PreferenceTrainer(
        load_policy(tiny_model, lora=LoraConfig(rank=64)),  # matrices of 4096 weights and more
        args=TrainingArguments(
            output_dir=str(tmp_path), optim=optim, max_steps=6, learning_rate=2e-3, **options
        ),
        train_data=pairs[:2],
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    states = trainer.optimizer.optimizer.state
    kinds = {s["state1"].dtype for p, s in states.items() if p.numel() >= 4096}
    assert kinds == {torch.uint8}
