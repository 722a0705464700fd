"""``SERVE.md``: the exact commands that serve an export, in vLLM, llama.cpp, Ollama and transformers.

Commands are meant for a shell inside the folder, so that no path of the machine that exported stands
in them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lora_dpo.handing.consumers import Consumer, consumers, vllm_rank
from lora_dpo.policy import Folded

NAME = "policy"
BASE_FOLDER = "BASE"  # stands for a base that has no name on the hub

_PLAIN_PYTHON = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="auto")
"""
_ADAPTER_PYTHON = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, ".")
"""
_CHAT_PYTHON = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
"""
_TEXT_PYTHON = """inputs = tokenizer("Once upon a time", return_tensors="pt")
"""
_ANSWER_PYTHON = """out = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def serve_merged(*, chat: bool, gguf: str | None = None) -> str:
    """Return the guide for a folder of merged weights.

    Args:
        chat: whether the model is asked in chats.
        gguf: name of a GGUF file in the folder, if there is one.
    """
    template = " --chat-template chat_template.jinja" if chat else ""
    jinja = " --jinja" if chat else ""
    convert = (
        f"llama-server -m {shlex.quote(gguf)}{jinja} --port 8080"
        if gguf
        else "python LLAMA_CPP/convert_hf_to_gguf.py . --outtype bf16 --outfile model-bf16.gguf\n"
        "llama-quantize model-bf16.gguf model-Q4_K_M.gguf Q4_K_M   # optional\n"
        f"llama-server -m model-bf16.gguf{jinja} --port 8080"
    )
    parts = [
        _head("merged weights"),
        _section("vLLM", f"vllm serve . --served-model-name {NAME}{template}"),
        _section("llama.cpp", convert, after="" if gguf else _LLAMA_CPP),
        _section("Ollama", f"ollama create {NAME} -f Modelfile\nollama run {NAME}"),
        _section("transformers", _python(_PLAIN_PYTHON, chat), "python"),
        _checks(chat=chat),
    ]
    return "\n\n".join(parts) + "\n"


def serve_adapter(adapter: Folded, *, chat: bool, base_id: str | None) -> str:
    """Return the guide for a folder with an adapter alone.

    Args:
        adapter: what was written.
        chat: whether the model is asked in chats.
        base_id: hub id of the base; None where only the user knows where it is.
    """
    base = base_id or BASE_FOLDER
    found = {consumer.name: consumer for consumer in consumers(adapter)}
    template = " --chat-template chat_template.jinja" if chat else ""
    jinja = " --jinja" if chat else ""
    vllm = (
        f"vllm serve {base} --enable-lora --max-lora-rank {vllm_rank(adapter.rank)} "
        f"--lora-modules {NAME}=.{template}"
    )
    llama = (
        f"python LLAMA_CPP/convert_lora_to_gguf.py . --base {BASE_FOLDER} --outfile adapter.gguf\n"
        f"llama-server -m BASE.gguf --lora adapter.gguf{jinja} --port 8080"
    )
    parts = [
        _head("an adapter"),
        "It belongs on its base"
        + (f", `{base_id}`." if base_id else "; put the base's folder or hub id for `BASE` below.")
        + " Served on a base that is not quantised as in training, it answers a little differently: "
        "the rounding of the base is gone.",
        _section("vLLM", vllm, consumer=found["vLLM"]),
        _section("llama.cpp", llama, consumer=found["llama.cpp"], after=_LLAMA_CPP_BASE),
        _section(
            "Ollama",
            f"ollama create {NAME} -f Modelfile\nollama run {NAME}",
            consumer=found["Ollama"],
        ),
        _section("peft", _python(_ADAPTER_PYTHON.format(base=base), chat), "python"),
        _checks(chat=chat, adapter=True),
    ]
    return "\n\n".join(parts) + "\n"


_LLAMA_CPP = "`LLAMA_CPP` is a checkout of llama.cpp; its two programs come from building it."
_LLAMA_CPP_BASE = (
    f"`LLAMA_CPP` is a checkout of llama.cpp, `{BASE_FOLDER}` a folder with the base's config, and "
    "`BASE.gguf` the base, converted with `convert_hf_to_gguf.py`."
)


def _head(what: str) -> str:
    return f"# How to serve this\n\nThis folder holds {what}. All commands are for a shell inside of it."


def _section(
    name: str,
    command: str,
    language: str = "sh",
    *,
    consumer: Consumer | None = None,
    after: str = "",
) -> str:
    if consumer is not None and not consumer.serves:
        return f"## {name}\n\n{name} refuses this adapter: {consumer.why}."
    text = f"## {name}\n\n```{language}\n{command.rstrip()}\n```"
    return f"{text}\n\n{after}" if after else text


def _python(load: str, chat: bool) -> str:
    return "".join([load, _CHAT_PYTHON if chat else _TEXT_PYTHON, _ANSWER_PYTHON])


def _checks(*, chat: bool, adapter: bool = False) -> str:
    lines: Sequence[str] = [
        "lora-dpo smoke http://127.0.0.1:8000 --of . --model policy      # vLLM",
        "lora-dpo smoke http://127.0.0.1:8080 --of .                     # llama.cpp",
        "lora-dpo smoke http://127.0.0.1:11434 --of . --model policy     # Ollama",
        "lora-dpo smoke . --base BASE" if adapter else "lora-dpo smoke .",
    ]
    asked = "chats" if chat else "texts"
    return (
        "## Is it the policy that was trained?\n\n"
        f"`smoke_test.json` holds a few {asked} with the likeliest first tokens of the trained policy. "
        "This compares them with what is served, or with the folder itself:\n\n```sh\n"
        + "\n".join(lines)
        + "\n```\n\nWeights quantised further differ more; `--tolerance 1.0` allows for it."
    )
