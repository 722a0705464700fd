"""Where a judge is found: a folder of this machine, or an endpoint that the user names."""

from __future__ import annotations

from pathlib import Path

from lora_dpo.errors import JudgeError
from lora_dpo.judging.verdicts import Judge


def open_judge(
    where: str | Path,
    *,
    model: str | None = None,
    instructions: str | None = None,
    key_variable: str | None = None,
    timeout: float = 60.0,
    retries: int = 3,
    at_once: int = 4,
) -> Judge:
    """Open a judge: a folder with a causal language model, or an OpenAI-compatible endpoint.

    A local model is held in 4 bits and chooses by the log-probs of its answers. Of an endpoint
    nothing but the named host is contacted.

    Args:
        where: a folder, or an address such as ``http://localhost:8000/v1``.
        model: the name of the model at the endpoint; endpoints only.
        instructions: what makes an answer better, in place of ours.
        key_variable: the environment variable that holds the endpoint's key. ``OPENAI_API_KEY`` is
            read if it is there and the way is encrypted or stays on this machine.
        timeout: of one request, seconds.
        retries: after a failure that may pass (timeout, 429, 5xx), at most.
        at_once: requests at the same time.

    Raises:
        JudgeError: no such folder, a bad address, a missing key, or openai is not installed.
        ModelError: the folder holds no model that can be loaded.
    """
    text = str(where)
    if text.lower().startswith(("http://", "https://")):
        from lora_dpo.judging.endpoint import EndpointJudge

        return EndpointJudge.open(
            text,
            model=model,
            instructions=instructions,
            key_variable=key_variable,
            timeout=timeout,
            retries=retries,
            at_once=at_once,
        )
    if not Path(text).is_dir():
        raise JudgeError(
            f"judge {text!r}: neither a folder here nor an http(s) address. Give the folder of a "
            "model, or an endpoint such as http://localhost:8000/v1."
        )
    if model is not None or key_variable is not None:
        given = "a model's name" if model is not None else "a key"
        raise JudgeError(f"judge {text!r}: {given} is for endpoints; a folder holds one model.")
    from lora_dpo.judging.local import LocalJudge

    return LocalJudge.open(Path(text), instructions=instructions)
