"""Layers that wait in the memory of the CPU in place of being recomputed: what is planned, and what is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, TrainingArguments

from lora_dpo import memory
from lora_dpo.arguments import checkpointing_fields
from lora_dpo.config import LoraConfig
from lora_dpo.data import load_preferences, tokenise
from lora_dpo.engine import choose_engine, lay_out, recompute_layers
from lora_dpo.forward import both_logps
from lora_dpo.layers import offloading, work
from lora_dpo.planning import (
    Batches,
    Plan,
    Setting,
    asking,
    card_of,
    make_plan,
    measure,
    moved_instead,
)
from lora_dpo.planning.cards import GIB, LINK, Card
from lora_dpo.policy import load_policy, peft_config
from lora_dpo.trainer import PreferenceTrainer
from tests.allocating import peak_allocated
from tests.conftest import WIDE
from tests.helpers import fast_work
from tests.test_offloading import Queue
from tests.test_planning import ROWS

LORA = LoraConfig(rank=8)
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


# ---- the plan --------------------------------------------------------------------------------


def _pairs(prompt: int, answer: int) -> list[dict[str, Any]]:
    row = {"prompt_ids": [1] * prompt, "chosen_ids": [2] * answer, "rejected_ids": [3] * answer}
    return [row] * 4


def _plan(card: str, prompt: int, answer: int, **how: Any) -> Plan:
    setting = Setting(LLAMA, peft_config(LoraConfig(rank=16)))
    where = card_of(card)
    options: Any = {"room": where.room, "room_is": card, "card": where, "remedies": False, **how}
    return make_plan(setting, _pairs(prompt, answer), Batches(1, 4), **options)


def test_a_slow_card_lets_layers_wait_and_a_fast_one_computes_them_again() -> None:
    """An RTX 3060 takes longer over a layer of 4,096 tokens than its link over what the layer keeps."""
    plan = _plan("rtx3060", 2048, 1024)
    other = moved_instead(plan)
    assert other is not None and other.seconds is not None and plan.seconds is not None
    assert other.seconds < 0.9 * plan.seconds
    assert other.recomputed < plan.recomputed and other.fits
    assert other.operations < plan.operations
    # each byte crosses twice, one after the other, and hides behind the computation here
    crosses = 2 * 4 * other.moved * other.bytes.kept / LINK
    assert crosses < other.seconds
    faster = replace(plan, card=replace(card_of("rtx3060"), name="?", tflops=1e6, gb_per_s=1e6))
    faster = replace(faster, seconds=1e-3)
    assert moved_instead(faster) is None  # the link alone takes longer


def test_as_few_are_recomputed_as_can_be_and_no_more_wait_than_must() -> None:
    plan = _plan("rtx3060", 2048, 1024)
    room, found = plan.room, plan.bytes
    assert room is not None
    for most in (None, 4 * found.kept, 10 * found.kept):
        other = moved_instead(plan, most)
        assert other is not None
        limit = found.layers if most is None else most // found.kept
        assert other.moved <= limit and other.recomputed + other.moved <= found.layers
        assert found.peak(other.recomputed, other.moved) <= room
        assert found.peak(other.recomputed, other.moved - 1) > room
        if other.recomputed:
            assert all(found.peak(other.recomputed - 1, m) > room for m in range(limit + 1))
    assert moved_instead(plan, found.kept - 1) is None


@pytest.mark.parametrize(
    "change",
    [
        {"offloads": False},
        {"card": None},
        {"room": None},
        {"recompute": False},
        {"offloaded": True},
    ],
)
def test_none_waits_where_none_may_or_need(change: dict[str, Any]) -> None:
    plan = _plan("rtx3060", 2048, 1024)
    assert moved_instead(replace(plan, **change)) is None
    assert moved_instead(_plan("rtx3090", 512, 512)) is None  # nothing is recomputed there


def test_a_plan_says_what_could_wait_and_where_that_is_not_wanted_what_it_would_spare() -> None:
    plan = _plan("rtx3060", 2048, 1024)
    assert "train times both and takes the faster" in str(plan)
    unknown = _plan("12GiB", 2048, 1024)  # no rate is known: to be tried
    assert moved_instead(unknown) is not None and "layers wait in" in str(unknown)
    assert "layers wait in" not in str(_plan("rtx3060", 2048, 1024, offloads=False))
    setting = replace(plan.setting, keeps_weights=False)
    least = measure(setting, _pairs(2048, 1024)[:1])
    tight = {"room": (least.peak() + least.offloaded().peak()) // 2, "remedies": True}
    without = _plan("rtx3060", 2048, 1024, offloads=False, **tight)
    assert without.fits is False and not without.offloaded
    offered = [r for r in without.remedies if r.change == "train.activation_offloading: true"]
    assert len(offered) == 1 and offered[0].fits
    assert _plan("rtx3060", 2048, 1024, **tight).offloaded


def test_inputs_that_wait_cross_the_link_in_the_time_of_a_step() -> None:
    """Every recomputed layer's input, 8 KiB a token, there and back, at the link's rate."""
    setting = Setting(LLAMA, peft_config(LoraConfig(rank=16)))
    card = replace(card_of("rtx3060"), tflops=1e9, gb_per_s=1e9)
    rows = _pairs(2048, 1024)
    how: Any = {"offloaded": True, "room": 10**12, "card": card}
    plan = make_plan(setting, rows, Batches(1, 4), least=32, **how)
    assert plan.widest == 2048 + 2 * 1023
    # rows of one prompt could meet in a micro-batch of several; here they are one by one
    assert plan.seconds == pytest.approx(2 * 4 * 32 * 8192 * plan.widest / LINK, rel=1e-6)


@pytest.mark.parametrize("late", [True, False])
def test_the_predicted_peak_is_within_a_tenth_of_what_a_step_allocates(
    wide_model: Path, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "link_of", lambda device: Queue(late=late))
    monkeypatch.setattr(offloading, "SMALL", 0)
    setting = Setting(LlamaConfig(**WIDE), peft_config(LORA), dtype=torch.float32, chunk=64)
    found = measure(setting, ROWS, accumulates=False)
    policy = load_policy(wide_model, lora=LORA).train()
    choose_engine(policy, ROWS[:2], 300, "fast", chunk=64)
    batch = lay_out(ROWS, flat=True)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        ours, theirs = both_logps(policy, batch, chunk=64)
        (ours - theirs).sum().backward()

    for recomputed, moved in ((0, 5), (0, 3), (1, 1), (2, 3), (3, 2)):
        recompute_layers(policy, recomputed, moved=moved)
        step()
        policy.zero_grad(set_to_none=True)
        measured = peak_allocated(step)
        assert found.activations(recomputed, moved) == pytest.approx(measured, rel=0.1)


# ---- what a run takes ------------------------------------------------------------------------


class _Clock:
    """Time as work: a tick for each call of a decoder layer, and what copies take."""

    def __init__(self, link: Any, ticks: int) -> None:
        self.link, self.ticks, self.calls = link, ticks, 0

    def perf_counter(self) -> float:
        return float(self.calls + self.ticks * len(self.link.copies))


def _trainer(
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    link: Any,
    ticks: int,
    **options: Any,
) -> tuple[PreferenceTrainer, float]:
    """Return a trainer that has to recompute some layers of five, as on a card of unknown rates."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    clock = _Clock(link, ticks)
    forward = LlamaDecoderLayer.forward

    def counting(self: Any, *args: Any, **kw: Any) -> Any:
        clock.calls += 1
        return forward(self, *args, **kw)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counting)
    monkeypatch.setattr(memory, "time", clock)
    monkeypatch.setattr(memory, "has_link", lambda device: True)
    monkeypatch.setattr(work, "link_of", lambda device: link)
    monkeypatch.setattr(offloading, "SMALL", 0)
    monkeypatch.setattr(asking, "this_card", lambda device=None: Card("a card", 1))
    pairs = [
        {"prompt": "why? " * (5 + i), "chosen": " because." * 5, "rejected": " no!" * 9}
        for i in range(8)
    ]
    rows = tokenise(load_preferences(pairs), AutoTokenizer.from_pretrained(model), max_length=512)

    def made(budget: int, **further: Any) -> PreferenceTrainer:
        torch.manual_seed(0)
        args = TrainingArguments(
            output_dir=str(folder), max_steps=2, save_strategy="no", report_to=[], use_cpu=True,
            per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
            **checkpointing_fields({"gradient_checkpointing": True}),
        )  # fmt: skip
        policy = load_policy(model, lora=LORA)
        how = {"memory_budget_gib": budget / GIB, **further}
        return PreferenceTrainer(policy, args=args, train_data=rows, **how)

    plan = made(10 * GIB).memory.plan
    assert plan is not None
    room = plan.bytes.peak(3) + 1
    return made(room, **options), room


