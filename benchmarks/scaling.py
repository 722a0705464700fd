"""Time and memory of a step against tokens, pairs, answers of one prompt, layers and width.

python benchmarks/scaling.py --out benchmarks/results/scaling_cpu.json
python benchmarks/scaling.py --device cuda --preset llama3-8b --out benchmarks/results/scaling_h200.json

Engines: ``fast`` recomputes every layer, ``kept`` is the same engine and recomputes none, ``plain``
is transformers' and peft's own code and recomputes none. Each point runs in a process of its own:
the policy forward and backward, the reference, the update. Beside the seconds stand those of the
matrix products alone, at the rate that a large product reaches on this machine in the same process:
the floor. Beside the peak stand the bytes that the planner predicts and, for the two engines that it
describes, the bytes that the performance study counts (``floors.activation_bytes``). The tables of
README.md are printed at the end. CPU seconds and the machine's load tell whether something ran beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import floors
import shapes
import telling
from one_run import cpu_seconds

# ``width`` is times that of the preset, in heads of the same size
BASE = {"layers": 4, "width": 1.0, "prompt": 128, "response": 128, "pairs": 2, "answers": 2}
SWEEPS = {
    "tokens": [{"prompt": n, "response": n} for n in (64, 128, 256, 512)],
    "pairs": [{"pairs": n} for n in (1, 2, 4, 8)],
    "answers": [{"answers": n, "pairs": 1} for n in (2, 4, 8)],
    "layers": [{"layers": n} for n in (2, 4, 8)],
    "width": [{"width": n} for n in (0.5, 1.0, 2.0)],
}


def rows_of(point: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    """Return pairs with random tokens; more than two answers of a prompt become best against rest."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    rows = []
    for _ in range(point["pairs"]):
        prompt, best = draw(point["prompt"]), draw(point["response"])
        rows += [
            {"prompt_ids": prompt, "chosen_ids": best, "rejected_ids": draw(point["response"])}
            for _ in range(point["answers"] - 1)
        ]
    return rows


def measure_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run one point in this process."""
    import torch

    from lora_dpo.config import LoraConfig
    from lora_dpo.engine import choose_engine, lay_out, recompute_layers
    from lora_dpo.forward import both_logps
    from lora_dpo.planning import Setting, measure
    from lora_dpo.policy import load_policy, peft_config

    torch.manual_seed(0)
    device = torch.device(point["device"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = shapes.preset_config(point["preset"], point["layers"], point["width"])
    policy = load_policy(shapes.build_nf4(config, device, dtype), lora=LoraConfig())
    rows = rows_of(point, config.vocab_size)
    longest = point["prompt"] + point["response"]
    asked = "plain" if point["engine"] == "plain" else "fast"
    engine = choose_engine(policy, rows[:2], longest, asked, chunk=256)
    again = 0 if point["engine"] != "fast" else config.num_hidden_layers
    if asked == "fast":
        recompute_layers(policy, again, keeps_weights=True, offloaded=False)
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-4)
    policy.train()
    flat = "rows end to end" in engine
    batch = lay_out(rows, flat=flat).to(device)

    def step() -> None:
        ours, theirs = both_logps(policy, batch, chunk=256)
        chosen, rejected = (ours - theirs).chunk(2)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step()
    began = cpu_seconds()
    seconds = [_timed(step, device) for _ in range(point["steps"])]
    busy = (cpu_seconds() - began) / point["steps"]
    setting = Setting(
        config, peft_config(LoraConfig()), dtype=dtype, flat=flat, fast="LoRA layers" in engine
    )
    planned = measure(setting, rows, accumulates=False)
    peak = _peak(step, device)
    tokens = int(batch.input_ids.numel())
    groups = _groups(point, flat)
    way = floors.Way(
        flat, again / config.num_hidden_layers, asked == "fast", rank=LoraConfig().rank
    )
    flop = floors.flop(config, groups, way)
    counted = None
    if flat:
        how = {"recomputed": again, "element": dtype.itemsize, "chunk": 256}
        counted = floors.activation_bytes(config, groups, **how) / 2**20
    rate = _rate(device, dtype)
    return {
        **{key: point[key] for key in (*BASE, "engine", "preset")},
        "hidden_size": config.hidden_size,
        "rows": len(rows),
        "tokens": tokens,
        "seconds": telling.spread(seconds),
        "cpu_seconds": busy,
        "load": os.getloadavg()[0],
        "pairs_per_second": len(rows) / statistics.median(seconds),
        "peak_mib": peak / 2**20,
        "planned_peak_mib": planned.activations(again) / 2**20,
        "counted_peak_mib": counted,
        "products_flop": flop,
        "products_seconds_floor": flop / rate,
        "share_of_floor": flop / rate / statistics.median(seconds),
    }


def _timed(step: Any, device: Any) -> float:
    import torch

    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(step: Any, device: Any) -> int:
    """Return the most bytes of a step beyond weights and optimiser state."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.allocating import peak_allocated

    return peak_allocated(step)


