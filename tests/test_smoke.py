"""A smoke test passes on what answers as the policy does, and on nothing else: folder or server."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.errors import ConfigError, ModelError, OutputError
from lora_dpo.handing import smoke
from lora_dpo.prompt_tokens import encode_prompt
from lora_dpo.smoking import (
    SMOKE_FILE,
    difference,
    first_token_logprobs,
    greedy_answer,
    smoke_record,
)


@pytest.fixture(scope="module")
def model(quickstart_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(quickstart_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(quickstart_model: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = Path(shutil.copytree(quickstart_model, tmp_path_factory.mktemp("smoke") / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(to)
    record = smoke_record(model, tokenizer, [3], chat=True)
    assert len(record["prompts"]) == 3
    record["prompts"] = record["prompts"][:1]  # one says as much here
    (to / SMOKE_FILE).write_text(json.dumps(record), encoding="utf-8")
    return to


class _Served(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of one model, with the faults that are asked for."""

    model: Any
    tokenizer: Any
    faults: frozenset[str] = frozenset()
    asked: list[tuple[str, Any, str]]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._send({"data": [] if "lists nothing" in self.faults else [{"id": "policy"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization", "")))
        if "breaks" in self.faults:
            self._send({"error": "out of memory"}, 500)
            return
        if "moves away" in self.faults:
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/v1/chat/completions")
            self.end_headers()
            return
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"] if chat else body["prompt"]
        if "forgets the template" in self.faults:
            prompt = prompt[0]["content"]
        ids = encode_prompt(self.tokenizer, prompt)
        values, tokens = first_token_logprobs(self.model, ids).topk(10)
        tops = dict(zip(map(self.tokenizer.decode, tokens[:, None]), values.tolist(), strict=True))
        stops = [1023] if "never stops" in self.faults else [3]
        more = 8 if "never stops" in self.faults else 0
        made = greedy_answer(self.model, ids, stops, body["max_tokens"] + more)
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        stopped = made[-1] in stops
        choice: dict[str, Any] = {"finish_reason": "stop" if stopped else "length"}
        choice |= {"message": {"content": text}} if chat else {"text": text}
        if "no logprobs" in self.faults:
            choice["logprobs"] = None
        elif chat:
            listed = [{"token": token, "logprob": value} for token, value in tops.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": listed}]}
        else:
            choice["logprobs"] = {"top_logprobs": [tops]}
        self._send(
            {"choices": [choice]} if "speaks otherwise" not in self.faults else {"text": text}
        )

    def _send(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def _server(model: Any, folder: Path, *faults: str) -> Iterator[tuple[str, list[Any]]]:
    asked: list[Any] = []
    names = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder), "asked": asked}
    handler = type("Handler", (_Served,), {**names, "faults": frozenset(faults)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _coarser(model: Any) -> Any:
    """The model with noise of a tenth on every matrix: another model, and not a far one."""
    import copy

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
            parameter.data += 0.3 * noise
    return other


def test_the_folder_itself_and_a_server_of_it_pass(model: Any, folder: Path) -> None:
    found = smoke(folder)
    assert found.passed
    assert found.difference is not None and found.difference < 1e-5
    with _server(model, folder) as (address, asked):
        served = smoke(address + "/v1/", of=folder)
        assert served.passed
        assert served.difference is not None and served.difference < 1e-5
    assert {path for path, _, _ in asked} == {"/v1/chat/completions"}
    assert all(body["model"] == "policy" and body["temperature"] == 0 for _, body, _ in asked)
    assert "answers as the trained policy does" in str(served)
    assert json.loads(json.dumps(served.to_dict()))["passed"] is True
    assert "Smoke test" in served.to_html()


def test_other_weights_fail_in_a_folder_and_on_a_server(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    other = _coarser(model)
    with _server(other, folder) as (address, _):
        served = smoke(address, of=folder)
    assert not served.passed
    shutil.copytree(folder, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    found = smoke(tmp_path / "other")
    assert not found.passed
    assert found.difference is not None and served.difference is not None
    # a server lists ten tokens; one beyond them is at least as far off as the last of these
    assert 0.15 < served.difference <= found.difference + 1e-3
    assert smoke(tmp_path / "other", tolerance=found.difference + 0.01).passed
    done = CliRunner().invoke(app, ["smoke", str(tmp_path / "other"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["passed"] is False


@pytest.mark.parametrize(
    ("fault", "name", "state"),
    [
        ("forgets the template", "first token", "blocks"),
        ("never stops", "answer", "blocks"),
        ("no logprobs", "first token", "warns"),
    ],
)
def test_what_is_wrong_with_a_server_is_found(
    model: Any, folder: Path, fault: str, name: str, state: str, tmp_path: Path
) -> None:
    record = json.loads((folder / SMOKE_FILE).read_text())
    if fault == "never stops":  # a prompt whose answer ends within what is asked
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for prompt in record["prompts"]:
            prompt["answer_ids"] = greedy_answer(model, prompt["token_ids"], [3], 150)
            assert prompt["answer_ids"][-1] == 3
            prompt["answer"] = tokenizer.decode(prompt["answer_ids"], skip_special_tokens=True)
            prompt["stopped"] = True
    (tmp_path / SMOKE_FILE).write_text(json.dumps(record))
    with _server(model, folder, fault) as (address, _):
        found = smoke(address, of=tmp_path)
    assert state in {check.state for check in found.checks if check.name == name}
    assert found.passed is (state != "blocks")
    if fault == "no logprobs":
        assert found.difference is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("breaks", r"the server answered 500 .*out of memory"),
        ("moves away", r"the server answered 307"),
        ("speaks otherwise", r"not of the form that OpenAI-compatible servers give"),
        ("lists nothing", r"the server lists no model; name it with --model"),
    ],
)
def test_a_server_that_does_not_answer_is_an_error_that_names_it(
    model: Any, folder: Path, fault: str, message: str
) -> None:
    with _server(model, folder, fault) as (address, _), pytest.raises(ModelError, match=message):
        smoke(address, of=folder)


def test_plain_texts_are_asked_as_completions_and_a_key_goes_along(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = smoke_record(model, tokenizer, [3], chat=False)
    (tmp_path / SMOKE_FILE).write_text(json.dumps(record))
    monkeypatch.setenv("MY_KEY", "s3cret")
    with _server(model, folder) as (address, asked):
        found = smoke(address, of=tmp_path, model="mine", api_key_variable="MY_KEY")
    assert found.passed
    assert {(path, key) for path, _, key in asked} == {("/v1/completions", "Bearer s3cret")}
    assert {body["model"] for _, body, _ in asked} == {"mine"}
    assert "s3cret" not in str(found) + json.dumps(found.to_dict())


def test_a_token_that_is_not_listed_counts_as_the_least_likely_one_there() -> None:
    expected = [
        {"id": 1, "token": "a", "logprob": -0.1},
        {"id": 2, "token": "b", "logprob": -2.4},
        {"id": 3, "token": "c", "logprob": -6.0},  # too unlikely to be compared
    ]
    assert difference(expected, {"a": -0.1, "b": -2.3, "c": -1.0}) == pytest.approx(0.1)
    assert difference(expected, {1: -0.1, 4: -2.9}) == pytest.approx(0.5)
    assert difference(expected, {}) == float("inf")
    assert difference(expected, {"a": float("nan"), "b": -2.3}) == float("inf")


def test_mistakes_are_told_before_anything_is_asked(folder: Path, tmp_path: Path) -> None:
    for call, error, message in (
        (lambda: smoke("http://127.0.0.1:9"), ConfigError, "--of FOLDER"),
        (lambda: smoke("http:///x", of=folder), ConfigError, "not an address"),
        (lambda: smoke("http://127.0.0.1:9", of=folder), ModelError, "Is the server up"),
        (lambda: smoke(tmp_path), OutputError, "no smoke_test.json there"),
        (lambda: smoke(folder, of=folder), ConfigError, "belong to a server"),
        (lambda: smoke(folder, base="x"), ConfigError, "belongs to an adapter"),
        (lambda: smoke(folder, tolerance=-1.0), ConfigError, "nats above 0"),
        (
            lambda: smoke("http://127.0.0.1:9", of=folder, api_key_variable="NOT_SET"),
            ConfigError,
            "no such environment variable",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