def _run(trainer: PreferenceTrainer) -> tuple[list[float], list[torch.Tensor]]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("ticks", "taken"), [(0, True), (100, False)])
def test_what_is_faster_is_taken_and_no_number_depends_on_it(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ticks: int, taken: bool
) -> None:
    link = Queue(late=True)
    trainer, room = _trainer(wide_model, tmp_path, monkeypatch, link=link, ticks=ticks)
    plan = trainer.memory.plan
    assert plan is not None and plan.recomputed == 3 and "train times both" in str(plan)
    told: list[tuple[int, dict[str, Any]]] = []
    trainer.memory.tell = lambda: told.append((len(link.copies), trainer.memory.to_dict()))
    found = _run(trainer)
    now, state = trainer.memory.plan, fast_work(trainer.model)
    assert now is not None and now.peak <= room
    assert (state.moved > 0) == (now.moved > 0) == taken == (len(link.copies) > told[-1][0])
    assert state.recomputed == now.recomputed == (0 if taken else 3)
    _, last = told[-1]
    assert last["moved_layers"] == now.moved and "layers in the memory" in last["tried"]
    monkeypatch.setattr(memory, "has_link", lambda device: False)
    plain, _ = _trainer(wide_model, tmp_path, monkeypatch, link=link, ticks=ticks)
    monkeypatch.setattr(memory, "has_link", lambda device: False)
    losses, weights = _run(plain)
    assert plain.memory.tried == "" and losses == found[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, found[1], strict=True))


