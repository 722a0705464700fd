"""TRL's ``DPOTrainer`` against our ``PreferenceTrainer``: same model, pairs, LoRA and batch.

    python benchmarks/compare_trl.py --tiny
    python benchmarks/compare_trl.py --preset llama3-8b --prompt 512 --response 512 --mem-cap-gib 24

Every run has a process of its own, and the runs of a repeat alternate. A run is named ``side`` or
``side+option+option``. Options of both: ``gc`` (gradient checkpointing), ``8bit`` (AdamW of
bitsandbytes with 8-bit state, an approximation), ``microN`` (N pairs a micro-batch, the same pairs a
step). Of ours: ``all`` (with ``gc``: every layer recomputed, whatever would fit), ``cached`` (stored
reference log-probs; the pass that fills the store is charged to the pairs, over ``--epochs``),
``cpuembed`` (input embeddings on the CPU). Of TRL: ``precompute`` (the same as ``cached``),
``offload`` (its activation offloading), ``padding_free`` (accepted and switched off by TRL 1.16),
``liger``, and ``fp32`` (adapters kept in float32 as ours are, which TRL has no option for; on a CPU
it can be the faster). ``--trl key=value`` sets any other field of its ``DPOConfig``. Ratios are ours
to TRL's best: at equal recomputation, as the runs report it, without ``8bit`` and ``cpuembed``; and at
the best of each. Beside each stands the ceiling that the operations alone would allow.

``--profile`` adds one profiled step of every run, summed into parts.

    python benchmarks/compare_trl.py --longest --preset llama3-8b --mem-cap-gib 12

finds the longest pair (``--prompt`` to ``--response`` keep their ratio) that each run can train under
the cap, one pair at a time. On a CPU the cap is held against peak memory above the built model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import floors
import profiling
import shapes
import telling

HERE = Path(__file__).resolve().parent
OPTIONS = {
    "ours": {"gc", "8bit", "all", "cached", "cpuembed"},
    "trl": {"gc", "8bit", "precompute", "offload", "padding_free", "liger", "fp32"},
}
MICRO = re.compile(r"micro([1-9]\d*)")
RUNS = "ours,trl,trl+precompute,trl+fp32,ours+gc,ours+gc+all,trl+gc,trl+gc+fp32"
RUNS += ",ours+gc+all+8bit+cpuembed,trl+gc+8bit"
TINY_RUNS = "ours,trl,trl+fp32,trl+precompute+fp32"
TOKENIZER = HERE.parent / "lora_dpo" / "quickstart" / "model"


def key_value(text: str) -> tuple[str, Any]:
    """Read ``key=value``; the value is JSON, or else a word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected key=value, such as engine=plain")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def run_names(text: str) -> list[str]:
    """Read the comma-separated names of runs."""
    names = text.split(",")
    for name in names:
        side, *options = name.split("+")
        named = {option for option in options if not MICRO.fullmatch(option)}
        if side not in OPTIONS or (unknown := named - OPTIONS[side]):
            detail = f"no option {sorted(unknown)}" if side in OPTIONS else f"no side {side!r}"
            raise argparse.ArgumentTypeError(
                f"{name!r}: {detail}; sides and their options are "
                + "; ".join(f"{key}: {', '.join(sorted(OPTIONS[key]))}" for key in OPTIONS)
                + "; both: microN"
            )
        if "all" in options and "gc" not in options:
            raise argparse.ArgumentTypeError(f"{name!r}: all goes with gc.")
    return names


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--preset", choices=sorted(shapes.PRESETS), default="tiny")
    add("--model", help="a model folder in place of a preset")
    add("--layers", type=int, help="fewer layers than the preset has")
    add("--tiny", action="store_true", help="small enough for two CPU cores and a few minutes")
    add("--prompt", type=int, default=512)
    add("--response", type=int, default=512)
    add(
        "--jitter",
        type=float,
        default=0.0,
        help="draw lengths from [(1 - jitter) x length, length]",
    )
    add("--data", type=Path, help="real preferences (JSONL) in place of random ids")
    add("--tokenizer", help="folder, for --data with a preset; the bundled small one by default")
    add("--max-length", type=int, default=512, help="longer rows of --data are dropped")
    add("--micro", type=int, default=1, help="pairs of a micro-batch")
    add("--accum", type=int, default=4, help="micro-batches of a step")
    add("--steps", type=int, default=5, help="timed steps")
    add("--warmup", type=int, default=1, help="steps before them")
    add("--repeats", type=int, default=2)
    add("--epochs", type=int, default=1, help="epochs that share the cost of a reference pass")
    add("--rank", type=int, default=16)
    add("--beta", type=float, default=0.1)
    add("--learning-rate", type=float, default=1e-5)
    add("--runs", type=run_names, help=f"default {RUNS}; with --tiny {TINY_RUNS}")
    add("--ours", type=key_value, action="append", default=[], metavar="KEY=VALUE")
    add("--trl", type=key_value, action="append", default=[], metavar="KEY=VALUE")
    add("--profile", action="store_true", help="and one profiled step of each run, by part")
    add("--device", choices=("cpu", "cuda"))
    add("--mem-cap-gib", type=float, help="cap of torch's CUDA allocator: a smaller card")
    add("--longest", action="store_true", help="search the longest pair under --mem-cap-gib")
    add("--seed", type=int, default=0)
    add("--name", help="of the result file; made from the settings by default")
    add("--out", type=Path, help="folder of the results; benchmarks/results by default")
    args = parser.parse_args(words)
    if args.tiny:
        args.preset, args.device = "tiny", "cpu"
        args.prompt, args.response = min(args.prompt, 64), min(args.response, 32)
        args.accum = min(args.accum, 2)
    args.runs = args.runs or run_names(TINY_RUNS if args.tiny else RUNS)
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not 0 <= args.jitter < 1:
        parser.error("--jitter: expected 0 or more and less than 1.")
    if min(args.steps, args.micro, args.accum, args.repeats, args.epochs) < 1 or args.warmup < 0:
        parser.error(
            "--steps, --micro, --accum, --repeats, --epochs: 1 or more; --warmup: 0 or more."
        )
    if args.mem_cap_gib and args.device == "cpu" and not args.longest:
        parser.error("--mem-cap-gib caps CUDA's allocator; leave it out on a CPU.")
    if args.longest and (not args.mem_cap_gib or args.data):
        parser.error("--longest: give --mem-cap-gib, and lengths in place of --data.")
    for name in args.runs:
        if "offload" in name.split("+") and args.device == "cpu":
            parser.error(f"{name}: TRL's activation offloading needs a GPU.")
        micro, _ = batches(args, name)
        if args.micro * args.accum % micro:
            parser.error(
                f"{name}: {micro} pairs do not divide the {args.micro * args.accum} of a step."
            )
    return args


