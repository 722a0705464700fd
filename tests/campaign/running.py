"""Cases of each kind, drawn by hypothesis from a seed and judged one after the other."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lora_dpo.data import load_preferences, tokenise
from lora_dpo.errors import LoraDpoError
from lora_dpo.run import train
from lora_dpo.stepping import fitted
from tests.campaign import commands, configs, data_files
from tests.campaign.judging import READ, BrokenLawError, Tally, hold, refusal

SECONDS = 60  # a case that takes longer hangs
SHARES = {"data files": 0.4, "configs": 0.55, "command lines": 0.05}
Judge = Callable[[Any, Path], str]
KINDS: dict[str, tuple[Any, Judge, Callable[[Path], None]]] = {
    "data files": (data_files.files(), data_files.judge, lambda folder: None),
    "configs": (configs.configs(), configs.judge, lambda folder: None),
    "command lines": (commands.lines(), commands.judge, commands.prepare),
}


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Raise ``BrokenLawError`` where a case hangs."""

    def over(number: int, frame: Any) -> None:
        raise BrokenLawError(f"no answer in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without log lines and warnings of cases, and with caches of their own."""
    ours, before = logging.getLogger("lora_dpo"), os.environ.get("LORA_DPO_CACHE")
    root, level = logging.getLogger(), ours.level
    handlers = [(logger, list(logger.handlers)) for logger in (root, ours)]
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["LORA_DPO_CACHE"] = cache
        ours.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            ours.setLevel(level)
            for logger, kept in handlers:
                logger.handlers[:] = kept
            if before is None:
                del os.environ["LORA_DPO_CACHE"]
            else:
                os.environ["LORA_DPO_CACHE"] = before


def drawn(strategy: Any, count: int, number: int, use: Callable[[Any], None]) -> None:
    """Hand so many different cases to ``use``, the same for the same seed."""
    seen: set[str] = set()
    asked = settings(
        max_examples=2,  # the simplest one, and one that is not a change of an earlier one
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )

    def one(case: Any) -> None:
        if len(seen) < count and (told := repr(case)) not in seen:
            seen.add(told)
            use(case)

    number *= 1_000_003
    while len(seen) < count:
        number += 1
        seed(number)(asked(given(strategy)(one)))()


def run_kind(
    kind: str, count: int, number: int, advance: Callable[[], None] = lambda: None
) -> Tally:
    """Judge so many cases of a kind."""
    strategy, judge, prepare = KINDS[kind]
    tally = Tally(kind)
    with tempfile.TemporaryDirectory() as name, quietly():
        folder = Path(name)
        prepare(folder)

        def judged(case: Any) -> str:
            with timed():
                return judge(case, folder)

        def use(case: Any) -> None:
            tally.run(judged, case)
            advance()

        drawn(strategy, count, number, use)
    return tally


@dataclass
class Trainer:
    """Trains a step on files that can be read, until there have been so many."""

    count: int
    model: Path
    tally: Tally = field(default_factory=lambda: Tally("training, one step"))

    def __call__(self, case: data_files.File, folder: Path) -> str:
        """Train on a file: as many rows as were kept, and a loss that is a number."""
        data = folder / case.name
        data.write_bytes(case.content)
        config = {
            "objective": "kto" if case.kind == "unpaired" else "dpo",
            "model": {"base": str(self.model)},
            "data": {"train": str(data), "eval_fraction": 0, "max_length": 2000,
                     **{k: v for k, v in case.settings.items() if v}},
            "lora": {"rank": 2},
            "train": {"max_steps": 1, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"},
            "output": {"dir": str(folder / "run"), "diagnose": False, "samples": 0},
        }  # fmt: skip
        if case.kind == "demonstrations":
            config["objective"] = "sft_demonstrations"
        try:
            run = train(config)
        except LoraDpoError as error:
            return refusal(error, (data.name, *data_files.SETTINGS, "rows"))
        rows = load_preferences(data, kind=run.objective.data, **case.settings)
        kept = tokenise(rows, data_files.tokenizer(), max_length=2000)
        kept, _ = fitted(run.objective, kept, None)  # with what the objective reads beside tokens
        hold(run.results["rows"]["train"] == len(kept), "rows trained on are not the rows kept")
        hold(run.results["train_rows"] == kept.fingerprint, "other tokens were trained on")
        losses = [line["loss"] for line in run.history if "loss" in line]
        hold(len(losses) == 1 and 0 <= losses[0] < 1e4, f"losses {losses}")
        return READ


def run_training(count: int, number: int, advance: Callable[[], None] = lambda: None) -> Tally:
    """Train a real step on so many files; most of what is drawn is refused before a model loads."""
    with tempfile.TemporaryDirectory() as name, quietly():
        model = Path(name) / "model"
        save_model(model)
        trainer = Trainer(count, model)

        def use(case: data_files.File) -> None:
            with tempfile.TemporaryDirectory() as inner:

                def judged(given: data_files.File) -> str:
                    with timed():
                        return trainer(given, Path(inner))

                trainer.tally.run(judged, case)
            advance()

        drawn(data_files.files(), count, number, use)
    return trainer.tally


def run_one(place: int, kind: str, count: int, seed: int) -> Tally:
    """Judge so many cases of a kind, with a bar."""
    with tqdm(total=count, desc=kind, unit="case", position=place, mininterval=1) as bar:
        if kind == "training":
            return run_training(count, seed, bar.update)
        return run_kind(kind, count, seed, bar.update)


def save_model(folder: Path) -> None:
    """Write a random Llama of two layers, wide enough for NF4, with the campaign's tokenizer."""
    torch.manual_seed(0)
    tokenizer = data_files.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