def _rate(device: Any, dtype: Any) -> float:
    """Return the FLOP a second of a large matrix product, the best of five."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * n**3 / min(_timed(lambda: torch.mm(a, b), device) for _ in range(5))


def _groups(point: dict[str, Any], flat: bool) -> list[floors.Group]:
    """Return what is laid down: a prompt with all its answers, or each pair by itself."""
    each = point["answers"] if flat else 2
    count = point["pairs"] * (1 if flat else point["answers"] - 1)
    return [(point["prompt"], [point["response"]] * each) for _ in range(count)]


def tables(sweeps: dict[str, list[dict[str, Any]]]) -> str:
    """Return memory and time of all points as Markdown, a row for each shape."""
    names = list(dict.fromkeys(point["engine"] for points in sweeps.values() for point in points))
    shapes_seen: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for points in sweeps.values():
        for point in points:
            shape = tuple(point[key] for key in ("prompt", "response", "pairs", "answers"))
            shape += (point["layers"], point["hidden_size"])
            shapes_seen.setdefault(shape, {})[point["engine"]] = point
    head = ["prompt + 2 x response", "pairs", "answers", "layers", "width"]
    bytes_of = [head + [f"{n}{of}" for n in names for of in (", MiB", ", planned", ", counted")]]
    time_of = [head + [f"{n}{of}" for n in names for of in (", s", ", CPU s", ", products")]]
    for (prompt, response, *rest), found in shapes_seen.items():
        row = [f"{prompt} + 2 x {response}", *map(str, rest)]
        peaks, times = list(row), list(row)
        for name in names:
            point = found[name]
            counted = point["counted_peak_mib"]
            peaks += [f"{point[key]:.1f}" for key in ("peak_mib", "planned_peak_mib")]
            peaks.append("" if counted is None else f"{counted:.1f}")
            times += [f"{point['seconds']['median']:.3f}", f"{point['cpu_seconds']:.3f}"]
            times.append(f"{point['share_of_floor']:.0%}")
        bytes_of.append(peaks)
        time_of.append(times)
    return "\n\n".join(map(_markdown, (bytes_of, time_of)))


def _markdown(rows: list[list[str]]) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def main() -> None:
    """Run all points, or one that the parent process asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="tiny", help="a shape of shapes.py")
    parser.add_argument("--engines", default="fast,kept,plain")
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure_point(json.loads(args.point))))
        return
    found: dict[str, list[Any]] = {}
    for sweep in args.sweeps.split(","):
        for change in SWEEPS[sweep]:
            for engine in args.engines.split(","):
                fixed = {"engine": engine, "device": args.device, "preset": args.preset}
                result = in_a_process({**BASE, **change, **fixed, "steps": args.steps})
                found.setdefault(sweep, []).append(result)
                print(
                    f"{sweep:8} {change} {engine:6} {result['seconds']['median']:.3f} s, "
                    f"{result['peak_mib']:.1f} MiB (planned {result['planned_peak_mib']:.1f}), "
                    f"{result['share_of_floor']:.0%} of the products' rate",
                    flush=True,
                )
    print(f"\n{tables(found)}")
    if args.out:
        facts = {"machine": telling.machine(args.device), "versions": telling.versions()}
        args.out.write_text(json.dumps({**facts, "sweeps": found}, indent=1) + "\n")


def in_a_process(point: dict[str, Any]) -> dict[str, Any]:
    """Measure one point in a process of its own."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--point", json.dumps(point)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{point}:\n{errors.read()[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()
