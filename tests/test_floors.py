"""The house: imports run downwards only, heavy libraries have their rooms, the surface is stated."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lora_dpo

PACKAGE = Path(lora_dpo.__file__).parent

FLOORS = {
    "errors": -1,
    "stats": 0, "store": 0, "randomness": 0, "ranks": 0, "showing": 1, "journal": 1, "lines": 1, "sealing": 1,
    "objectives": 1, "logprobs": 1, "before_and_after": 2, "metrics": 2, "describe": 2, "testing": 2,
    "config": 2, "arguments": 2,
    "data": 3, "policy": 3,
    "layers": 4, "heads": 4, "positions": 3, "float32": 5, "forward": 5, "sharding": 5, "prompt_tokens": 5,
    "callbacks": 6, "card": 6, "checkpoints": 6, "checkup": 6, "diagnostics": 6, "drafting": 6, "engine": 6,
    "ends": 6, "finished": 6, "evaluation": 6, "exporting": 6, "finetuning": 6, "generation": 6, "handing": 6,
    "inspecting": 6, "preparing": 6, "smoking": 6,
    "zero": 6, "labelling": 6, "nonfinite": 6, "sampling": 6,
    "guards": 6, "moving_reference": 6, "passes": 6, "proving": 6, "reference_cache": 6, "run_folder": 6,
    "memory": 6, "planning": 6, "reference_store": 6, "starting": 6, "stepping": 6, "trainer": 6, "run": 6,
    "determinism": 6, "reproducing": 6, "restarting": 6, "resuming": 6, "surroundings": 6,
    "shortage": 6, "reporting": 6, "watching": 6, "judging": 6, "scoring": 6, "comparing": 6, "prompts": 6,
    "cli": 7, "__init__": 7, "__main__": 7, "quickstart": 7,
}  # fmt: skip
HOMES = {
    "bitsandbytes": {"policy"},
    "peft": {"policy", "layers", "heads", "planning", "trainer", "stepping"},
    "typer": {"cli"},
    "rich": {
        "showing",
        "inspecting",
        "checkup",
        "reporting",
        "watching",
        "drafting",
        "comparing",
        "scoring",
        "labelling",
        "sampling",
        "handing",
    },
    "plotly": {"reporting"},
}


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _imports() -> list[tuple[Path, str]]:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(path, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = (
                    [f"lora_dpo.{a.name}" for a in node.names] if node.module == "lora_dpo" else []
                )
                found += [(path, name) for name in below or [node.module]]
    return found


def test_imports_run_downwards_only() -> None:
    for path, name in _imports():
        if name.startswith("lora_dpo."):
            here, there = _room(path), name.split(".")[1]
            same = here == there or FLOORS[here] == FLOORS[there] == 6 or FLOORS[here] == 7
            assert (
                FLOORS[there] < FLOORS[here] or same or {here, there} == {"config", "arguments"}
            ), f"{path} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"


def test_heavy_libraries_stay_in_their_rooms() -> None:
    for path, name in _imports():
        home = HOMES.get(name.split(".")[0])
        assert home is None or _room(path) in home, f"{path} imports {name}; its home is {home}"


def test_the_commands_help_and_the_package_import_no_torch() -> None:
    code = "import sys, lora_dpo, lora_dpo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_surface_is_all_there_and_no_function_shares_a_modules_name() -> None:
    assert lora_dpo.__all__ == sorted(lora_dpo.__all__)
    modules = {path.stem for path in PACKAGE.iterdir()}
    for name in lora_dpo.__all__:
        assert getattr(lora_dpo, name) is not None
        assert name not in modules or name == "objectives", f"{name} is a module too"
    assert set(lora_dpo.__all__) == set(lora_dpo._HOME)
    assert (PACKAGE / "py.typed").is_file()  # editors and type checkers read our annotations


def test_files_and_functions_stay_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 420, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 70, f"{path}:{node.lineno} {node.name} has {length} lines"
