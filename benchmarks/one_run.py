"""One timed training run in a process of its own; ``compare_trl.py`` starts it, not you.

python benchmarks/one_run.py SPEC.json RESULT.json
"""

from __future__ import annotations

import gc
import inspect
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import shapes

GIB = 1024**3


def cpu_seconds() -> float:
    """Return user and system seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(
        f"/proc/self/status has no {key}; memory on the CPU is measured on Linux alone."
    )


class Meter:
    """Wall and CPU seconds of every optimiser step, and the peak memory of the training."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.resets = True
        self._last = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        """Return wall and CPU seconds, when all work of the device is done."""
        import torch

        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), cpu_seconds()

    def built(self) -> None:
        """The model is there: what is measured of memory is counted from here."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.resident = torch.cuda.memory_allocated(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        except OSError:
            self.resets = False
        self.resident = _status("VmRSS")

    def begin(self) -> None:
        """Start the first step."""
        self._last = self.now()

    def step(self) -> None:
        """Count a step."""
        now = self.now()
        self.wall.append(now[0] - self._last[0])
        self.cpu.append(now[1] - self._last[1])
        self._last = now

    def memory(self) -> dict[str, Any]:
        """Return the peak: on CUDA the allocator's, on the CPU resident memory above the model."""
        import torch

        if self.cuda:
            found = {
                "measure": "CUDA allocator",
                "peak": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        else:
            what = "resident above the built model"
            what += "" if self.resets else " (peak of building included: clear_refs not writable)"
            found = {"measure": what, "peak": _status("VmHWM") - self.resident}
        found["after_model"] = self.resident
        return {k: v if isinstance(v, str) else round(v / GIB, 4) for k, v in found.items()}


def timer(meter: Meter) -> Any:
    """Return the callback that both trainers get."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step()

    return Timer()


def common(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the training arguments that both sides get."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": spec["micro"],
        "gradient_accumulation_steps": spec["accum"],
        "max_steps": spec["warmup"] + spec["steps"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
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


def ours(spec: dict[str, Any], model: Any, pairs: Any, meter: Meter, folder: str) -> Any:
    """Train with ``PreferenceTrainer``."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from lora_dpo import PreferenceTrainer, load_policy, objectives
    from lora_dpo.config import LoraConfig
    from lora_dpo.data.lengths import Measure
    from lora_dpo.data.report import DataReport
    from lora_dpo.data.tokenising import Tokenised

    policy = load_policy(model, lora=LoraConfig(rank=spec["rank"], alpha=2.0 * spec["rank"]))
    measure = Measure(("chosen", "rejected"))
    for pair in pairs:
        lengths = [len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
        measure.before.append(lengths[0] + max(lengths[1:]))
        measure.prompts.append(lengths[0])
        measure.answers.append(tuple(lengths[1:]))
    place = [{"prompt_key": str(i), "file": "benchmark", "row": i} for i in range(len(pairs))]
    rows = Dataset.from_list([{**pair, **at} for pair, at in zip(pairs, place, strict=True)])
    report = DataReport("tokenising", read=len(pairs))
    data = Tokenised("paired", rows, report, measure.summary())
    taken = inspect.signature(PreferenceTrainer.__init__).parameters
    fields = TrainingArguments.__dataclass_fields__
    for key in spec["ours"]:
        if key not in taken and key not in fields:
            raise SystemExit(
                f"--ours {key}: neither PreferenceTrainer nor TrainingArguments takes it; look at "
                "the signature of PreferenceTrainer in this version."
            )
    extra = {k: v for k, v in spec["ours"].items() if k in taken}
    settings = {k: v for k, v in spec["ours"].items() if k not in taken}
    if spec["mem_cap_gib"] and spec["device"] != "cpu":
        # the cap is torch's own: the card's free memory, which the planner reads, does not know it
        extra.setdefault("memory_budget_gib", spec["mem_cap_gib"] - 0.3)
    return PreferenceTrainer(
        policy,
        objective=objectives.get("dpo").bind(beta=spec["beta"]),
        args=TrainingArguments(**{**common(spec, folder), **settings}),
        train_data=data,
        callbacks=[timer(meter)],
        **extra,
    )


def theirs(spec: dict[str, Any], model: Any, pairs: Any, meter: Meter, folder: str) -> Any:
    """Train with TRL's ``DPOTrainer``; of it only the tokenising is replaced, by the given ids."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    variant = spec["variant"]

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
        args=trl.DPOConfig(
            **common(spec, folder),
            beta=spec["beta"],
            bf16=spec["device"] != "cpu",
            max_length=None,
            precompute_ref_log_probs="precompute" in variant,
            padding_free="padding_free" in variant,
            use_liger_kernel="liger" in variant,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=spec["rank"],
            lora_alpha=2 * spec["rank"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[timer(meter)],
    )
    if "fp32" in variant:  # TRL casts QLoRA adapters to bfloat16, which is slow on many CPUs
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    return trainer


def build(spec: dict[str, Any], device: Any) -> Any:
    """Return the model, the same on both sides."""
    import torch

    from lora_dpo.policy.bases import guard_cpu_kernels

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if spec["model"]:
        model = shapes.load_folder(spec["model"], device, dtype)
    else:
        config = shapes.preset_config(spec["preset"], spec["layers"])
        model = shapes.build_nf4(config, device, dtype, spec["seed"])
    model.config.use_cache = False
    guard_cpu_kernels(model)  # else gradients on CPUs with AVX512-BF16 are wrong, on either side
    return model


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, 5) for key, value in found.items()}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what was measured."""
    import datasets  # noqa: F401  (imported before memory is counted, on both sides)
    import torch
    import trl

    import lora_dpo.trainer  # noqa: F401

    _ = trl.DPOTrainer, trl.DPOConfig
    device = torch.device(spec["device"])
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        if cap := spec["mem_cap_gib"]:
            share = cap * GIB / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    torch.manual_seed(spec["seed"])
    pairs = shapes.read_pairs(Path(spec["pairs_file"]))
    meter = Meter(device)
    model = build(spec, device)
    meter.built()
    began = meter.now()
    with tempfile.TemporaryDirectory() as folder:
        side = ours if spec["side"] == "ours" else theirs
        trainer = side(spec, model, pairs, meter, folder)
        init = meter.now()[0] - began[0]
        trainer.train()
    log = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    per_step, skip = spec["micro"] * spec["accum"], spec["warmup"]
    timed = pairs[skip * per_step :]
    wall, cpu = meter.wall[skip:], meter.cpu[skip:]
    reference = getattr(trainer, "reference_pass", (0.0, 0.0))
    # the pass over all pairs belongs to all epochs that read it
    share = len(timed) / len(pairs) / spec["epochs"]
    whole = (sum(wall) + reference[0] * share, sum(cpu) + reference[1] * share)
    result = {
        "pairs_per_s": round(len(timed) / whole[0], 4),
        "cpu_s_per_pair": round(whole[1] / len(timed), 5),
        "tokens_per_s": round(sum(map(shapes.usual_tokens, timed)) / whole[0], 1),
        "step_s": spread(wall),
        "step_cpu_s": spread(cpu),
        "memory_gib": meter.memory(),
        "first_loss": log[0],
        "init_s": round(init, 2),
        "adapter_dtype": str(trained[0].dtype),
        "adapter_parameters": sum(p.numel() for p in trained),
    }
    if "precompute" in spec["variant"]:
        result["reference_pass"] = {
            "wall_s": round(reference[0], 3),
            "cpu_s": round(reference[1], 3),
        }
    if "padding_free" in spec["variant"]:
        result["padding_free_active"] = bool(trainer.padding_free)
    return result


def main(spec_file: str, result_file: str) -> None:
    """Run one specification; running out of memory is a result."""
    import torch

    warnings.simplefilter("ignore")
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    try:
        result = run(spec)
    except torch.OutOfMemoryError as error:
        result = {"error": "out of memory: " + str(error).splitlines()[0][:200]}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
