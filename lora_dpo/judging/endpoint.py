"""An OpenAI-compatible endpoint as judge. The key stands in the request's header and nowhere else."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lora_dpo.errors import JudgeError, UnreadableAnswerError
from lora_dpo.judging.questions import question, read_letter
from lora_dpo.judging.verdicts import Choice
from lora_dpo.showing import visible

DEFAULT_KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # servers without keys take anything
REPLY_TOKENS = 16
_CHOICES: dict[str, Choice] = {"A": "first", "B": "second", "C": "tie"}


class EndpointJudge:
    """A chat model behind an address. ``EndpointJudge.open(...)`` checks what it is given."""

    def __init__(
        self, client: Any, where: str, model: str, key: str, instructions: str | None, at_once: int
    ) -> None:
        self.client, self.where, self.model = client, where, model
        self.instructions, self.at_once = instructions, at_once
        self._key = key

    @classmethod
    def open(
        cls,
        where: str,
        *,
        model: str | None,
        instructions: str | None = None,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        at_once: int = 4,
    ) -> EndpointJudge:
        """Check address, model, key and library; nothing is sent yet. Arguments: ``open_judge``."""
        place = _checked_address(where)
        if not model:
            raise JudgeError(
                f"judge {where}: an endpoint serves models by name; give one (--judge-model NAME)."
            )
        if not (timeout > 0 and retries >= 0 and at_once >= 1):
            raise JudgeError(
                f"judge {where}: got timeout {timeout:g}, retries {retries}, at_once {at_once}; "
                "expected above 0, at least 0 and at least 1."
            )
        try:
            import openai
        except ImportError:
            raise JudgeError(
                f"judge {where}: an endpoint needs the package openai: pip install lora-dpo[judge]"
            ) from None
        key = _key(place, where, key_variable)
        client = openai.OpenAI(
            base_url=where,
            api_key=key,
            timeout=timeout,
            max_retries=retries,
            # the named host and no other
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,
                timeout=timeout,
                # a proxy of the environment would get what is to stay on this machine
                trust_env=not is_loopback(place.hostname or ""),
            ),
        )
        # what the library reads from the environment is not for this host
        client.organization = client.project = client.admin_api_key = None
        client._custom_headers = {}  # of OPENAI_CUSTOM_HEADERS; there is no public name
        return cls(client, where, model, key, instructions, at_once)

    def __repr__(self) -> str:
        return f"EndpointJudge({self.where!r}, model={self.model!r})"

    def choose(self, prompt: str, first: str, second: str) -> Choice:
        """Ask, and read the letter that the reply begins with.

        Raises:
            UnreadableAnswerError: the reply begins with no letter of the three.
            JudgeError: refused, timed out or not an endpoint of this kind, retries spent.
        """
        what, pair = question(prompt, first, second, self.instructions, ties=True)
        reply = self._reply(
            [{"role": "system", "content": what}, {"role": "user", "content": pair}]
        )
        letter = read_letter(reply)
        if letter is None:
            raise UnreadableAnswerError(
                f"judge {self.where}: answered {self._harmless(reply)!r}; expected A, B or C"
            )
        return _CHOICES[letter]

    def _reply(self, messages: list[dict[str, str]]) -> str:
        import openai

        problem = ""
        try:
            answer: Any = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=REPLY_TOKENS
            )
        except openai.APITimeoutError:
            problem = "did not answer in time, retries included"
        except openai.APIStatusError as error:
            problem = f"answered with status {error.status_code}: {self._harmless(error.message)}"
        except openai.OpenAIError as error:
            # the cause alone says which: refused, unknown host, a broken certificate
            reason = self._harmless(str(error.__cause__ or error))
            problem = f"could not be asked ({reason})"
        except ValueError as error:  # no JSON where JSON was promised
            problem = (
                f"did not answer as an OpenAI-compatible endpoint ({self._harmless(str(error))})"
            )
        if problem:  # outside of the block: the library's error knows the request's headers
            raise JudgeError(
                f"judge {self.where}: model {self.model!r} {problem}. Check the address (most end in "
                "/v1), the model's name, the key and the server."
            )
        try:
            text = answer.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            raise JudgeError(
                f"judge {self.where}: what came back is no chat completion "
                f"({self._harmless(str(answer))}). Check the address; most end in /v1."
            ) from None
        return text or ""

    def _harmless(self, text: str) -> str:
        """Return a short piece of what a server said, without the key should it send that back."""
        if self._key and self._key != NO_KEY:
            text = text.replace(self._key, "[key]")
        short = " ".join(text.split())
        return visible(short if len(short) <= 200 else short[:197] + "...")


def _checked_address(where: str) -> SplitResult:
    try:
        place = urlsplit(where)
        _ = place.port
    except ValueError:
        raise JudgeError("judge: the address is not a URL; expected http(s)://host/v1.") from None
    if place.username is not None or place.password is not None or place.query or place.fragment:
        raise JudgeError(
            f"judge: the address of {place.hostname} holds a user, a password, a query or a fragment, "
            "which would be printed with it. Give http(s)://host/v1, and the key in an environment "
            "variable."
        )
    if not place.hostname:
        raise JudgeError(f"judge {where}: no host in the address; expected http(s)://host/v1.")
    return place


def _key(place: SplitResult, where: str, variable: str | None) -> str:
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise JudgeError(
                f"judge {where}: the environment variable {variable!r} is not set; put the key there."
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise JudgeError(
                f"judge {where}: the environment variable {variable!r} holds characters that no key has; "
                "put the key alone there."
            )
        return key
    private = place.scheme == "https" or is_loopback(place.hostname or "")
    there = private and os.environ.get(DEFAULT_KEY, "").strip()
    return _key(place, where, DEFAULT_KEY) if there else NO_KEY


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
