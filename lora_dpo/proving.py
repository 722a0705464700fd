"""The proof of a merge: what the policy says, what the merged folder says, and how far apart."""

from __future__ import annotations

import math
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.errors import ExportError
from lora_dpo.heads import causal_lm, compute_context, home_device
from lora_dpo.policy import (
    as_published,
    check_base_files,
    check_config_files,
    default_device,
    unwrap,
)

GATE = 1e-4
LOGIT_BYTES = 2**28


@dataclass(frozen=True)
class Proof:
    """How far the exported model is from the policy, on held-out text.

    Args:
        positions: token positions compared.
        kl: mean KL(policy || exported) per token, nats.
        noise: the same between two batch shapes of the policy itself.
        gate: the largest ``kl`` that is let through; None where the figures are only reported.
        top1: share of positions with the same likeliest token.
        greedy: share of greedily generated tokens that are equal.
        nll: mean negative log-prob of the held-out answers under the policy, nats a token.
        nll_exported: the same under the exported model.
    """

    positions: int
    kl: float
    noise: float
    gate: float | None
    top1: float
    greedy: float
    nll: float
    nll_exported: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        verdict = "reported only" if self.gate is None else f"gate {self.gate:.1e}"
        return (
            f"KL(policy || exported) {self.kl:.2e} nats a token on {self.positions} positions "
            f"({verdict}; the policy's own noise {self.noise:.2e}), same likeliest token "
            f"{self.top1:.2%}, same greedy tokens {self.greedy:.2%}, held-out answers "
            f"{self.nll:.4f} -> {self.nll_exported:.4f} nats a token"
        )


def is_8bit(policy: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear8bitLt" for module in policy.modules())


@dataclass
class Behaviour:
    logits: Tensor  # [positions, vocabulary], float32, CPU
    greedy: list[list[int]]
    nll: float  # of the tokens that stand there


def behaviour(model: nn.Module, sequences: Sequence[Any]) -> Behaviour:
    logits = completion_logits(model, sequences)
    targets = torch.tensor([t for _, part in _compared(model, sequences) for t in part])
    nll = sum(
        float(-part.double().log_softmax(-1).gather(-1, at[:, None]).sum())
        for part, at in zip(logits.split(64), targets.split(64), strict=True)
    )
    return Behaviour(logits, greedy_tokens(model, sequences), nll / len(targets))


def completion_logits(
    model: nn.Module, sequences: Sequence[Any], *, batched: bool = False
) -> Tensor:
    """Logits at the completion positions, one row at a time or all padded to one batch of four."""
    model.eval()
    chosen = _compared(model, sequences)
    width = 4 if batched else 1
    found = []
    with torch.no_grad(), compute_context(model):
        for start in range(0, len(chosen), width):
            rows = chosen[start : start + width]
            longest = max(len(p) + len(c) for p, c in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long, device=home_device(model))
            mask = torch.zeros_like(ids)
            for i, (prompt, completion) in enumerate(rows):
                length = len(prompt) + len(completion)
                ids[i, :length] = torch.tensor([*prompt, *completion])
                mask[i, :length] = 1
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, (prompt, completion) in enumerate(rows):
                ends = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
                found.append(logits[i, ends].float().cpu())
    return torch.cat(found)


def _compared(model: nn.Module, sequences: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    embeddings = causal_lm(model).get_input_embeddings()
    return _within(sequences, max(LOGIT_BYTES // (4 * embeddings.num_embeddings), 16))


def _within(sequences: Sequence[Any], budget: int) -> list[tuple[list[int], list[int]]]:
    chosen: list[tuple[list[int], list[int]]] = []
    for prompt, completion in sequences:
        if budget <= 0 or len(chosen) == 32:
            break
        part = list(completion)[: min(64, budget)]
        chosen.append((list(prompt), part))
        budget -= len(part)
    return chosen


def greedy_tokens(model: nn.Module, sequences: Sequence[Any], tokens: int = 16) -> list[list[int]]:
    made = []
    target = unwrap(model) if not hasattr(model, "generate") else model
    device = home_device(model)
    for prompt, _ in list(sequences)[:4]:
        ids = torch.tensor([list(prompt)], device=device)
        with torch.no_grad(), compute_context(model):
            out = target.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
            )
        made.append(out[0, ids.shape[1] :].tolist())
    return made


def mean_kl(mine: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(mine || other), nats, in float64 a few positions at a time."""
    total = 0.0
    for p, q in zip(mine.split(64), other.split(64), strict=True):
        log_p, log_q = (x.double().log_softmax(-1) for x in (p, q))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(mine)


def prove(
    folder: Path,
    sequences: Sequence[Any],
    before: Behaviour,
    noise: float,
    *,
    gated: bool,
) -> Proof:
    model = load_plain(folder, torch.float32)
    after = behaviour(model, sequences)
    kl = mean_kl(before.logits, after.logits)
    same = (before.logits.argmax(-1) == after.logits.argmax(-1)).double().mean()
    pairs = [
        (a, b) for x, y in zip(before.greedy, after.greedy, strict=True) for a, b in _zip(x, y)
    ]
    gate = max(GATE, 3 * noise) if gated else None
    greedy = sum(a == b for a, b in pairs) / max(len(pairs), 1)
    figures = (before.nll, after.nll)
    proof = Proof(len(before.logits), kl, noise, gate, float(same), greedy, *figures)
    if not (math.isfinite(kl) and math.isfinite(after.nll)):
        raise ExportError(
            f"the merged model gives values that are not finite: {proof}. Nothing was kept. Files with "
            "a wider range may pass (--dtype bfloat16 or float32)."
        )
    if gate is not None and not kl <= gate:
        raise ExportError(
            f"the merged model is not the policy: {proof}. Nothing was kept. Files that round less may "
            "pass (--dtype float16 or float32); else export the adapter alone, and report this with the "
            "name of the base model."
        )
    return proof


def load_plain(folder: Path, compute: torch.dtype) -> nn.Module:
    """Load the export as anyone would; layers that do not fit are read from disk at each call."""
    from transformers import AutoModelForCausalLM

    on_cpu = default_device().type == "cpu"
    # The rest is for activations, and for the system to keep the files of the other layers at hand.
    room = {"cpu": free_memory() * 3 // 4} if on_cpu else None
    spilled = tempfile.TemporaryDirectory(prefix="lora-dpo-")
    with as_published():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_checked_config(folder),
            trust_remote_code=False,
            use_safetensors=True,
            dtype=compute,
            device_map="auto",
            max_memory=room,
            offload_folder=spilled.name,
            output_loading_info=True,
        )
    model, info = loaded
    weakref.finalize(model, spilled.cleanup)
    wrong = {k: sorted(map(str, v))[:5] for k, v in info.items() if v and "keys" in k}
    if wrong:
        raise ExportError(f"the merged folder does not load cleanly: {wrong}.")
    return model  # type: ignore[no-any-return]


def _checked_config(folder: Path) -> Any:
    """Return the config of a folder, which may be a stranger's, once its files are what they may be."""
    from transformers import AutoConfig

    check_base_files(str(folder), str(folder))
    # said outright: left out, the library would ask, and an answer in a pipe would be taken
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_config_files(str(folder), config)
    return config


def free_memory() -> int:
    """Bytes of main memory that can still be taken; no limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return sys.maxsize
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024  # given in kB


def _zip(mine: list[int], other: list[int]) -> list[tuple[int | None, int | None]]:
    longest = max(len(mine), len(other))
    padded = [[*row, *[None] * (longest - len(row))] for row in (mine, other)]
    return list(zip(*padded, strict=True))
