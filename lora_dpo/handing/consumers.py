"""What each program makes of an adapter, and the limits that it has: stated, never found out late."""

from __future__ import annotations

from dataclasses import dataclass

from lora_dpo.policy import Folded

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Consumer:
    """One program and whether it serves this adapter.

    Args:
        name: of the program.
        serves: whether it takes an adapter like this one.
        why: what it needs to be told, or what it refuses.
    """

    name: str
    serves: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name} {'serves it' if self.serves else 'REFUSES it'}: {self.why}"


def consumers(adapter: Folded) -> tuple[Consumer, ...]:
    """Return what peft, vLLM, llama.cpp and Ollama make of an adapter that we wrote."""
    beyond = _beyond_factors(adapter)
    found = [Consumer("peft", True, "as it is, on the base that it was trained on")]
    rank = vllm_rank(adapter.rank)
    if beyond:
        found.append(Consumer("vLLM", False, f"it takes no {beyond}; merge instead"))
    elif rank is None:
        found.append(
            Consumer(
                "vLLM", False, f"rank {adapter.rank} is above its {VLLM_RANKS[-1]}; merge instead"
            )
        )
    else:
        found.append(Consumer("vLLM", True, f"with --enable-lora --max-lora-rank {rank}"))
    if beyond:
        found.append(
            Consumer("llama.cpp", False, f"its converter takes no {beyond}; merge instead")
        )
    else:
        found.append(Consumer("llama.cpp", True, "through convert_lora_to_gguf.py, with --lora"))
    why = "through ADAPTER, for Llama, Mistral and Gemma models"
    found.append(
        Consumer("Ollama", not beyond, f"it takes no {beyond}; merge instead" if beyond else why)
    )
    return tuple(found)


def vllm_rank(rank: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` of vLLM that holds a rank; None above all of them."""
    return next((legal for legal in VLLM_RANKS if legal >= rank), None)


def _beyond_factors(adapter: Folded) -> str:
    parts = ["DoRA"] if adapter.dora else []
    if adapter.saved_modules:
        parts.append(f"whole modules (modules_to_save: {', '.join(adapter.saved_modules)})")
    return " and no ".join(parts)
