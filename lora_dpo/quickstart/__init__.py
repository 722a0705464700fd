"""The offline quickstart: a small chat model, its preference pairs and its visible true reward.

Importing this package is cheap: nothing here loads torch or transformers.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL_DIR = HERE / "model"
"""The shipped base model and tokenizer, loadable by plain transformers."""
DATA_DIR = HERE / "data"
"""The shipped `train.jsonl`, `heldout.jsonl` and `eval_prompts.jsonl`."""
