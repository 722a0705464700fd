"""Draws the quickstart's preference pairs from the base model itself, judged by the true reward.

Best against worst of several samples for one request. Both are finished, and their lengths are
close, so that length is no short cut to telling the chosen from the rejected.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from lora_dpo.quickstart import world
from lora_dpo.quickstart.reward import true_reward

TRAIN_PAIRS = 1200
HELD_OUT_PAIRS = 240
EVAL_PROMPTS = 240
SPARE = 1.2
"""Requests drawn per pair wanted: some requests give no pair that is far enough apart."""

SAMPLES = 6
"""Stories drawn per request."""
MINIMAL_GAP = 0.5
"""Least reward by which the chosen beats the rejected."""
LONGEST_RATIO = 1.3
"""Most by which one side of a pair is longer, in tokens."""

MAX_NEW_TOKENS = 120
"""The grammar's stories end before this; a sample which has not ended by then is dropped."""
BATCH = 40
"""Requests sampled at once."""

SUBJECT_SEED = 2_000_003
"""Kept apart from the seeds of training and of held-out perplexity."""


class Sample(NamedTuple):
    """One story the base told."""

    text: str
    tokens: int
    """Length without the token that ends it."""
    finished: bool
    reward: float


def draw_samples(
    model: Any, tokenizer: Any, requests: Sequence[str], count: int, seed: int
) -> list[list[Sample]]:
    """`count` samples per request at temperature 1, from the whole distribution."""
    import torch

    torch.manual_seed(seed)
    drawn: list[list[Sample]] = []
    for start in range(0, len(requests), BATCH):
        rendered = [
            tokenizer.apply_chat_template(
                world.as_chat(request), add_generation_prompt=True, tokenize=False
            )
            for request in requests[start : start + BATCH]
        ]
        inputs = tokenizer(rendered, padding=True, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=count,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        samples = [_as_sample(tokenizer, row) for row in rows]
        drawn += [samples[first : first + count] for first in range(0, len(samples), count)]
    return drawn


def _as_sample(tokenizer: Any, ids: list[int]) -> Sample:
    ended = tokenizer.eos_token_id in ids
    story = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    finished = ended and not set(story) & set(tokenizer.all_special_ids)
    text = tokenizer.decode(story)
    return Sample(text, len(story), finished, true_reward(text))


def length_ratio(one: Sample, other: Sample) -> float:
    """Tokens of the longer by tokens of the shorter, at least 1."""
    return max(one.tokens, other.tokens) / max(1, min(one.tokens, other.tokens))


def choose_pair(samples: Sequence[Sample]) -> tuple[Sample, Sample] | None:
    """The (chosen, rejected) of the widest gap, then of the closest lengths; None if too close."""
    finished = [sample for sample in samples if sample.finished]
    open_pairs = [
        (chosen, rejected)
        for chosen, rejected in permutations(finished, 2)
        if chosen.reward - rejected.reward >= MINIMAL_GAP
        and length_ratio(chosen, rejected) <= LONGEST_RATIO
    ]
    if not open_pairs:
        return None
    return max(open_pairs, key=lambda p: (p[0].reward - p[1].reward, -length_ratio(*p)))


def as_score(reward: float) -> float:
    """The reward from 0 (all unkind) to 1 (all kind), as the pairs carry it."""
    return round((reward + 1) / 2, 4)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _write_pairs(
    path: Path, requests: Sequence[str], drawn: Sequence[Sequence[Sample]], wanted: int
) -> dict[str, Any]:
    """Writes the first `wanted` pairs and returns their statistics."""
    found = [(req, choose_pair(samples)) for req, samples in zip(requests, drawn, strict=True)]
    pairs = [(req, pair) for req, pair in found if pair is not None][:wanted]
    if len(pairs) < wanted:
        raise RuntimeError(f"{path.name}: only {len(pairs)} of {wanted} pairs are far enough apart")
    rows = [
        {
            "prompt": world.as_chat(request),
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "score_chosen": as_score(chosen.reward),
            "score_rejected": as_score(rejected.reward),
        }
        for request, (chosen, rejected) in pairs
    ]
    _write_rows(path, rows)
    chosen, rejected = zip(*(pair for _, pair in pairs), strict=True)
    return {
        "pairs": len(pairs),
        "chosen_reward": round(fmean(s.reward for s in chosen), 4),
        "rejected_reward": round(fmean(s.reward for s in rejected), 4),
        "chosen_tokens": round(fmean(s.tokens for s in chosen), 2),
        "rejected_tokens": round(fmean(s.tokens for s in rejected), 2),
        "chosen_is_longer": round(
            fmean(c.tokens > r.tokens for c, r in zip(chosen, rejected, strict=True)), 4
        ),
        "requests_without_a_pair": round(fmean(pair is None for _, pair in found), 4),
    }


def sample_statistics(
    subjects: Sequence[world.Subject], drawn: Sequence[Sequence[Sample]]
) -> dict[str, float]:
    """What the base's samples are like: their reward, its spread, and how well they answer."""
    rewards = [sample.reward for samples in drawn for sample in samples]
    fours = [[sample.reward for sample in samples[:4]] for samples in drawn]
    faithful = [
        all(word in sample.text for word in (subject.name, subject.animal, subject.thing))
        for subject, samples in zip(subjects, drawn, strict=True)
        for sample in samples
    ]
    stats = {
        "reward_mean": fmean(rewards),
        "reward_deviation": pstdev(rewards),
        "reward_best_of_4": fmean(max(four) for four in fours),
        "reward_worst_of_4": fmean(min(four) for four in fours),
        "finished_share": fmean(sample.finished for samples in drawn for sample in samples),
        "names_hero_and_object_share": fmean(faithful),
    }
    return {name: round(value, 4) for name, value in stats.items()}


def build_preferences(model_folder: Path, to: Path, seed: int) -> dict[str, Any]:
    """Writes the pairs and the evaluation prompts into `to`, and returns the facts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rng = random.Random(SUBJECT_SEED + seed)
    facts: dict[str, Any] = {"seed": seed, "samples_per_request": SAMPLES, "temperature": 1.0}
    facts |= {"minimal_gap": MINIMAL_GAP, "longest_ratio": LONGEST_RATIO}
    held_out: list[tuple[world.Subject, str]] = []
    for name, wanted, side in (("train", TRAIN_PAIRS, False), ("heldout", HELD_OUT_PAIRS, True)):
        asked = world.sample_requests(rng, side, round(wanted * SPARE))
        held_out += asked if side else []
        subjects, requests = zip(*asked, strict=True)
        drawn = draw_samples(model, tokenizer, requests, SAMPLES, seed)
        facts[name] = _write_pairs(to / f"{name}.jsonl", requests, drawn, wanted)
        facts[f"base_samples_{name}"] = sample_statistics(subjects, drawn)
    used = frozenset(subject for subject, _ in held_out)
    fresh = world.sample_requests(rng, True, EVAL_PROMPTS, avoid=used)
    rows = [{"prompt": world.as_chat(request)} for _, request in fresh]
    _write_rows(to / "eval_prompts.jsonl", rows)
    return facts | {"eval_prompts": len(rows), "seconds": round(time.perf_counter() - start)}
