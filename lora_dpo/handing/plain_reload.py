"""Run by its path, in a process of its own: what anyone's transformers makes of a merged folder.

Nothing of lora_dpo is imported here, so that nothing of it can help. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def reload(folder: Path, memory: int) -> dict[str, Any]:
    """Load the folder and ask it the prompts of its smoke test.

    Args:
        folder: merged weights with ``smoke_test.json``.
        memory: bytes of main memory that the weights may take; the rest is read from disk.
    """
    record = json.loads((folder / "smoke_test.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with tempfile.TemporaryDirectory(prefix="lora-dpo-") as spilled:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            device_map="auto",
            max_memory=None if torch.cuda.is_available() else {"cpu": memory},
            offload_folder=spilled,
            output_loading_info=True,
        )
        model, info = loaded
        first = [_first_token(model.eval(), prompt) for prompt in record["prompts"]]
    ends = model.generation_config.eos_token_id
    return {
        "keys": {k: sorted(map(str, v))[:5] for k, v in info.items() if v and "keys" in k},
        "quantised": "quantization_config" in config,
        "ends": ends if isinstance(ends, list) else [ends],
        "tokens": [_tokens(tokenizer, prompt, record) for prompt in record["prompts"]],
        "first_tokens": first,
    }


def _tokens(tokenizer: Any, prompt: dict[str, Any], record: dict[str, Any]) -> list[int]:
    if not prompt["messages"]:
        found: list[int] = tokenizer(prompt["text"])["input_ids"]
        return found
    text = tokenizer.apply_chat_template(
        prompt["messages"],
        tokenize=False,
        add_generation_prompt=True,
        **record["template_arguments"],
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_token(model: Any, prompt: dict[str, Any]) -> dict[int, float]:
    """Return log-probs of the tokens that the policy finds likeliest."""
    with torch.no_grad():
        ids = torch.tensor([prompt["token_ids"]], device=model.device)
        values = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
    return {token["id"]: float(values[token["id"]]) for token in prompt["first_token"]}


if __name__ == "__main__":
    print(json.dumps(reload(Path(sys.argv[1]), int(sys.argv[2]))))
