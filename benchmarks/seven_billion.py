"""A model of Mistral-7B's shape on a small machine: memory and time of every phase.

The checkpoint has random weights and is written layer by layer. It is then loaded in NF4, trained
for one step, merged and proven, through the public API. Training and merge run in processes of
their own, so that no phase inherits the memory of an earlier one.

    python benchmarks/seven_billion.py --folder scratch --out benchmarks/results/mine.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GIB = 2**30
SAMPLE_SECONDS = 0.05
SEED = 0
STD = 0.02
PAIRS = 2
LEARNING_RATE = 1e-4

SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass
class Phase:
    """Time and memory of one phase; bytes.

    Args:
        name: what was done.
        seconds: wall time.
        start_anon: memory that the process held of its own (RssAnon) when the phase began.
        peak_anon: the most that it held of its own.
        peak_rss: the most that was resident, pages of mapped files included; the system takes
            those back when memory is short.
    """

    name: str
    seconds: float
    start_anon: int
    peak_anon: int
    peak_rss: int

    def row(self) -> str:
        """Return a row of the table."""
        sizes = (self.start_anon, self.peak_anon, self.peak_anon - self.start_anon, self.peak_rss)
        cells = " | ".join(f"{size / GIB:.2f}" for size in sizes)
        return f"| {self.name} | {self.seconds:.0f} | {cells} |"


HEADER = (
    "| phase | seconds | own memory at its start, GiB | its peak | growth | peak resident |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


class Meter:
    """Samples the memory of this process; each sample counts for the phase that is running."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._current: Phase | None = None
        self._began = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self, name: str) -> None:
        """End the running phase and begin the next."""
        self.end()
        anon, rss = memory()
        self._began = time.monotonic()
        self._current = Phase(name, 0.0, anon, anon, rss)
        print(f"{name} ...", flush=True)

    def end(self) -> None:
        """End the running phase."""
        phase, self._current = self._current, None
        if phase is not None:
            self._sample(phase)
            phase.seconds = time.monotonic() - self._began
            self.phases.append(phase)
            print(phase.row(), flush=True)

    @contextmanager
    def watching(self) -> Iterator[Meter]:
        """Sample while the block runs."""
        self._thread.start()
        try:
            yield self
            self.end()
        finally:
            self._ended.set()

    def before(self, owner: Any, function: str, name: str) -> None:
        """Let a phase begin where ``owner.function`` is called."""
        original: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            return original(*args, **kwargs)

        setattr(owner, function, marked)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            if (phase := self._current) is not None:
                self._sample(phase)

    @staticmethod
    def _sample(phase: Phase) -> None:
        anon, rss = memory()
        phase.peak_anon = max(phase.peak_anon, anon)
        phase.peak_rss = max(phase.peak_rss, rss)


