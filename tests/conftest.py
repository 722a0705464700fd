"""Shared parts of the tests: tiny real models on disk, in real NF4."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait by spinning make small models many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
WIDE = {
    "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pages first: the site is built for a minute, while the other process has work of its own."""
    items.sort(key=lambda item: item.path.name != "test_site.py")  # stable: the rest stays in order


def pytest_collection_finish() -> None:
    """Libraries and tests live to the end: collecting garbage need not look at them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LORA_DPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers on disk, wide enough for NF4 blocks, in float32."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def write_tiny_model(folder: Path) -> Path:
    """Write that model, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: no merges, so that prompt and completion never touch. Ends with </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def policy(tiny_model: Path) -> PeftModel:
    """Return a policy of the small model, off its reference."""
    from lora_dpo.policy import load_policy
    from tests.helpers import move_adapter

    found = load_policy(tiny_model)
    move_adapter(found)
    return found.eval()


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose activations are more than its weights."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDE)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    """Sixteen pairs of unequal lengths, each with its own prompt."""
    return [
        {
            "prompt": f"Question {i}{'?' * (i % 5)}",
            "chosen": " yes" * (1 + i % 4) + ".",
            "rejected": " no, no" * (1 + (i * 3) % 5) + "!",
        }
        for i in range(16)
    ]


@pytest.fixture(scope="session")
def quickstart_model() -> Path:
    """The bundled small model with its tokenizer."""
    return ROOT / "lora_dpo" / "quickstart" / "model"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models beside the checkout; tests that use them skip without."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED
