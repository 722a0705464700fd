"""What the runs of a comparison say together, and on what machine they ran."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("lora-dpo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
NOT_EQUAL = {"8bit", "cpuembed"}  # an approximation, and bytes that are moved and not spared
MEASURES = ("pairs_per_s", "cpu_s_per_pair", "tokens_per_s")


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(runs: list[dict[str, Any]], work: dict[str, float] | None = None) -> dict[str, Any]:
    """Return each run's medians over the repeats, and the ratios.

    Args:
        runs: of all repeats.
        work: floating-point operations a pair, by name of run.
    """
    table: dict[str, Any] = {}
    for name in dict.fromkeys(run["run"] for run in runs):
        good = [run for run in runs if run["run"] == name and "error" not in run]
        if not good:
            errors = [run["error"] for run in runs if run["run"] == name]
            table[name] = {"error": errors[0]}
            continue
        row: dict[str, Any] = {key: spread([run[key] for run in good]) for key in MEASURES}
        row["step_s"] = {
            "median": statistics.median(run["step_s"]["median"] for run in good),
            "min": min(run["step_s"]["min"] for run in good),
            "max": max(run["step_s"]["max"] for run in good),
        }
        row["peak_gib"] = spread([run["memory_gib"]["peak"] for run in good])
        for key in ("init_s", "start_s"):
            row[key] = statistics.median(run[key] for run in good)
        laid = [run["layout"] for run in good]
        row["layers"] = laid[0]["layers"]
        row["recomputed_layers"] = max(each["recomputed_layers"] for each in laid)
        row["first_loss"] = good[0]["first_loss"]
        row["tflop_per_pair"] = (work or {}).get(name, 0.0) / 1e12
        row["repeats"] = len(good)
        row["failed"] = sum(run["run"] == name for run in runs) - len(good)
        table[name] = row
    equal = {n: r for n, r in table.items() if not NOT_EQUAL & set(n.split("+"))}
    groups = {
        "nothing recomputed": {n: r for n, r in equal.items() if _share(r) == 0},
        "all layers recomputed": {n: r for n, r in equal.items() if _share(r) == 1},
        "best of each": table,
    }
    return {"runs": table, "ours_to_trl": {key: ratios(rows) for key, rows in groups.items()}}


def _share(row: dict[str, Any]) -> float | None:
    return None if "error" in row else row["recomputed_layers"] / row["layers"]


def ratios(rows: dict[str, Any]) -> dict[str, Any] | None:
    """Return ours to TRL's best, each measure against TRL's best in that very measure."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    sides = {side: [n for n in good if n.split("+")[0] == side] for side in ("ours", "trl")}
    if not all(sides.values()):
        return None
    found: dict[str, Any] = {}
    for key in ("pairs_per_s", "cpu_s_per_pair", "peak_gib"):
        best = max if key == "pairs_per_s" else min

        def median(name: str, key: str = key) -> float:
            return float(good[name][key]["median"])

        mine, rival = (best(sides[side], key=median) for side in ("ours", "trl"))
        ratio = median(mine) / median(rival) if median(rival) > 0 else None
        found[key] = {"ours": mine, "trl": rival, "ratio": ratio and round(ratio, 3)}
    mine, rival = (found["pairs_per_s"][side] for side in ("ours", "trl"))
    if done := good[mine]["tflop_per_pair"]:
        found["pairs_per_s"]["ceiling"] = round(good[rival]["tflop_per_pair"] / done, 3)
    return found


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model
        )
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def show(summary: dict[str, Any]) -> None:
    """Print the summary as a table; ``again`` counts the layers that backward ran again."""
    names = ("pairs/s", "CPU s/pair", "tokens/s", "peak GiB", "again", "init s", "start s")
    print(f"\n{'run':28s} " + " ".join(f"{name:>10s}" for name in names) + "  loss")
    for name, row in summary["runs"].items():
        if "error" in row:
            print(f"{name:28s} {row['error'][:90]}")
            continue
        middle = [row[key]["median"] for key in (*MEASURES, "peak_gib")]
        print("{:28s} {:10.3f} {:10.4f} {:10.0f} {:10.3f}".format(name, *middle), end=" ")
        again = f"{row['recomputed_layers']}/{row['layers']}"
        print(f"{again:>10s} {row['init_s']:10.2f} {row['start_s']:10.2f}", end="  ")
        print(f"{row['first_loss']:.4f}")
    for key, found in summary["ours_to_trl"].items():
        if found:
            parts = [
                f"{k} {v['ratio']} ({v['ours']} / {v['trl']}"
                + (f"; operations alone {v['ceiling']})" if "ceiling" in v else ")")
                for k, v in found.items()
            ]
            print(f"ours/TRL, {key}: " + ", ".join(parts))
