"""The last proof of a merge: a process that knows nothing of ours loads it, and is the policy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_dpo.errors import ExportError
from lora_dpo.proving import free_memory
from lora_dpo.smoking import SMOKE_FILE, difference
from lora_dpo.store import read_json

PROGRAM = Path(__file__).with_name("plain_reload.py")


def reload_in_a_fresh_process(folder: Path, *, gated: bool) -> str:
    """Load merged weights in a new process by plain transformers, and hold them against the policy.

    Args:
        folder: the merged weights, with their smoke test.
        gated: whether first tokens further off than the smoke test allows are an error.

    Returns:
        What was found, in a sentence.

    Raises:
        ExportError: weights that do not load, or are not what they should be.
    """
    room = str(free_memory() * 3 // 4)
    command = [sys.executable, str(PROGRAM), str(folder), room]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        said = " ".join(done.stderr.split())[-500:]
        raise ExportError(f"a fresh process could not load the merged folder: {said}") from None
    record = read_json(folder / SMOKE_FILE)
    far = max(
        difference(prompt["first_token"], {int(i): value for i, value in values.items()})
        for prompt, values in zip(record["prompts"], found["first_tokens"], strict=True)
    )
    wrong = list(_wrong(found, record))
    if gated and not far <= record["tolerance"]:
        wrong.append(f"likely first tokens are {far:.2g} nats apart")
    if wrong:
        raise ExportError(
            f"a fresh process does not find the policy in the merged folder: {'; '.join(wrong)}. "
            "Nothing was kept."
        )
    return (
        "plain transformers load it with no missing and no further weights and no quantisation; "
        f"likely first tokens within {far:.1e} nats of the trained policy"
    )


def _wrong(found: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    if found["keys"]:
        yield f"it does not load cleanly: {found['keys']}"
    if found["quantised"]:
        yield "its config names a quantisation"
    if not set(record["stop_ids"]) <= set(found["ends"]):
        yield f"generation stops on {found['ends']}, and answers end with {record['stop_ids']}"
    if found["tokens"] != [prompt["token_ids"] for prompt in record["prompts"]]:
        yield "its tokenizer reads prompts as other tokens"