def batches(args: argparse.Namespace, name: str) -> tuple[int, int]:
    """Return the pairs of a micro-batch of a run, and its micro-batches a step."""
    found = [int(m[1]) for option in name.split("+") if (m := MICRO.fullmatch(option))]
    micro = found[-1] if found else args.micro
    return micro, args.micro * args.accum // micro


def model_config(args: argparse.Namespace) -> Any:
    """Return the config of the model that is trained."""
    if not args.model:
        return shapes.preset_config(args.preset, args.layers)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(args.model)


def write_pairs(args: argparse.Namespace, file: Path) -> list[dict[str, list[int]]]:
    """Write the pairs that every run reads."""
    count = (args.warmup + args.steps) * args.micro * args.accum
    vocab = model_config(args).vocab_size
    if args.data:
        source = args.tokenizer or args.model or str(TOKENIZER)
        pairs = shapes.real_pairs(args.data, source, vocab, count, args.max_length, args.seed)
    else:
        pairs = shapes.random_pairs(
            count, vocab, args.prompt, args.response, args.jitter, args.seed
        )
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return pairs


def one_run(
    args: argparse.Namespace, name: str, folder: Path, profile: bool = False
) -> dict[str, Any]:
    """Run one side in a fresh process."""
    side, *variant = name.split("+")
    keys = ("preset", "model", "layers", "steps", "warmup", "epochs", "rank")
    keys += ("beta", "learning_rate", "device", "mem_cap_gib", "seed")
    spec = {key: getattr(args, key) for key in keys}
    spec["micro"], spec["accum"] = batches(args, name)
    spec.update(side=side, variant=variant, ours=dict(args.ours), trl=dict(args.trl))
    spec["profile"] = profile
    spec["pairs_file"] = str(folder / "pairs.jsonl")
    asked, answer = folder / "spec.json", folder / "result.json"
    asked.write_text(json.dumps(spec), encoding="utf-8")
    answer.unlink(missing_ok=True)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    # Threads that wait by spinning burn CPU seconds on a busy machine, on both sides.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    settings = {**offline, **waiting, **memory, **os.environ}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    settings["HF_HOME"] = settings["HF_DATASETS_CACHE"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, str(HERE / "one_run.py"), str(asked), str(answer)],
        capture_output=True,
        text=True,
        env=settings,
    )
    if answer.exists():
        return dict(json.loads(answer.read_text(encoding="utf-8")))
    tail = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
    return {"error": f"exit status {done.returncode}: {tail[0][:300]}"}


# ---- the longest pair under a cap ----------------------------------------------------------------


