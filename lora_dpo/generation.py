"""Text from the policy and from its reference, side by side: one model, the adapter on and off."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from lora_dpo.ends import stop_tokens
from lora_dpo.heads import causal_lm, compute_context, home_device
from lora_dpo.policy import reference, unwrap
from lora_dpo.prompt_tokens import Prompt, encode_prompt, prompt_text
from lora_dpo.randomness import forked
from lora_dpo.showing import Told

logger = logging.getLogger("lora_dpo")


@dataclass(frozen=True)
class SideBySide(Told):
    """One prompt and what both models make of it."""

    prompt: str
    policy: str
    reference: str

    @property
    def title(self) -> str:
        """The prompt."""
        return self.prompt

    def lines(self) -> list[str]:
        """Return the three texts."""
        texts = {"prompt": self.prompt, "policy": self.policy, "reference": self.reference}
        return [f"{name:<9}  {text}" for name, text in texts.items()]


def generate_side_by_side(
    policy: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[SideBySide]:
    """Complete each prompt with the policy and with its reference, from the same random numbers.

    Args:
        prompts: texts, or chats as lists of messages.
        max_new_tokens: longest completion, tokens.
        temperature: 0 takes the likeliest token each time.
        seed: of the random numbers, the same for both.
        batch_size: prompts at a time.
        template_arguments: variables for the chat template, as training had them.
    """
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "template_arguments": template_arguments,
    }
    ours = complete(policy, tokenizer, prompts, **options)  # type: ignore[arg-type]
    theirs = complete(policy, tokenizer, prompts, as_reference=True, **options)  # type: ignore[arg-type]
    return [
        SideBySide(prompt_text(prompt), mine, fixed)
        for prompt, mine, fixed in zip(prompts, ours, theirs, strict=True)
    ]


def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    as_reference: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return one completion a prompt, without the prompt and without special tokens."""
    texts: list[str] = []
    was_training = model.training
    model.eval()
    try:
        with forked(), reference(model) if as_reference else nullcontext():
            torch.manual_seed(seed)
            stops = _Stops.of(model, tokenizer, template_arguments)
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                rows = [encode_prompt(tokenizer, p, template_arguments) for p in part]
                made = _generate(model, rows, stops, max_new_tokens, temperature)
                texts += _texts(tokenizer, part, rows, made.tolist(), stops)
    finally:
        model.train(was_training)
    return texts


@dataclass(frozen=True)
class Drawn:
    """One completion, and whether the model ended it itself."""

    text: str
    finished: bool


def draw(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch_size: int = 16,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[Drawn]:
    """Draw one completion a prompt, each from random numbers of its own.

    So neither the batch size nor what stands beside a prompt changes what is drawn. (The rounding
    of sums still depends on the batch; it decides only where two tokens are equally likely to the
    last digits.)

    Args:
        prompts: texts, or chats as lists of messages.
        seeds: one a prompt, at least 0.
        max_new_tokens: longest completion, tokens.
        temperature: above 0; 1 samples from the model's own distribution.
        batch_size: prompts at a time.
        template_arguments: variables for the chat template, as training had them.
    """
    found: list[Drawn] = []
    was_training = model.training
    model.eval()
    try:
        stops = _Stops.of(model, tokenizer, template_arguments)
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            rows = [encode_prompt(tokenizer, p, template_arguments) for p in part]
            noise = _OwnNoise(seeds[start : start + batch_size], temperature, home_device(model))
            out = _generate(model, rows, stops, max_new_tokens, 0.0, noise)
            texts = _texts(tokenizer, part, rows, out.tolist(), stops)
            for text, ids in zip(texts, out.tolist(), strict=True):
                found.append(Drawn(text, bool(stops.ends.intersection(ids))))
    finally:
        model.train(was_training)
    return found


class _OwnNoise(LogitsProcessor):
    """Turns the likeliest token into a sample: Gumbel noise, a stream of it for each row."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.streams = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, stream in zip(noise, self.streams, strict=True):
            row.exponential_(generator=stream)
        # -log of an exponential draw is a Gumbel draw; 0 would be one in 2**24, and infinite
        noise = noise.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()
        return scores.float() / self.temperature + noise


def _texts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rows: Sequence[list[int]],
    made: Sequence[list[int]],
    stops: _Stops,
) -> list[str]:
    return [
        _behind(tokenizer, row if isinstance(prompt, str) else [], ids, stops.ends)
        for prompt, row, ids in zip(prompts, rows, made, strict=True)
    ]


def _behind(tokenizer: Any, prompt: list[int], ids: list[int], ends: set[int]) -> str:
    """Return the text of a completion with the space that it begins with, which some decoders drop."""
    ids = _up_to_end(ids, ends)
    if prompt:
        before, whole = (
            str(tokenizer.decode(part, skip_special_tokens=True)) for part in (prompt, prompt + ids)
        )
        if whole.startswith(before):
            return whole[len(before) :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def sample_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    as_reference: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return one sample a tokenised prompt, up to and with its end token; see ``complete``."""
    made: list[list[int]] = []
    was_training = model.training
    model.eval()
    try:
        with forked(), reference(model) if as_reference else nullcontext():
            torch.manual_seed(seed)
            stops = _Stops.of(model, tokenizer, template_arguments)
            for start in range(0, len(prompts), batch_size):
                rows = [list(prompt) for prompt in prompts[start : start + batch_size]]
                out = _generate(model, rows, stops, max_new_tokens, temperature)
                made += [_up_to_end(ids, stops.ends) for ids in out.tolist()]
    finally:
        model.train(was_training)
    return made


def end_ids(
    model: nn.Module, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None
) -> set[int]:
    """Return the tokens at which a model's samples end, that of its chat template's turns among them."""
    config = getattr(_generator(model), "generation_config", None)
    return set(stop_tokens(config, tokenizer, template_arguments))


@dataclass(frozen=True)
class _Stops:
    """The tokens that end a completion, and the one that fills up a batch."""

    ends: set[int]
    pad: int

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, arguments: Mapping[str, Any] | None) -> _Stops:
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        any_will_do = pad if pad is not None else end if end is not None else 0  # it is masked
        return cls(end_ids(model, tokenizer, arguments), int(any_will_do))


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    """Cut a row of a batch behind its first end token; what follows is padding."""
    place = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: place + 1]


def _generate(
    model: nn.Module,
    rows: list[list[int]],
    stops: _Stops,
    max_new_tokens: int,
    temperature: float,
    noise: LogitsProcessor | None = None,
) -> Tensor:
    longest, pad = max(map(len, rows)), stops.pad
    device = home_device(model)
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    config = GenerationConfig(eos_token_id=sorted(stops.ends), pad_token_id=pad, **sampling)
    with torch.no_grad(), compute_context(model), _generating_by(model, config) as target:
        out: Tensor = target.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            logits_processor=[noise] if noise is not None else None,
        )
    return out[:, longest:]


@contextmanager
def _generating_by(model: nn.Module, config: GenerationConfig) -> Iterator[Any]:
    """Let nothing of the base's own generation config (a repetition penalty, say) change what is drawn.

    Handing a config over is not enough: what it leaves open the library takes from the model's.
    """
    target = _generator(model)
    owners = {id(owner): owner for owner in (target, causal_lm(model))}.values()
    before = [(owner, owner.generation_config) for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield target
    finally:
        for owner, own in before:
            owner.generation_config = own


def _generator(model: nn.Module) -> Any:
    return model if hasattr(model, "generate") else unwrap(model)
