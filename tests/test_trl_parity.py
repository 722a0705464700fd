"""One optimiser step of ours against one of TRL's ``DPOTrainer``, on the same 4-bit model and data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainingArguments,
)

from lora_dpo import objectives
from lora_dpo.data import collate_pairs, load_preferences, tokenise
from lora_dpo.forward import pair_stats
from lora_dpo.policy import load_policy
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter

trl = pytest.importorskip("trl")

LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


class Gradients(TrainerCallback):
    """Keep the adapter's gradient as the optimiser is about to see it."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **kw: Any
    ) -> None:
        self.found = {
            n.replace(".default", ""): p.grad.detach().float().clone()
            for n, p in model.named_parameters()
            if p.requires_grad
        }


def _arguments(kind: Any, folder: Path, **extra: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=3,
        **extra,
    )


def _theirs(
    tiny: Path, adapter: dict[str, torch.Tensor], pairs: Any, beta: float, folder: Path
) -> tuple[float, dict[str, torch.Tensor], Any]:
    base = AutoModelForCausalLM.from_pretrained(
        tiny,
        attention_dropout=0.0,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    keep = Gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            model=base,
            args=_arguments(
                trl.DPOConfig, folder, beta=beta, gradient_checkpointing=False, bf16=False
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(tiny),
            peft_config=peft.LoraConfig(**LORA),
            callbacks=[keep],
        )
        for (
            module
        ) in trainer.model.modules():  # the same guard as ours, else its gradients are wrong
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = False
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL casts QLoRA adapters to bfloat16
        missing = trainer.model.load_state_dict(adapter, strict=False)
        assert not missing.unexpected_keys
        trainer.train()
    return trainer.state.log_history[0]["loss"], keep.found, trainer.train_dataset


@pytest.mark.parametrize(("beta", "std"), [(0.1, 0.1), (0.5, 0.03)])
def test_one_optimiser_step_equals_trls(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path, beta: float, std: float
) -> None:
    four = pairs[:4]
    torch.manual_seed(0)
    policy = load_policy(tiny_model, lora=peft.LoraConfig(**LORA))
    move_adapter(policy, std=std)
    adapter = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" in n}
    their_loss, their_gradient, their_rows = _theirs(
        tiny_model, adapter, four, beta, tmp_path / "trl"
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = tokenise(load_preferences(four), tokenizer, max_length=1024)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(rows.rows[column]) == list(their_rows[column])
    assert len({len(ids) for ids in rows.rows["chosen_ids"]}) > 1

    with torch.no_grad():
        margins = beta * pair_stats(policy.eval(), collate_pairs(rows.rows, pad_id=0)).margins
    assert 0.3 < float(margins.abs().mean()) < 3  # else every beta would give ln 2

    keep = Gradients()
    trainer = PreferenceTrainer(
        policy,
        objective=objectives.get("dpo").bind(beta=beta),
        args=_arguments(TrainingArguments, tmp_path / "ours"),
        train_data=rows,
        reference_is="base",
        callbacks=[keep],
    )
    trainer.train()
    log = trainer.state.log_history[0]

    assert log["loss"] == pytest.approx(their_loss, abs=1e-4)
    mine, theirs = (
        torch.cat([found[key].flatten() for key in sorted(keep.found)])
        for found in (keep.found, their_gradient)
    )
    cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=0)
    assert float(cosine) > 0.999
    assert float(mine.norm() / theirs.norm()) == pytest.approx(1.0, abs=1e-3)
