"""Preference tuning of 4-bit models with LoRA on one GPU: the DPO family, right by default.

Names load on first use, so that ``import lora_dpo`` costs nothing.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dpo import objectives
    from lora_dpo.checkup import doctor
    from lora_dpo.comparing import compare
    from lora_dpo.config import Config
    from lora_dpo.data import load_preferences, tokenise
    from lora_dpo.drafting import init_config
    from lora_dpo.errors import LoraDpoError
    from lora_dpo.evaluation import evaluate_policy
    from lora_dpo.exporting import export_adapter, export_merged
    from lora_dpo.finetuning import sft
    from lora_dpo.finished import diagnose, diagnose_preferences, evaluate, generate
    from lora_dpo.forward import completion_logps, labelled_stats, pair_stats
    from lora_dpo.generation import generate_side_by_side
    from lora_dpo.handing import export, push, smoke, write_gguf
    from lora_dpo.inspecting import inspect_preferences
    from lora_dpo.judging import ask_both_orders, open_judge
    from lora_dpo.labelling import label
    from lora_dpo.planning import plan
    from lora_dpo.policy import load_policy, reference
    from lora_dpo.reference_cache import with_reference_logps
    from lora_dpo.reference_store import stored_reference_logps
    from lora_dpo.reporting import report
    from lora_dpo.reproducing import reproduce
    from lora_dpo.run import train
    from lora_dpo.run_folder import Run
    from lora_dpo.sampling import sample
    from lora_dpo.scoring import best_of, score, score_run
    from lora_dpo.stats import LabelledStats, PairStats
    from lora_dpo.trainer import PreferenceTrainer

_HOME = {
    "Config": "config",
    "LabelledStats": "stats",
    "LoraDpoError": "errors",
    "PairStats": "stats",
    "PreferenceTrainer": "trainer",
    "Run": "run_folder",
    "ask_both_orders": "judging",
    "best_of": "scoring",
    "compare": "comparing",
    "completion_logps": "forward",
    "diagnose": "finished",
    "diagnose_preferences": "finished",
    "doctor": "checkup",
    "evaluate": "finished",
    "evaluate_policy": "evaluation",
    "export": "handing",
    "export_adapter": "exporting",
    "export_merged": "exporting",
    "generate": "finished",
    "generate_side_by_side": "generation",
    "init_config": "drafting",
    "inspect_preferences": "inspecting",
    "label": "labelling",
    "labelled_stats": "forward",
    "load_policy": "policy",
    "load_preferences": "data",
    "objectives": "objectives",
    "open_judge": "judging",
    "pair_stats": "forward",
    "plan": "planning",
    "push": "handing",
    "reference": "policy",
    "report": "reporting",
    "reproduce": "reproducing",
    "sample": "sampling",
    "score": "scoring",
    "score_run": "scoring",
    "sft": "finetuning",
    "smoke": "handing",
    "stored_reference_logps": "reference_store",
    "tokenise": "data",
    "train": "run",
    "with_reference_logps": "reference_cache",
    "write_gguf": "handing",
}

__version__ = "0.1.0"
__all__ = [
    "Config",
    "LabelledStats",
    "LoraDpoError",
    "PairStats",
    "PreferenceTrainer",
    "Run",
    "ask_both_orders",
    "best_of",
    "compare",
    "completion_logps",
    "diagnose",
    "diagnose_preferences",
    "doctor",
    "evaluate",
    "evaluate_policy",
    "export",
    "export_adapter",
    "export_merged",
    "generate",
    "generate_side_by_side",
    "init_config",
    "inspect_preferences",
    "label",
    "labelled_stats",
    "load_policy",
    "load_preferences",
    "objectives",
    "open_judge",
    "pair_stats",
    "plan",
    "push",
    "reference",
    "report",
    "reproduce",
    "sample",
    "score",
    "score_run",
    "sft",
    "smoke",
    "stored_reference_logps",
    "tokenise",
    "train",
    "with_reference_logps",
    "write_gguf",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_dpo' has no attribute {name!r}")
    with warnings.catch_warnings():
        # tqdm, in a notebook without ipywidgets; what we show there are plain lines
        warnings.filterwarnings("ignore", "IProgress not found")
        module = import_module(f"lora_dpo.{_HOME[name]}")
    return module if name == "objectives" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
