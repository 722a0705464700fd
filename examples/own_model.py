"""Bring your own ``PeftModel`` and ``datasets.Dataset``; keep ``TrainingArguments`` as you know them.

python examples/own_model.py [steps]
"""

from __future__ import annotations

import sys
import tempfile

import peft
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
)

from lora_dpo import PreferenceTrainer, objectives
from lora_dpo.quickstart import DATA_DIR, MODEL_DIR


def main(steps: int = 5) -> float:
    """Train for a few steps and return the last logged loss."""
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, quantization_config=quantisation, dtype="float32"
    )
    policy = peft.get_peft_model(
        base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            policy,
            objective=objectives.get("dpo").bind(beta=0.5),
            args=TrainingArguments(
                output_dir=folder, max_steps=steps, learning_rate=5e-4, logging_steps=1
            ),
            train_data=Dataset.from_json(str(DATA_DIR / "train.jsonl")),
            tokenizer=AutoTokenizer.from_pretrained(MODEL_DIR),
            max_length=256,
        )
        trainer.train()
        loss: float = [entry for entry in trainer.state.log_history if "loss" in entry][-1]["loss"]
        return loss


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
