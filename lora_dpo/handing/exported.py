"""What ``export`` returns: where it wrote, what, how far it is from the policy, and what is next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import RenderableType

from lora_dpo.handing.consumers import Consumer
from lora_dpo.handing.gguf_files import Gguf
from lora_dpo.handing.pushing import Pushed
from lora_dpo.policy import Folded
from lora_dpo.proving import Proof
from lora_dpo.showing import Displayed, hanging

WHICH_BASE = (
    "trained: exactly the policy, and the one to serve. original: the same change on weights that "
    "were never rounded, and the better start where the next step rounds again (GGUF in 4 bits, AWQ, "
    "GPTQ)"
)


@dataclass(frozen=True, repr=False)
class Exported(Displayed):
    """A run that was handed on. ``print(exported)``; in a notebook, its name alone.

    Args:
        folder: where it lies.
        kind: ``merged`` weights, or an ``adapter`` alone.
        base: what was merged into; None for an adapter.
        dtype: of the files.
        proof: of merged weights.
        adapter: of an adapter, what was folded and how exactly.
        consumers: what other programs make of an adapter.
        others: proofs of merges into other base weights, which were measured and not kept.
        reloaded: what a fresh process found when it loaded merged weights, in a sentence.
        gguf: the GGUF file, if one was asked for.
        pushed: where on the hub it is, if it was asked for.
        checkpoint: ``final``, or the folder of the checkpoint in the run.
    """

    folder: Path
    kind: Literal["merged", "adapter"]
    base: str | None
    dtype: str
    proof: Proof | None = None
    adapter: Folded | None = None
    consumers: tuple[Consumer, ...] = ()
    others: Mapping[str, Proof] = field(default_factory=dict)
    reloaded: str = ""
    gguf: Gguf | None = None
    pushed: Pushed | None = None
    checkpoint: str = "final"

    template: ClassVar[str] = "exported"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo export to {self.folder.name}"

    @property
    def _rounded_again(self) -> bool:
        return self.gguf is not None and self.gguf.kind not in ("f32", "f16", "bf16", "q8_0")

    def lines(self) -> list[tuple[str, str]]:
        """Return a name and a sentence for each thing that is known."""
        found: list[tuple[str, str]] = []
        if self.proof is not None:
            found.append((f"into the {self.base} base", str(self.proof)))
        found += [(f"into the {name} base", str(proof)) for name, proof in self.others.items()]
        if self.others or self._rounded_again:
            found.append(("which base", WHICH_BASE))
        if self.adapter is not None:
            found.append(("adapter", str(self.adapter)))
        found += [(c.name, str(c).removeprefix(f"{c.name} ")) for c in self.consumers]
        if self.reloaded:
            found.append(("fresh process", self.reloaded))
        if self.gguf is not None:
            found.append(("GGUF", str(self.gguf)))
        if self.pushed is not None:
            found.append(("on the hub", str(self.pushed)))
        kind = "merged model" if self.kind == "merged" else "adapter alone"
        found.append((kind, f"{self.folder}; SERVE.md there has the commands that serve it"))
        return found

    def __repr__(self) -> str:
        return f"Exported({str(self.folder)!r}, kind={self.kind!r}, base={self.base!r}, proof={self.proof!r})"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        lines = self.lines()
        width = max(len(name) for name, _ in lines) + 2
        return [hanging(f"{name:<{width}}{text}", width) for name, text in lines]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a line of ``RUN/exports.jsonl`` holds the same."""
        return {
            "to": str(self.folder),
            "kind": self.kind,
            "base": self.base,
            "checkpoint": self.checkpoint,
            "dtype": self.dtype,
            "proof": self.proof.to_dict() if self.proof else None,
            "adapter": vars(self.adapter) if self.adapter else None,
            "others": {name: proof.to_dict() for name, proof in self.others.items()},
            "gguf": self.gguf.to_dict() if self.gguf else None,
            "pushed": self.pushed.to_dict() if self.pushed else None,
        }