def memory() -> tuple[int, int]:
    """Return RssAnon and VmRSS of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    anon, rss = (int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return anon, rss


# ---- phases: each takes the arguments and a meter, and returns what it found ---------------------


def build(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Write the checkpoint: config, tokenizer, and a shard of random bfloat16 weights a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    meter.begin("build the checkpoint")
    folder = args.folder / "base"
    folder.mkdir(parents=True)
    config = MistralConfig(
        **SHAPE,
        num_hidden_layers=args.layers,
        dtype="bfloat16",
        architectures=["MistralForCausalLM"],
    )
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in MistralForCausalLM(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "outer"
        groups.setdefault(part, []).append(name)
    generator = torch.Generator().manual_seed(SEED)
    weight_map = {}
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shard = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(
                std=STD, generator=generator
            )
            if len(shapes[name]) == 2
            else torch.ones(shapes[name], dtype=torch.bfloat16)
            for name in names
        }
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    weights = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * weights}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {"weights": weights, "base_gib": 2 * weights / GIB}


def train(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Load in NF4, train a step, keep the adapter, and measure how far it moved."""
    import torch

    from lora_dpo import PreferenceTrainer, load_policy, pair_stats
    from lora_dpo.arguments import build_arguments
    from lora_dpo.data import collate_pairs
    from lora_dpo.policy import save_adapter

    data = tokenised_pairs(args)
    meter.begin("load in NF4")
    policy = load_policy(str(args.folder / "base"), compute_dtype=args.compute_dtype)
    meter.begin("train: checks before the first step")
    arguments = build_arguments(
        {
            "max_steps": 1,
            "per_device_train_batch_size": PAIRS,
            "gradient_accumulation_steps": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        output_dir=str(args.folder / "run"),
        evaluates=False,
    )
    trainer = PreferenceTrainer(policy, args=arguments, train_data=data)
    meter.before(trainer, "training_step", f"train: one step of {PAIRS} pairs")
    trainer.train()
    meter.end()
    save_adapter(policy, args.folder / "adapter")
    with torch.no_grad():
        stats = pair_stats(policy.eval(), collate_pairs([data.rows[0]], pad_id=0))
    ratios = torch.cat([stats.chosen_logratios, stats.rejected_logratios])
    return {
        "tokens_a_row": data.summary.total.max,
        "step": trainer.state.log_history[0],
        "log_ratio_after_step": float(ratios.abs().max()),
    }


def merge(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Load base and adapter again, merge them, and prove the merged model."""
    import torch
    from transformers import AutoTokenizer

    from lora_dpo import export_merged, exporting, load_policy, proving

    base = str(args.folder / "base")
    row = tokenised_pairs(args).rows[0]
    meter.before(exporting, "_write_weights", "merge: write the shards")
    meter.before(exporting, "_write_settings", "proof: run the policy")
    meter.before(exporting, "prove", "proof: load and run the merged model")
    found: dict[str, Any] = {}
    load = proving.load_plain

    def noting_places(*args: Any) -> Any:
        model: Any = load(*args)
        places = Counter("disk" if p.is_meta else str(p.device) for p in model.parameters())
        found["tensors_of_the_merged_model_on"] = dict(places)
        return model

    setattr(proving, "load_plain", noting_places)  # noqa: B010 (a function that mypy guards)
    meter.begin("load in NF4 with the adapter")
    proof = export_merged(
        lambda: load_policy(
            base, compute_dtype=args.compute_dtype, adapter=args.folder / "adapter"
        ),
        AutoTokenizer.from_pretrained(base),
        args.folder / "merged",
        sequences=[(row["prompt_ids"], row["chosen_ids"][:8])],
        # bfloat16 rounds each weight by up to 0.4 %, which random weights, unlike trained ones,
        # carry into KL 6e-4 after 32 layers, beyond the gate
        dtype=torch.float16,
    )
    meter.end()
    files = sum(p.stat().st_size for p in (args.folder / "merged").glob("*.safetensors"))
    print(proof)
    return {**found, "merged_gib": files / GIB, "proof": asdict(proof), "verdict": str(proof)}


def tokenised_pairs(args: argparse.Namespace) -> Any:
    """Return a few pairs of about ``args.tokens`` tokens a row: a byte is a token."""
    from transformers import AutoTokenizer

    from lora_dpo import load_preferences, tokenise

    half = max(args.tokens // 2, 12)
    pairs = [
        {
            "prompt": f"Question {i}: ".ljust(half - 2 * i, "?"),
            "chosen": " yes".ljust(half - 1 - i, "."),
            "rejected": " no, no".ljust(half - 1, "!"),
        }
        for i in range(PAIRS)
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "base")
    return tokenise(load_preferences(pairs, kind="paired"), tokenizer, max_length=4 * half)


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


# ---- the whole benchmark -------------------------------------------------------------------------

PROCESSES: dict[str, Callable[[argparse.Namespace, Meter], dict[str, Any]]] = {
    "build": build,
    "train": train,
    "merge": merge,
}


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Run every process and return machine, versions, settings, phases and findings."""
    from lora_dpo.run_folder import versions

    phases: list[dict[str, Any]] = []
    findings: dict[str, Any] = {}
    for process in PROCESSES:
        report = args.folder / f"{process}.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--process", process]
        subprocess.run(command, check=True)
        read = json.loads(report.read_text(encoding="utf-8"))
        phases += [{"process": process, **phase} for phase in read["phases"]]
        findings |= read["found"]
    return {
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "layers": args.layers,
            "compute_dtype": args.compute_dtype,
            "pairs": PAIRS,
            "learning_rate": LEARNING_RATE,
            **SHAPE,
        },
        "phases": phases,
        "found": findings,
    }


def run_one(args: argparse.Namespace) -> None:
    """Run one process's phases and leave its report in the folder."""
    with Meter().watching() as meter:
        found = PROCESSES[args.process](args, meter)
    report = {"phases": [asdict(phase) for phase in meter.phases], "found": found}
    (args.folder / f"{args.process}.json").write_text(json.dumps(report), encoding="utf-8")


def machine() -> dict[str, Any]:
    """Describe the processor and the memory."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = {line.split(":", 1)[1].strip() for line in info if line.startswith("model name")}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": ", ".join(sorted(models)),
        "cores": os.cpu_count(),
        "ram_gib": round(pages / GIB, 1),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="new folder; needs 30 GiB")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a rehearsal")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a row, roughly")
    parser.add_argument(
        "--compute-dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"]
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--process", choices=list(PROCESSES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark, print its table and write its results."""
    args = parse()
    if args.process:
        run_one(args)
        return
    args.folder.mkdir(parents=True)
    try:
        results = run_all(args)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    print(HEADER)
    for phase in results["phases"]:
        print(Phase(**{k: v for k, v in phase.items() if k != "process"}).row())
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