class _Corrupting(Queue):
    """A link that brings back another number here and there."""

    def fetch(self, held: Any) -> Any:
        held[7::64] ^= 64
        return super().fetch(held)


class _Full(Queue):
    """A link to a memory that is full."""

    def send(self, source: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory (pinned)")


@pytest.mark.parametrize(
    ("link", "words"), [(_Corrupting, "gradients differ by"), (_Full, "out of memory (pinned)")]
)
def test_a_link_that_fails_or_lies_is_not_taken_and_the_run_goes_on(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Any, words: str
) -> None:
    trainer, _ = _trainer(wide_model, tmp_path, monkeypatch, link=link(late=False), ticks=0)
    losses, _ = _run(trainer)
    state = fast_work(trainer.model)
    assert (state.recomputed, state.moved) == (3, 0)
    assert words in trainer.memory.tried and len(losses) == 2
    assert trainer.memory.changes == []


def test_what_is_not_wanted_is_not_tried(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Queue(late=False)
    how: Any = {"link": link, "ticks": 0, "activation_offloading": False}
    trainer, _ = _trainer(wide_model, tmp_path, monkeypatch, **how)
    _run(trainer)
    assert not link.copies and trainer.memory.tried == ""


def test_memory_that_runs_out_later_gives_up_waiting_first(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Queue(late=False)
    trainer, _ = _trainer(wide_model, tmp_path, monkeypatch, link=link, ticks=0)
    failed: list[int] = []
    plain = trainer.training_step

    def short(*args: Any, **kw: Any) -> Any:
        state = fast_work(trainer.model)
        if not failed:
            failed.append(state.moved)
            last = state.layers[-1]
            forward = last.forward

            def fails(*args: Any, **kw: Any) -> Any:
                last.forward = forward
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB")

            last.forward = fails
        return plain(*args, **kw)

    monkeypatch.setattr(trainer, "training_step", short)
    losses, _ = _run(trainer)
    state = fast_work(trainer.model)
    assert failed[0] > 0 and (state.recomputed, state.moved) == (3, 0)
    assert "3 of 5 layers are recomputed" in trainer.memory.changes[0] and len(losses) == 2
