"""Trains the quickstart's base model from scratch, and measures its held-out perplexity."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lora_dpo.quickstart import world
from lora_dpo.quickstart.chat_tokenizer import (
    MAX_POSITION,
    VOCABULARY,
    save_tokenizer,
    train_tokenizer,
)

TOKENIZER_STORIES = 20_000
BATCH = 32
"""Examples per step."""
POOL = 16
"""Batches drawn at once and sorted by length, so that a batch carries little padding."""
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
IGNORED = -100
"""The label of a token without loss: the request's and the padding's."""

HELD_OUT_SEED = 1_000_003
HELD_OUT_EXAMPLES = 512
"""The examples behind the stated perplexity; their subjects are never trained on."""

Row = tuple[list[int], int]
"""Token ids of one chat, and the length of its prompt in tokens."""


def encode(tokenizer: Any, example: world.Example) -> Row:
    """The chat of one example as ids; prompt and whole are rendered by the template."""
    chat = world.as_chat(example.request, example.story)
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def collate(rows: list[Row], pad: int) -> tuple[Any, Any]:
    """Right-padded ids and labels; only the story and the token that ends it have a loss.

    Padding on the right needs no attention mask: a causal model never looks ahead.
    """
    import torch

    width = max(len(ids) for ids, _ in rows)
    inputs = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (ids, prompt) in enumerate(rows):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return inputs, labels


def batches(tokenizer: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    """Endless training batches; no story is drawn twice, so there is nothing to overfit."""
    stream = world.examples(seed, held_out=False)
    rng = random.Random(seed)
    while True:
        rows = [encode(tokenizer, example) for example in islice(stream, BATCH * POOL)]
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, tokenizer.pad_token_id)


def story_loss(model: Any, inputs: Any, labels: Any) -> tuple[Any, int]:
    """The summed negative log-likelihood of the story tokens in nats, and their number."""
    import torch

    targets = labels[:, 1:]
    kept = targets != IGNORED
    hidden = model.model(input_ids=inputs[:, :-1]).last_hidden_state[kept]
    logits = model.lm_head(hidden).float()
    loss = torch.nn.functional.cross_entropy(logits, targets[kept], reduction="sum")
    return loss, int(kept.sum())


def held_out_perplexity(model: Any, tokenizer: Any, count: int = HELD_OUT_EXAMPLES) -> float:
    """Perplexity per story token on the first `count` held-out examples."""
    import torch

    stream = world.examples(HELD_OUT_SEED, held_out=True)
    rows = [encode(tokenizer, example) for example in islice(stream, count)]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, count, 64):
            inputs, labels = collate(rows[start : start + 64], tokenizer.pad_token_id)
            loss, kept = story_loss(model, inputs, labels)
            total, tokens = total + float(loss), tokens + kept
    return math.exp(total / tokens)


def new_model(tokenizer: Any, seed: int) -> Any:
    """An untrained Llama whose linear dimensions are all multiples of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Trains the model in place with AdamW, a short warm-up and a cosine decay to zero."""
    import torch

    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    start = time.perf_counter()
    for step, (inputs, labels) in enumerate(islice(batches(tokenizer, seed), steps)):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min((step + 1) / WARMUP_STEPS, cosine)
        loss, kept = story_loss(model, inputs, labels)
        mean = loss / kept
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps} loss {mean.item():.3f} nats {seconds:.0f} s", flush=True)


def build_model(to: Path, seed: int, steps: int) -> dict[str, Any]:
    """Trains tokenizer and model, saves both in `to`, and returns the facts of the build."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    start = time.perf_counter()
    corpus = islice(world.examples(seed, held_out=False), TOKENIZER_STORIES)
    tokenizer = train_tokenizer(text for ex in corpus for text in (ex.request, ex.story))
    model = new_model(tokenizer, seed)
    fit(model, tokenizer, steps, seed)
    model.to(torch.bfloat16)
    generation: Any = GenerationConfig
    model.generation_config = generation(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(to)
    (to / "model.safetensors").chmod(0o644)  # saved as 0600, which a package must not be
    save_tokenizer(tokenizer, to)
    seconds = time.perf_counter() - start
    saved = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    perplexity = held_out_perplexity(saved, tokenizer)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "examples_per_step": BATCH,
        "seed": seed,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "held_out_examples": HELD_OUT_EXAMPLES,
        "held_out_perplexity_per_story_token": round(perplexity, 4),
    }
