"""The two sides of the comparison: the same model and arguments, and each side's trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import shapes


def common(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the training arguments that both sides get."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": spec["micro"],
        "gradient_accumulation_steps": spec["accum"],
        "max_steps": spec["warmup"] + (1 if spec["profile"] else spec["steps"]),
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_8bit" if "8bit" in spec["variant"] else "adamw_torch",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": "gc" in spec["variant"],
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": spec["device"] == "cpu",
        "seed": spec["seed"],
    }


def ours(
    spec: dict[str, Any], model: Any, pairs: Any, meter: Any, callbacks: list[Any], folder: str
) -> Any:
    """Train with ``PreferenceTrainer``."""
    from transformers import TrainingArguments

    from lora_dpo import PreferenceTrainer, load_policy, objectives
    from lora_dpo.config import LoraConfig
    from lora_dpo.engine import recompute_layers
    from lora_dpo.heads import causal_lm
    from lora_dpo.layers import decoder_layers

    policy = load_policy(model, lora=LoraConfig(rank=spec["rank"], alpha=2.0 * spec["rank"]))
    taken = inspect.signature(PreferenceTrainer.__init__).parameters
    known = {*TrainingArguments.__dataclass_fields__, *taken}
    refuse_unknown("--ours", spec["ours"], known, "PreferenceTrainer")
    extra = {k: v for k, v in spec["ours"].items() if k in taken}
    settings = {k: v for k, v in spec["ours"].items() if k not in taken}
    if spec["mem_cap_gib"] and spec["device"] != "cpu":
        # the cap is torch's own: the card's free memory, which the planner reads, does not know it
        extra.setdefault("memory_budget_gib", spec["mem_cap_gib"] - 0.3)
    if "cached" in spec["variant"]:
        extra["reference_cache"] = f"{folder}/reference"
    with timed_fill(meter) as passed:
        trainer = PreferenceTrainer(
            policy,
            objective=objectives.get("dpo").bind(beta=spec["beta"]),
            args=TrainingArguments(**{**common(spec, folder), **settings}),
            train_data=tokenised(pairs),
            callbacks=callbacks,
            **extra,
        )
    trainer.reference_pass = tuple(passed)
    if "all" in spec["variant"]:  # whatever would fit
        layers = len(decoder_layers(causal_lm(trainer.model)))
        recompute_layers(trainer.model, layers, keeps_weights=True, offloaded=False)
    return trainer


def tokenised(pairs: Any) -> Any:
    """Return pairs of ids as the rows that ``tokenise`` would make of their texts."""
    from datasets import Dataset

    from lora_dpo.data.lengths import Measure
    from lora_dpo.data.report import DataReport
    from lora_dpo.data.tokenising import Tokenised

    measure = Measure(("chosen", "rejected"))
    for pair in pairs:
        lengths = [len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
        measure.before.append(lengths[0] + max(lengths[1:]))
        measure.prompts.append(lengths[0])
        measure.answers.append(tuple(lengths[1:]))
    place = [{"prompt_key": str(i), "file": "benchmark", "row": i} for i in range(len(pairs))]
    rows = Dataset.from_list([{**pair, **at} for pair, at in zip(pairs, place, strict=True)])
    report = DataReport("tokenising", read=len(pairs))
    return Tokenised("paired", rows, report, measure.summary())


def refuse_unknown(option: str, given: dict[str, Any], known: set[str], owner: str) -> None:
    """Stop at a key that nothing takes."""
    for key in given:
        if key not in known:
            raise SystemExit(
                f"{option} {key}: {owner} and its arguments do not take it; look at their signatures "
                "in this version."
            )


@contextmanager
def timed_fill(meter: Any) -> Iterator[list[float]]:
    """Measure wall and CPU seconds of what fills our store of reference log-probs."""
    from lora_dpo.reference_store import ReferenceStore

    store: Any = ReferenceStore
    passed, fill = [0.0, 0.0], store.rows_of

    def rows_of(*args: Any, **kwargs: Any) -> Any:
        began = meter.now()
        found = fill(*args, **kwargs)
        passed[:] = [
            was + end - start for was, end, start in zip(passed, meter.now(), began, strict=True)
        ]
        return found

    store.rows_of = rows_of
    try:
        yield passed
    finally:
        store.rows_of = fill


def theirs(
    spec: dict[str, Any], model: Any, pairs: Any, meter: Any, callbacks: list[Any], folder: str
) -> Any:
    """Train with TRL's ``DPOTrainer``; of it only the tokenising is replaced, by the given ids."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    variant = spec["variant"]
    refuse_unknown("--trl", spec["trl"], {*trl.DPOConfig.__dataclass_fields__}, "DPOConfig")
    settings = {
        **common(spec, folder),
        "beta": spec["beta"],
        "bf16": spec["device"] != "cpu",
        "max_length": None,
        "precompute_ref_log_probs": "precompute" in variant,
        "padding_free": "padding_free" in variant,
        "use_liger_kernel": "liger" in variant,
        "activation_offloading": "offload" in variant,
    }

    class FromIds(trl.DPOTrainer):
        reference_pass = (0.0, 0.0)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = meter.now()
            found = super()._precompute_ref_logps(*args, **kwargs)
            ended = meter.now()
            self.reference_pass = (ended[0] - began[0], ended[1] - began[1])
            return found

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    trainer = FromIds(
        model=model,
        args=trl.DPOConfig(**{**settings, **spec["trl"]}),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=spec["rank"],
            lora_alpha=2 * spec["rank"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=callbacks,
    )
    if "fp32" in variant:  # TRL casts QLoRA adapters to bfloat16, which is slow on many CPUs
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    return trainer


def build(spec: dict[str, Any], device: Any) -> Any:
    """Return the model, the same on both sides."""
    import torch

    from lora_dpo.policy.bases import guard_cpu_kernels, keep_embeddings_on_cpu

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if spec["model"]:
        model = shapes.load_folder(spec["model"], device, dtype)
    else:
        config = shapes.preset_config(spec["preset"], spec["layers"])
        model = shapes.build_nf4(config, device, dtype, spec["seed"])
    model.config.use_cache = False
    guard_cpu_kernels(model)  # else gradients on CPUs with AVX512-BF16 are wrong, on either side
    if "cpuembed" in spec["variant"]:
        if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
            raise SystemExit("cpuembed: the embeddings of this model are its head too.")
        keep_embeddings_on_cpu(model)
    return model


def layout(trainer: Any) -> dict[str, Any]:
    """Return what decides how many operations a run took; read it when the run is over.

    A budget, a card with room or a shortage of memory decides how many layers of ours are recomputed.
    """
    from lora_dpo.engine import is_flat
    from lora_dpo.heads import causal_lm
    from lora_dpo.layers import decoder_layers, work_of

    causal = causal_lm(trainer.model)
    layers, work = decoder_layers(causal), work_of(causal)
    recomputed, skips_last = sum(layer.gradient_checkpointing for layer in layers), False
    if work is not None and work.layers:
        recomputed, skips_last = min(work.recomputed, len(layers)), work.skips_last
    return {
        "layers": len(layers),
        "recomputed_layers": recomputed,
        "skips_last": skips_last,
        "shared_prompts": is_flat(trainer.model),
        "engine": getattr(trainer, "engine", "transformers and peft"),
    }
