"""GGUF files of a merged export: written, read again, and held against the weights they came from."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from lora_dpo.ends import end_of_turn, stop_tokens
from lora_dpo.errors import ConfigError, ExportError, OutputError
from lora_dpo.handing.gguf_writing import (
    ARCHITECTURES,
    PACKAGE_KINDS,
    check_convertible,
    expected_tensors,
    gguf_package,
    rounding,
    write_by_package,
)
from lora_dpo.sealing import check_seal

# what convert_hf_to_gguf.py writes by itself; all others go through llama-quantize
_CONVERTER_KINDS = ("f32", "f16", "bf16", "q8_0")
_COARSE = 0.25  # relative error of a tensor in a type of few bits, at most
CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"


@dataclass(frozen=True)
class Gguf:
    """A GGUF file that was read again.

    Args:
        file: its name in the folder.
        kind: how its matrices are stored.
        by: what wrote it.
        tensors: how many it holds.
        compared: how many of them were held against the merged weights.
        error: largest error of a tensor, relative to its size.
    """

    file: str
    kind: str
    by: str
    tensors: int
    compared: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.file} ({self.kind}, by {self.by}): {self.compared} of {self.tensors} tensors held "
            f"against the merged weights, within {self.error:.1e} of their size; tokens, chat template "
            "and end token as in the export"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def check_gguf(kind: str, llama_cpp: str | Path | None, config: Any, tokenizer: Any) -> None:
    """Refuse what could not be written, before any weight loads.

    Raises:
        ConfigError: an unknown kind, no ``gguf`` package, or no llama.cpp where one is named.
        ExportError: a model or tokenizer that only llama.cpp's converter knows.
    """
    gguf_package()
    if llama_cpp is not None:
        _programs(Path(llama_cpp), kind)
        return
    if kind.lower() not in PACKAGE_KINDS:
        raise ConfigError(
            f"gguf: {kind!r} is none of {', '.join(PACKAGE_KINDS)}, which are written here; for others "
            "give --llama-cpp with a built checkout of llama.cpp."
        )
    check_convertible(config, tokenizer)


def write_gguf(
    folder: str | Path,
    kind: str = "q8_0",
    *,
    llama_cpp: str | Path | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Gguf:
    """Write a GGUF file beside merged weights, read it again, and compare.

    Args:
        folder: what ``export(..., merge=True)`` wrote.
        kind: ``f32``, ``f16``, ``bf16``, ``q8_0`` or ``q4_0``; with ``llama_cpp`` whatever its
            quantiser knows, as ``q4_k_m``.
        llama_cpp: a checkout of llama.cpp, built for kinds that need its quantiser. Without one the
            ``gguf`` package writes the architectures that are certain: Llama, Mistral, Qwen 2 and 3.
        template_arguments: variables for the chat template, as training had them.

    Raises:
        ConfigError: a kind or a checkout that cannot do this.
        OutputError: the file exists.
        ExportError: a file that is not what it was made from; it is not kept.
    """
    path, kind = Path(folder).absolute(), kind.lower()  # a name may begin with a dash
    if not (path / "config.json").is_file():
        raise OutputError(f"{path}: no merged weights there (config.json is missing).")
    check_seal(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_gguf(kind, llama_cpp, config, tokenizer)
    target = path / f"model-{kind}.gguf"
    if target.exists():
        raise OutputError(f"{target}: exists already; remove it first.")
    with tempfile.TemporaryDirectory(dir=path, prefix=".gguf-") as work:
        made = Path(work) / target.name
        if llama_cpp is None:
            write_by_package(path, made, kind, template_arguments)
        else:
            _write_by_llama_cpp(path, made, kind, Path(llama_cpp))
        by = "the gguf package" if llama_cpp is None else "llama.cpp"
        end = end_of_turn(tokenizer, template_arguments)
        found = _read_again(path, made, kind, by, config, tokenizer, end)
        made.rename(target)
    return found


def _programs(checkout: Path, kind: str) -> tuple[Path, Path | None]:
    script = checkout / CONVERTER
    if not script.is_file():
        raise ConfigError(f"--llama-cpp {checkout}: no {CONVERTER} there; give a checkout.")
    if kind.lower() in _CONVERTER_KINDS:
        return script, None
    places = [checkout / "build" / "bin" / QUANTISER, checkout / QUANTISER]
    found = next((p for p in places if p.is_file()), None) or shutil.which(QUANTISER)
    if found is None:
        raise ConfigError(
            f"--llama-cpp {checkout}: {kind} needs {QUANTISER}, which is neither in build/bin nor on the "
            f"PATH; build llama.cpp, or choose one of {', '.join(_CONVERTER_KINDS)}."
        )
    return script, Path(found)


def _write_by_llama_cpp(folder: Path, target: Path, kind: str, checkout: Path) -> None:
    script, quantiser = _programs(checkout, kind)
    first = target if quantiser is None else target.with_name("whole.gguf")
    outtype = kind if quantiser is None else "bf16"
    command = [sys.executable, script, folder, "--outfile", first, "--outtype", outtype]
    _run([str(part) for part in command])
    if quantiser is not None:
        _run([str(quantiser), str(first), str(target), kind.upper()])


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-600:]
        raise ExportError(f"{Path(command[1]).name}: ended with {done.returncode}: {said}")


def _read_again(
    folder: Path, file: Path, kind: str, by: str, config: Any, tokenizer: Any, end: int | None
) -> Gguf:
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise ExportError(
            f"{file.name}: cannot be read again ({error}); nothing was kept."
        ) from None
    _check_metadata(reader, folder, file.name, tokenizer, end)
    known = config.model_type in ARCHITECTURES
    try:
        check_convertible(config, tokenizer)
    except ExportError:
        known = False  # values stand there in an order of its own, that only its converter knows
    stored = {tensor.name: tensor for tensor in reader.tensors}
    worst, compared = 0.0, 0
    for name, value in expected_tensors(folder, config) if known else ():
        if name not in stored:
            raise ExportError(f"{file.name}: holds no tensor {name}; nothing was kept.")
        worst = max(worst, _error(gguf, stored[name], value.float(), file.name))
        compared += 1
    return Gguf(file.name, kind, by, len(stored), compared, worst)


def _error(gguf: Any, tensor: Any, value: torch.Tensor, file: str) -> float:
    shape = tuple(reversed([int(n) for n in tensor.shape]))
    if shape != tuple(value.shape):
        raise ExportError(f"{file}: {tensor.name} has the shape {shape}, not {tuple(value.shape)}.")
    found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    apart = (found.reshape(value.shape).float() - value).abs()
    size = float(value.norm())
    error = float(apart.norm()) / size if size else float(apart.norm())
    kinds = gguf.GGMLQuantizationType
    exact = (kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0, kinds.Q4_0)
    if tensor.tensor_type in exact:
        wrong = bool((apart > rounding(gguf, tensor.tensor_type, value)).any())
    else:
        wrong = error > _COARSE
    if wrong or error != error:
        raise ExportError(
            f"{file}: {tensor.name} is further from the merged weight than {tensor.tensor_type.name} "
            f"rounds ({error:.1e} of its size); nothing was kept."
        )
    return error


def _check_metadata(reader: Any, folder: Path, file: str, tokenizer: Any, end: int | None) -> None:
    def read(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    # what ends an answer in the template must be there; without one, any that the model stops on
    stops = (
        stop_tokens(GenerationConfig.from_pretrained(folder), tokenizer) if end is None else [end]
    )
    ends = {read("tokenizer.ggml.eos_token_id"), read("tokenizer.ggml.eot_token_id")}
    tokens = read("tokenizer.ggml.tokens") or []
    vocabulary = tokenizer.get_vocab()
    wrong = {
        "the chat template": read("tokenizer.chat_template") != (tokenizer.chat_template or None),
        "an end token": not ends & set(stops),
        "tokens": any(tokens[i : i + 1] != [text] for text, i in vocabulary.items()),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ExportError(f"{file}: {' and '.join(found)} did not come through; nothing was kept.")