def longest(
    args: argparse.Namespace, name: str, folder: Path, run: Callable[..., dict[str, Any]] = one_run
) -> dict[str, Any]:
    """Return the longest pair that a run trains under the cap, to one part in sixteen."""
    ratio, tried = args.response / args.prompt, []
    limit = model_config(args).max_position_embeddings

    def fits(prompt: int) -> bool:
        args.prompt, args.response = prompt, max(2, round(prompt * ratio))
        write_pairs(args, folder / "pairs.jsonl")
        found = run(args, name, folder)
        if "error" in found and "out of memory" not in found["error"]:
            raise SystemExit(f"{name} at {prompt} + 2 x {args.response}: {found['error']}")
        peak = found.get("memory_gib", {}).get("peak", float("inf"))
        good = "error" not in found and peak <= args.mem_cap_gib
        tried.append({"prompt": prompt, "response": args.response, "peak_gib": peak, "fits": good})
        print(json.dumps({"run": name, **tried[-1]}), flush=True)
        return good

    most = int(limit / (1 + ratio))
    low, high = 0, min(32, most)
    while fits(high):
        low, high = high, min(2 * high, most)
        if low == most:
            break
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {
        "prompt": low,
        "response": max(2, round(low * ratio)) if low else 0,
        "limited_by": "positions of the model" if low == most else "memory",
        "tried": tried,
    }


def search(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Search with every run; a pair a micro-batch, and a micro-batch a step."""
    if any(MICRO.search(name) for name in args.runs):
        raise SystemExit("--longest: one pair a micro-batch; leave microN out.")
    args.micro = args.accum = args.steps = args.warmup = 1
    asked = args.prompt, args.response
    found = {}
    for name in args.runs:
        args.prompt, args.response = asked
        found[name] = longest(args, name, folder)
    args.prompt, args.response = asked
    return found


# ---- all together --------------------------------------------------------------------------------


def operations(
    args: argparse.Namespace, pairs: list[dict[str, list[int]]], runs: list[dict[str, Any]]
) -> dict[str, float]:
    """Return the floating-point operations of a mean pair in every run, by what it reports it did."""
    config, groups = model_config(args), floors.groups_of(pairs)
    found = {}
    for run in runs:
        if "error" not in run:
            way = floors.Way.measured(run, run["run"], args.epochs, args.rank)
            found[run["run"]] = floors.flop(config, groups, way) / len(pairs)
    return found


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings without any folder of this machine."""
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "name")}
    for key in ("model", "tokenizer", "data"):
        kept[key] = Path(kept[key]).name if kept[key] else None
    if args.data and not args.tokenizer and not args.model:
        kept["tokenizer"] = "the bundled quickstart model's"
    kept["ours"], kept["trl"] = dict(args.ours), dict(args.trl)
    return kept


def main(words: list[str] | None = None) -> int:
    """Run everything, alternating, and write the results."""
    args = parse(words)
    source = Path(args.model).name if args.model else args.preset
    what = args.data.stem if args.data else f"{args.prompt}x{args.response}"
    if args.jitter and not args.data:
        what += f"_jitter{args.jitter:g}"
    cap = f"_{args.mem_cap_gib:g}gib" if args.mem_cap_gib else ""
    name = args.name or f"{source}_{what}_{args.device}{cap}".lower().replace(".", "-")
    out = args.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": telling.machine(args.device),
        "versions": telling.versions(),
        "settings": settings_of(args),
    }
    if args.longest:
        with tempfile.TemporaryDirectory(prefix="compare_trl_") as folder:
            found = search(args, Path(folder))
        for run, best in found.items():
            print(f"{run:24s} {best['prompt']} + 2 x {best['response']} ({best['limited_by']})")
        return write(out / f"longest_trl_{name}.json", {**facts, "longest": found})
    with tempfile.TemporaryDirectory(prefix="compare_trl_") as folder:
        pairs = write_pairs(args, Path(folder) / "pairs.jsonl")
        for repeat in range(args.repeats):
            for run in args.runs:
                runs.append({"run": run, "repeat": repeat, **one_run(args, run, Path(folder))})
                print(json.dumps(runs[-1]), flush=True)
        profiles = {}
        for run in args.runs if args.profile else ():
            profiles[run] = one_run(args, run, Path(folder), profile=True)
            print(json.dumps({"run": run, **profiles[run]}), flush=True)
    lengths = [shapes.usual_tokens(pair) for pair in pairs]
    report = {
        **facts,
        "pairs": {"count": len(pairs), "usual_tokens": telling.spread(lengths)},
        "summary": telling.summarise(runs, operations(args, pairs, runs)),
        "runs": runs,
    }
    telling.show(report["summary"])
    if args.profile:
        report["profiles"] = profiles
        profiling.show(profiles)
    write(out / f"compare_trl_{name}.json", report)
    return 1 if any("error" in run for run in [*runs, *profiles.values()]) else 0


def write(file: Path, report: dict[str, Any]) -> int:
    """Write a result, and return that all went well."""
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
