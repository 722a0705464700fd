"""Handing the policy on: its adapter alone, or merged into plain weights, with a proof.

The merge adds the adapter in float32 to the dequantised weights that the policy was trained on and
writes shards tensor by tensor. The folder is then loaded by plain transformers and compared with
the policy; one that is not the policy is not kept.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig

from lora_dpo.errors import ExportError, OutputError
from lora_dpo.forward import causal_lm, compute_context
from lora_dpo.policy import Merged, default_device, merged_tensors, save_adapter, unwrap
from lora_dpo.store import new_folder, write_json, write_text

SHARD_BYTES = 2 * 2**30
GATE = 1e-4
LOGIT_BYTES = 2**28
_NOT_A_SETTING = ("quantization_config",)


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
    """

    positions: int
    kl: float
    noise: float
    gate: float | None
    top1: float
    greedy: float

    def __str__(self) -> str:
        verdict = "reported only" if self.gate is None else f"gate {self.gate:.1e}"
        return (
            f"KL(policy || exported) {self.kl:.2e} nats a token on {self.positions} positions "
            f"({verdict}; the policy's own noise {self.noise:.2e}), same likeliest token "
            f"{self.top1:.2%}, same greedy tokens {self.greedy:.2%}"
        )


def export_adapter(
    policy: nn.Module, tokenizer: Any, to: Path, *, card: str = "", overwrite: bool = False
) -> Path:
    """Write the adapter alone, as peft loads it, with tokenizer and card.

    Raises:
        OutputError: the folder exists and is not empty.
    """
    with new_folder(to, overwrite=overwrite) as work:
        save_adapter(policy, work)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, work)
        write_text(work / "README.md", card)
    return to


def export_merged(
    release: Callable[[], nn.Module],
    tokenizer: Any,
    to: Path,
    *,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    base: Literal["trained", "original"] = "trained",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    card: Callable[[Proof], str] = str,
    overwrite: bool = False,
) -> Proof:
    """Write the merged model and prove it.

    Args:
        release: hands the policy over; no reference to it may be kept, so that its memory is free
            before the merged model is loaded.
        sequences: held-out ``(prompt ids, completion ids)`` on which both are compared.
        base: ``trained`` merges into the weights the policy was trained on, dequantised, and is
            gated; ``original`` into those of the checkpoint, and is reported. So is an 8-bit
            policy, which rounds its activations too.
        dtype: of the files; that of the checkpoint if left out.
        revision: of the base on the hub.
        card: makes the model card from the proof.

    Raises:
        OutputError: the folder exists, or the disk is too small.
        ExportError: an adapter weight that was not merged, or a model that is not the policy.
    """
    if not sequences:
        raise ExportError("export: no held-out rows to prove the merged model on; give some.")
    policy = release()
    causal = causal_lm(policy)
    source = str(causal.config._name_or_path)
    if getattr(causal.config, "auto_map", None):
        raise ExportError(
            f"{source}: a model with code of its own; plain transformers could not load a merge of it. "
            "Export the adapter alone."
        )
    config = AutoConfig.from_pretrained(source, revision=revision)
    dtype = dtype or _stored_dtype(config)
    original = _checkpoint_lookup(source, revision, config) if base == "original" else None
    with new_folder(to, overwrite=overwrite) as work:
        _check_disk(causal, dtype, work)
        _write_weights(merged_tensors(policy, original), dtype, work)
        _write_settings(causal, config, tokenizer, dtype, work)
        gated = base == "trained" and not _is_8bit(policy)
        with _float32(policy):
            before = _behaviour(policy, sequences)
            noise = _mean_kl(before.logits, _logits(policy, sequences, batched=True))
        del policy, causal
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        proof = _prove(work, sequences, before, noise, gated=gated)
        write_json(work / "export_proof.json", {**asdict(proof), "base": base, "dtype": str(dtype)})
        write_text(work / "README.md", card(proof))
    return proof


def _write_weights(tensors: Iterator[Merged], dtype: torch.dtype, folder: Path) -> None:
    shard: dict[str, Tensor] = {}
    size, total = 0, 0
    names: list[Path] = []
    weight_map: dict[str, int] = {}
    for tensor in tqdm(tensors, desc="merging", unit=" tensors", disable=None):
        value = tensor.value.to(dtype) if tensor.value.is_floating_point() else tensor.value
        value = value.cpu().contiguous()
        if shard and size + value.nbytes > SHARD_BYTES:
            names.append(_flush(shard, folder, len(names)))
            size = 0
        shard[tensor.name] = value
        weight_map[tensor.name] = len(names)
        size, total = size + value.nbytes, total + value.nbytes
    names.append(_flush(shard, folder, len(names)))
    _name_shards(folder, names, weight_map, total)


def _flush(shard: dict[str, Tensor], folder: Path, number: int) -> Path:
    path = folder / f"shard-{number}.safetensors"
    save_file(
        {k: v.clone() if v.is_shared() else v for k, v in shard.items()}, path, {"format": "pt"}
    )
    shard.clear()
    return path


def _name_shards(folder: Path, paths: list[Path], weight_map: dict[str, int], total: int) -> None:
    if len(paths) == 1:
        paths[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
    index = {key: names[number] for key, number in weight_map.items()}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )


