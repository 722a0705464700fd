"""``smoke``: is what lies in a folder, or what a server answers, the policy that was trained?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from rich.console import RenderableType
from safetensors import SafetensorError
from transformers import AutoTokenizer

from lora_dpo.checkup import Check, shown_checks
from lora_dpo.errors import ConfigError, LoraDpoError, ModelError, OutputError
from lora_dpo.handing.asking import Endpoint
from lora_dpo.policy import load_adapter
from lora_dpo.prompt_tokens import encode_prompt
from lora_dpo.proving import load_plain
from lora_dpo.sealing import check_seal
from lora_dpo.showing import Displayed
from lora_dpo.smoking import SMOKE_FILE, difference, first_token_logprobs, greedy_answer
from lora_dpo.store import read_json


@dataclass(frozen=True, repr=False)
class Smoke(Displayed):
    """What ``smoke`` found. ``print(smoke)``; in a notebook, its name alone.

    Args:
        target: what was looked at.
        tolerance: by how many nats a log-prob might differ.
        difference: the largest one found; None where no log-probs could be had.
        checks: what was looked at, one by one.
    """

    target: str
    tolerance: float
    difference: float | None
    checks: tuple[Check, ...]

    template: ClassVar[str] = "smoke"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo smoke {self.target}"

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return all(check.state != "blocks" for check in self.checks)

    @property
    def verdict(self) -> str:
        """The end of it in one sentence."""
        if not self.passed:
            return f"{self.target}: this is not the policy that was trained"
        told = "" if self.difference is None else f", within {self.difference:.2g} nats"
        return f"{self.target}: answers as the trained policy does{told}"

    def __repr__(self) -> str:
        bad = [check.name for check in self.checks if check.state != "ok"]
        return f"Smoke({self.target!r}, passed={self.passed}{', ' if bad else ''}{', '.join(bad)})"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        return shown_checks(self.checks, self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "target": self.target,
            "passed": self.passed,
            "tolerance": self.tolerance,
            "difference": self.difference,
            "checks": [asdict(check) for check in self.checks],
        }


def smoke(
    target: str | Path,
    *,
    of: str | Path | None = None,
    base: str | Path | None = None,
    model: str | None = None,
    api_key_variable: str | None = None,
    tolerance: float | None = None,
) -> Smoke:
    """Ask an exported folder, or a server, the prompts of a smoke test.

    Args:
        target: the folder, or the address of an OpenAI-compatible server.
        of: the folder that was exported, for a server.
        base: the base of an adapter, for a folder that holds one.
        model: its name on the server; the first that is listed if left out.
        api_key_variable: environment variable with the server's API key.
        tolerance: nats by which a likely first token may differ; what the export wrote if left out.

    Raises:
        OutputError: no smoke test there.
        ModelError: a server that does not answer.
        ConfigError: an option that does not go with the target.
    """
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ConfigError(f"tolerance: got {tolerance}; expected nats above 0.")
    served = str(target).startswith(("http://", "https://"))
    if served:
        if of is None:
            raise ConfigError(
                f"smoke {target}: give the folder that was exported too (--of FOLDER); its {SMOKE_FILE} "
                "says what to expect."
            )
        record = _record(Path(of))
        allowed = tolerance or float(record["tolerance"])
        endpoint = Endpoint(str(target), model=model, key_variable=api_key_variable)
        found = list(_of_server(endpoint, record, allowed))
    else:
        if of or model or api_key_variable:
            raise ConfigError("smoke: --of, --model and --api-key-variable belong to a server.")
        folder = Path(target)
        record = _record(folder)
        allowed = tolerance or float(record["tolerance"])
        found = list(_of_folder(folder, record, allowed, base))
    known = [value for _, value in found if value is not None]
    checks = tuple(check for check, _ in found)
    return Smoke(str(target), allowed, max(known) if known else None, checks)


Found = tuple[Check, float | None]


def _record(folder: Path) -> Mapping[str, Any]:
    path = folder if folder.is_file() else folder / SMOKE_FILE
    if not path.is_file():
        raise OutputError(
            f"{folder}: no {SMOKE_FILE} there; give a folder that 'lora-dpo export' wrote."
        )
    record = read_json(path)
    if not isinstance(record, dict) or not record.get("prompts"):
        raise OutputError(f"{path}: holds no prompts; export again.")
    try:  # it may be a stranger's
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise OutputError(
            f"{path}: is not what 'lora-dpo export' writes ({where}: {first['msg']}); export again."
        ) from None
    return record


class _Token(BaseModel):
    id: NonNegativeInt
    token: str
    logprob: float


class _Prompt(BaseModel):
    text: str
    messages: list[dict[str, Any]] | None
    token_ids: list[NonNegativeInt] = Field(min_length=1)
    first_token: list[_Token] = Field(min_length=1)
    answer_ids: list[NonNegativeInt]
    answer: str
    stopped: bool


class _Record(BaseModel):
    template_arguments: dict[str, Any]
    stop_ids: list[NonNegativeInt]
    tolerance: float = Field(gt=0)
    prompts: list[_Prompt]


def _of_folder(
    folder: Path, record: Mapping[str, Any], allowed: float, base: str | Path | None
) -> Iterator[Found]:
    is_adapter, base = _base_of(folder, base)
    try:
        if check_seal(folder):
            yield Check("files", "ok", "every file is what the export wrote"), None
    except OutputError as error:
        yield Check("files", "blocks", str(error), "export again"), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no tokenizer could be read ({' '.join(str(error).split())[:200]})."
        ) from None
    arguments = record["template_arguments"]
    same = all(
        encode_prompt(tokenizer, prompt["messages"] or prompt["text"], arguments)
        == prompt["token_ids"]
        for prompt in record["prompts"]
    )
    yield _check("tokens", same, "prompts are read as the same tokens", "export again"), None
    if not is_adapter:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plain = "quantization_config" not in config
        yield (
            _check("weights", plain, "no quantisation is left in the config", "export again"),
            None,
        )
    try:
        model: Any = load_plain(Path(base) if base else folder, torch.float32)
        model = (load_adapter(model, folder, None) if is_adapter else model).eval()
    except (LoraDpoError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        yield Check("loads", "blocks", " ".join(str(error).split())[:400], "export again"), None
        return
    yield Check("loads", "ok", "every weight has its place, and none is missing"), None
    if not is_adapter:
        ends = model.generation_config.eos_token_id
        stops = set(ends) if isinstance(ends, list) else {ends}
        yield (
            _check("ends", stops >= {*record["stop_ids"]}, "stops on every token that ends an answer",
                   "export again"),
            None,
        )  # fmt: skip
    known_tokens = model.get_input_embeddings().num_embeddings
    for prompt in record["prompts"]:
        if max(prompt["token_ids"]) >= known_tokens:
            what = f"{prompt['text']!r}: holds tokens that the model does not have"
            yield Check("first token", "blocks", what, "export again"), None
            continue
        values = first_token_logprobs(model, prompt["token_ids"])
        found = dict(enumerate(values.tolist()))
        top = str(tokenizer.decode([int(values.argmax())]))
        yield _first_token(prompt, difference(prompt["first_token"], found), top, allowed)
        stops_of = record["stop_ids"] if is_adapter else None
        tokens = max(len(prompt["answer_ids"]), 1)
        answer = greedy_answer(model, prompt["token_ids"], stops_of, tokens)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        yield _answer(prompt, text, answer[-1:] == prompt["answer_ids"][-1:]), None


def _base_of(folder: Path, base: str | Path | None) -> tuple[bool, str | Path | None]:
    """Return whether a folder holds an adapter, and the base that it belongs on."""
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise ConfigError("smoke: --base belongs to an adapter; these are merged weights.")
        return False, None
    base = base or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if base is None:
        raise ModelError(
            f"{folder}: an adapter whose base has no name on the hub; give its folder with --base."
        )
    return True, base


def _of_server(endpoint: Endpoint, record: Mapping[str, Any], allowed: float) -> Iterator[Found]:
    for prompt in record["prompts"]:
        reply = endpoint.ask(prompt, record, max(len(prompt["answer_ids"]), 1))
        top = max(reply.first, key=lambda token: reply.first[token], default="")
        if reply.first:
            far = difference(prompt["first_token"], reply.first)
            yield _first_token(prompt, far, str(top), allowed)
        else:
            what = f"{prompt['text']!r}: the server gives no log-probs; only the answer is compared"
            yield Check("first token", "warns", what, "ask a server that gives logprobs"), None
        ended = reply.stopped or not prompt["stopped"]
        yield _answer(prompt, reply.text, ended), None


def _first_token(prompt: Mapping[str, Any], far: float, top: str, allowed: float) -> Found:
    expected = prompt["first_token"][0]["token"]
    what = f"{prompt['text']!r}: {expected!r} expected, {top!r} likeliest, {far:.2g} nats apart"
    if far <= allowed:
        return Check("first token", "ok", what), far
    fix = "compare chat template and weights with the export; coarser weights need --tolerance"
    return Check("first token", "blocks", f"{what} ({allowed:.2g} allowed)", fix), far


def _answer(prompt: Mapping[str, Any], text: str, ended: bool) -> Check:
    """Rounding may turn an answer; one that is the same and does not end has lost its end token."""
    expected = str(prompt["answer"])
    if text.strip() == expected.strip() and (ended or not prompt["stopped"]):
        return Check("answer", "ok", f"{prompt['text']!r}: the same words, {_length(prompt)}")
    if prompt["stopped"] and text.strip().startswith(expected.strip()):
        what = f"{prompt['text']!r}: the same words, and then it does not stop"
        return Check(
            "answer", "blocks", what, "give the server the end tokens in generation_config.json"
        )
    what = f"{prompt['text']!r}: other words from some token on ({text.strip()[:60]!r})"
    return Check("answer", "warns", what, "rounding turns close choices; look at the first tokens")


def _length(prompt: Mapping[str, Any]) -> str:
    return f"{len(prompt['answer_ids'])} tokens" + (" to their end" if prompt["stopped"] else "")


def _check(name: str, good: bool, what: str, fix: str) -> Check:
    return Check(
        name, "ok" if good else "blocks", what if good else f"not so: {what}", "" if good else fix
    )
