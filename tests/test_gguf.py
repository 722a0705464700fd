"""A GGUF file is the merged model, by a reader that is not ours; one that is not is not kept."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lora_dpo.errors import ConfigError, ExportError, OutputError
from lora_dpo.handing import write_gguf
from lora_dpo.handing.gguf_writing import PACKAGE_KINDS, check_convertible
from tests.conftest import byte_tokenizer

pytest.importorskip("gguf")
TEXT = "Tell me a story about 12345 foxes. It's late!\n\n  Grüße"


@pytest.fixture
def folder(quickstart_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quickstart_model, tmp_path / "merged"))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def test_transformers_reads_the_same_model_and_tokens_from_it(folder: Path) -> None:
    found = write_gguf(folder, "f32")
    assert found.compared == found.tensors == 38
    assert found.error == 0.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = {"gguf_file": "model-f32.gguf"}
    again = AutoModelForCausalLM.from_pretrained(folder, **name, dtype=torch.float32)
    torch.testing.assert_close(_logits(again, ids), _logits(plain, ids), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder, **name)(TEXT)["input_ids"] == ids[0].tolist()


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config, Qwen3Config])
def test_every_architecture_that_is_written_is_read_as_the_same_model(
    tmp_path: Path, kind: Any
) -> None:
    torch.manual_seed(0)
    width = 128 if kind is Qwen3Config else 16  # the reader takes Qwen 3's usual one for granted
    config = kind(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width, max_position_embeddings=64,
        sliding_window=None, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = write_gguf(tmp_path, "f32")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=found.file, dtype=torch.float32
    )
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(_logits(again, ids), _logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in PACKAGE_KINDS if k != "f32"])
def test_coarser_files_are_within_the_rounding_of_their_kind(folder: Path, kind: str) -> None:
    found = write_gguf(folder, kind)
    # root mean squares: half a unit in the last place for floats, a step / sqrt(12) for blocks
    assert found.error < {"f16": 2**-12, "bf16": 2**-9, "q8_0": 0.01, "q4_0": 0.12}[kind]
    assert (folder / f"model-{kind}.gguf").is_file()
    with pytest.raises(OutputError, match="exists already"):
        write_gguf(folder, kind)


def _checkout(tmp_path: Path, made: Path) -> Path:
    """A llama.cpp whose converter hands out a file that was made before."""
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    shutil.copy(made, checkout / "made.gguf")
    (checkout / "convert_hf_to_gguf.py").write_text(
        "import shutil, sys, pathlib\n"
        "assert sys.argv[2] == '--outfile' and sys.argv[4:] == ['--outtype', 'f16'], sys.argv\n"
        "assert (pathlib.Path(sys.argv[1]) / 'config.json').is_file()\n"
        "shutil.copy(pathlib.Path(__file__).with_name('made.gguf'), sys.argv[3])\n"
    )
    return checkout


def test_what_a_converter_wrote_is_read_again_and_a_wrong_file_is_not_kept(
    folder: Path, tmp_path: Path
) -> None:
    write_gguf(folder, "f16")
    made = (folder / "model-f16.gguf").rename(tmp_path / "made.gguf")
    checkout = _checkout(tmp_path, made)
    found = write_gguf(folder, "f16", llama_cpp=checkout)
    assert (found.by, found.compared) == ("llama.cpp", 38)
    (folder / "model-f16.gguf").unlink()

    content = bytearray(made.read_bytes())
    content[-1000:-990] = b"\x3c" * 10  # ones, near the end of the last matrix
    (checkout / "made.gguf").write_bytes(content)
    with pytest.raises(ExportError, match="further from the merged weight than F16 rounds"):
        write_gguf(folder, "f16", llama_cpp=checkout)
    (checkout / "made.gguf").write_bytes(
        made.read_bytes().replace(b"only the roles", b"many of roles!")
    )
    with pytest.raises(ExportError, match="the chat template did not come through"):
        write_gguf(folder, "f16", llama_cpp=checkout)
    (checkout / "made.gguf").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="cannot be read again"):
        write_gguf(folder, "f16", llama_cpp=checkout)
    (checkout / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model X not supported')")
    with pytest.raises(ExportError, match=r"ended with 1: Model X not supported"):
        write_gguf(folder, "f16", llama_cpp=checkout)
    assert not list(folder.glob("*.gguf"))
    assert not list(folder.glob(".gguf-*"))


def test_the_token_that_ends_an_answer_in_the_template_is_in_the_file_or_the_file_is_not_kept(
    folder: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = "('<|user|>' if other else eos_token)"
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", end)
    tokenizer.save_pretrained(folder)
    other = {"template_arguments": {"other": True}}
    found = write_gguf(folder, "f16", **other)
    field = gguf.GGUFReader(folder / found.file).get_field("tokenizer.ggml.eot_token_id")
    assert field.contents() == tokenizer.convert_tokens_to_ids("<|user|>")
    (folder / found.file).unlink()

    write_gguf(folder, "f16")
    checkout = _checkout(tmp_path, (folder / "model-f16.gguf").rename(tmp_path / "made.gguf"))
    write_gguf(folder, "f16", llama_cpp=checkout)
    (folder / "model-f16.gguf").unlink()
    with pytest.raises(ExportError, match="an end token did not come through"):
        write_gguf(folder, "f16", llama_cpp=checkout, **other)


def test_a_quantiser_makes_the_kinds_that_the_converter_does_not(
    folder: Path, tmp_path: Path
) -> None:
    write_gguf(folder, "q4_0")
    made = (folder / "model-q4_0.gguf").rename(tmp_path / "made.gguf")
    checkout = _checkout(tmp_path, made)
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text(script.read_text().replace("'f16'", "'bf16'"))
    with pytest.raises(ConfigError, match="needs llama-quantize"):
        write_gguf(folder, "q4_k_m", llama_cpp=checkout)
    (checkout / "build" / "bin").mkdir(parents=True)
    program = checkout / "build" / "bin" / "llama-quantize"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "assert sys.argv[3:] == ['Q4_K_M'], sys.argv\nshutil.copy(sys.argv[1], sys.argv[2])\n"
    )
    program.chmod(0o755)
    assert write_gguf(folder, "q4_k_m", llama_cpp=checkout).file == "model-q4_k_m.gguf"


def test_what_is_not_certain_is_refused_before_any_weight_is_read(folder: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    check_convertible(config, tokenizer)
    for change, message in (
        ({"model_type": "gpt2"}, "model type 'gpt2' is none of llama, mistral"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope scaling"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ):
        other = AutoConfig.from_pretrained(folder)
        for key, value in change.items():
            object.__setattr__(other, key, value)
        with pytest.raises(ExportError, match=message):
            check_convertible(other, tokenizer)
    spaced = AutoTokenizer.from_pretrained(folder)
    spaced.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    with pytest.raises(ExportError, match="cuts text in a way"):
        check_convertible(config, spaced)
    with pytest.raises(ConfigError, match="'q9' is none of f32"):
        write_gguf(folder, "q9")
    with pytest.raises(ConfigError, match=r"no convert_hf_to_gguf\.py there"):
        write_gguf(folder, "f16", llama_cpp=folder)
    with pytest.raises(OutputError, match=r"config\.json is missing"):
        write_gguf(folder / "nowhere", "f16")


def test_llama_cpp_itself_answers_as_the_merged_model(folder: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    found = write_gguf(folder, "f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = llama_cpp.Llama(str(folder / found.file), logits_all=True, n_ctx=256, verbose=False)
    ids = tokenizer(TEXT)["input_ids"]
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    model.eval(ids)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = _logits(plain, torch.tensor([ids]))[0]
    torch.testing.assert_close(torch.tensor(model.scores[: len(ids)]), expected, rtol=0, atol=1e-2)
