"""One question to an OpenAI-compatible endpoint: its likeliest first tokens, and its answer."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.judging.endpoint import is_loopback
from lora_dpo.showing import visible

_TOP = 10
_MOST_BYTES = 1 << 24  # of an answer


@dataclass(frozen=True)
class Reply:
    """What an endpoint said.

    Args:
        first: log-probs of the likeliest first tokens by their text; empty where it gives none.
        text: the answer.
        stopped: whether it ended by itself.
    """

    first: Mapping[Any, float]
    text: str
    stopped: bool


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is asked goes to the host that was named, and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A served model.

    Args:
        url: of the server, with or without ``/v1``.
        model: its name there; the first that the server lists if left out.
        key_variable: environment variable with an API key, sent as a bearer token.
        timeout: seconds for an answer.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key_variable: str | None = None,
        timeout: float = 120,
    ) -> None:
        parts = _checked(url)
        self._root = url.rstrip("/") + ("" if parts.path.rstrip("/").endswith("/v1") else "/v1")
        self._key = os.environ.get(key_variable) if key_variable else None
        if key_variable and not self._key:
            raise ConfigError(f"--api-key-variable {key_variable}: no such environment variable.")
        self._timeout = timeout
        # a proxy of the environment would get what is to stay on this machine
        direct = [urllib.request.ProxyHandler({})] if is_loopback(parts.hostname or "") else []
        self._open = urllib.request.build_opener(_NoRedirect, *direct).open
        self.model = model or self._first_model()

    def ask(self, prompt: Mapping[str, Any], record: Mapping[str, Any], tokens: int) -> Reply:
        """Ask one prompt of a smoke test, as a chat or as a text."""
        common = {"model": self.model, "max_tokens": tokens, "temperature": 0}
        if prompt["messages"]:
            extra = record.get("template_arguments") or {}
            body = {
                **common,
                "messages": prompt["messages"],
                "logprobs": True,
                "top_logprobs": _TOP,
                **({"chat_template_kwargs": extra} if extra else {}),
            }
            return _read(self._post("/chat/completions", body), "/chat/completions")
        body = {**common, "prompt": prompt["text"], "logprobs": _TOP}
        return _read(self._post("/completions", body), "/completions")

    def _first_model(self) -> str:
        listed = self._send(urllib.request.Request(self._root + "/models"), "/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ModelError(
                f"{self._root}/models: the server lists no model; name it with --model."
            ) from None

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._root + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return self._send(request, path)

    def _send(self, request: urllib.request.Request, path: str) -> Any:
        where = self._root + path
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with self._open(request, timeout=self._timeout) as answer:
                return json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            said = self._harmless(error.read(300).decode("utf-8", "replace"))
            raise ModelError(f"{where}: the server answered {error.code} ({said}).") from None
        except (OSError, ValueError, RecursionError, HTTPException) as error:
            reason = self._harmless(str(getattr(error, "reason", error)))
            raise ModelError(
                f"{where}: no answer that could be read ({reason}). Is the server up, and is this its "
                "address?"
            ) from None

    def _harmless(self, text: str) -> str:
        """Return what a server said, without the key should it send that back."""
        return visible((text.replace(self._key, "[key]") if self._key else text).strip())


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError(
            f"{url}: not an address; expected one like http://127.0.0.1:8000."
        ) from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"the address of {parts.hostname}: holds a user, a password, a query or a fragment, which "
            "would be printed with it. Give http(s)://host, and a key with --api-key-variable."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url}: not an address; expected one like http://127.0.0.1:8000.")
    return parts


def _read(answer: Any, path: str) -> Reply:
    """Read both forms of log-probs: of chats, and of the older completions."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        logprobs = choice.get("logprobs") or {}
        if content := logprobs.get("content"):
            first = {str(top["token"]): float(top["logprob"]) for top in content[0]["top_logprobs"]}
        else:
            tops = logprobs.get("top_logprobs") or [{}]
            first = {str(token): float(value) for token, value in (tops[0] or {}).items()}
        return Reply(dict(first), str(text or ""), choice.get("finish_reason") == "stop")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ModelError(
            f"{path}: the answer is not of the form that OpenAI-compatible servers give."
        ) from None