def _write_settings(
    causal: Any, config: Any, tokenizer: Any, dtype: torch.dtype, folder: Path
) -> None:
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_A_SETTING}
    plain = type(config).from_dict(values)
    plain.dtype = dtype
    plain.architectures = [type(causal).__name__]
    plain.save_pretrained(folder)
    generation = GenerationConfig.from_dict(causal.generation_config.to_dict())
    if not generation.do_sample and any(
        getattr(generation, key, None) is not None for key in ("temperature", "top_p", "top_k")
    ):
        generation.do_sample = True  # the sampling settings mean something only then
    generation.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer with its chat template in both places that programs look for it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if tokenizer.chat_template and path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**values, "chat_template": tokenizer.chat_template})


@contextmanager
def _float32(policy: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block: the proof is of the weights, not of 16-bit rounding."""
    causal, changed = causal_lm(policy), []
    for module in causal.modules():
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            changed.append((module, module.compute_dtype))
            module.compute_dtype = torch.float32
    halves = [
        (p, p.dtype) for p in causal.parameters() if p.dtype in (torch.bfloat16, torch.float16)
    ]
    for parameter, _ in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, kind in halves:
            parameter.data = parameter.data.to(kind)
        for module, kind in changed:
            module.compute_dtype = kind


def _is_8bit(policy: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear8bitLt" for module in policy.modules())


@dataclass
class _Behaviour:
    logits: Tensor  # [positions, vocabulary], float32, CPU
    greedy: list[list[int]]


def _behaviour(model: nn.Module, sequences: Sequence[Any]) -> _Behaviour:
    return _Behaviour(_logits(model, sequences), _greedy(model, sequences))


def _logits(model: nn.Module, sequences: Sequence[Any], *, batched: bool = False) -> Tensor:
    """Logits at the completion positions, one row at a time or all padded to one batch of four."""
    model.eval()
    causal = causal_lm(model)
    embeddings = causal.get_input_embeddings()
    budget = max(LOGIT_BYTES // (4 * embeddings.num_embeddings), 16)
    chosen = _within(sequences, budget)
    width = 4 if batched else 1
    found = []
    with torch.no_grad(), compute_context(model):
        for start in range(0, len(chosen), width):
            rows = chosen[start : start + width]
            longest = max(len(p) + len(c) for p, c in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long, device=embeddings.weight.device)
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


def _within(sequences: Sequence[Any], budget: int) -> list[tuple[list[int], list[int]]]:
    chosen: list[tuple[list[int], list[int]]] = []
    for prompt, completion in sequences:
        if budget <= 0 or len(chosen) == 32:
            break
        part = list(completion)[: min(64, budget)]
        chosen.append((list(prompt), part))
        budget -= len(part)
    return chosen


def _greedy(model: nn.Module, sequences: Sequence[Any], tokens: int = 16) -> list[list[int]]:
    made = []
    target = unwrap(model) if not hasattr(model, "generate") else model
    device = next(model.parameters()).device
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


def _mean_kl(mine: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(mine || other), nats, in float64 a few positions at a time."""
    total = 0.0
    for p, q in zip(mine.split(64), other.split(64), strict=True):
        log_p, log_q = (x.double().log_softmax(-1) for x in (p, q))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(mine)


def _prove(
    folder: Path,
    sequences: Sequence[Any],
    before: _Behaviour,
    noise: float,
    *,
    gated: bool,
) -> Proof:
    model = _load_plain(folder, torch.float32)
    after = _behaviour(model, sequences)
    kl = _mean_kl(before.logits, after.logits)
    same = (before.logits.argmax(-1) == after.logits.argmax(-1)).double().mean()
    pairs = [
        (a, b) for x, y in zip(before.greedy, after.greedy, strict=True) for a, b in _zip(x, y)
    ]
    gate = max(GATE, 3 * noise) if gated else None
    greedy = sum(a == b for a, b in pairs) / max(len(pairs), 1)
    proof = Proof(len(before.logits), kl, noise, gate, float(same), greedy)
    if gate is not None and not kl <= gate:
        raise ExportError(
            f"the merged model is not the policy: {proof}. Nothing was kept. Files that round less may "
            "pass (--dtype float16 or float32); else export the adapter alone, and report this with the "
            "name of the base model."
        )
    return proof


def _load_plain(folder: Path, compute: torch.dtype) -> nn.Module:
    """Load the export as anyone would; layers that do not fit are read from disk at each call."""
    from transformers import AutoModelForCausalLM

    on_cpu = default_device().type == "cpu"
    # The rest is for activations, and for the system to keep the files of the other layers at hand.
    room = {"cpu": _free_memory() * 3 // 4} if on_cpu else None
    spilled = tempfile.TemporaryDirectory(prefix="lora-dpo-")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
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


def _free_memory() -> int:
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


def _checkpoint_lookup(source: str, revision: str | None, config: Any) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of the original checkpoint by its name."""
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{source}: the checkpoint itself is quantised; use base='trained'.")
    from transformers.utils.hub import cached_file

    index = cached_file(
        source,
        "model.safetensors.index.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    names = json.loads(Path(index).read_text())["weight_map"] if index else None

    def look_up(name: str) -> Tensor:
        shard = names.get(name, "model.safetensors") if names else "model.safetensors"
        file = cached_file(source, shard, revision=revision)
        with safe_open(file, framework="pt") as stream:
            if name not in stream.keys():  # noqa: SIM118 (not a dict)
                raise ExportError(
                    f"{source}: the checkpoint has no tensor {name!r}; use base='trained'."
                )
            value: Tensor = stream.get_tensor(name)
            return value

    return look_up


def _check_disk(causal: Any, dtype: torch.dtype, folder: Path) -> None:
    width = torch.empty(0, dtype=dtype).element_size()
    needed = int(causal.num_parameters() * width * 1.02)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent}: the merged model needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free. Make room, or export to another disk."
        )


def _stored_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
