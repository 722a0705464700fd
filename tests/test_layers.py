"""The fast layers: equal to the library's own, fewer dequantisations, fewer bytes, nothing left behind."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_pairs, flat_pairs
from lora_dpo.engine import choose_engine, collate, has_fast_layers
from lora_dpo.forward import both_logps, completion_logps, pair_stats
from lora_dpo.layers import decoder_layers, release, take
from lora_dpo.planning.imagined import Ledger
from lora_dpo.policy import load_policy, reference
from tests.helpers import fast_work, move_adapter
from tests.test_engine import ROWS, _gradient, _model, _one_at_a_time

LONG = [
    {
        "prompt_ids": list(range(3, 33)),
        "chosen_ids": list(range(40, 60)),
        "rejected_ids": list(range(50, 80)),
    }
]


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("keeps_weights", [True, False])
@pytest.mark.parametrize("offloaded", [True, False])
def test_policy_reference_and_gradient_equal_one_sequence_at_a_time_in_4_bit(
    policy: PeftModel, recomputed: int, keeps_weights: bool, offloaded: bool
) -> None:
    expected = _one_at_a_time(policy, ROWS)
    gradient = _gradient(policy, expected)
    with reference(policy):
        theirs = _one_at_a_time(policy, ROWS)
    for batch in (flat_pairs(ROWS), collate_pairs(ROWS, pad_id=0)):
        assert "fast" in choose_engine(policy, ROWS, 9, "fast", chunk=5)
        if not hasattr(batch, "segments"):
            policy.get_base_model().config._attn_implementation = "sdpa"
        work = fast_work(policy)
        work.recomputed, work.keeps_weights, work.offloaded = recomputed, keeps_weights, offloaded
        ours, other = both_logps(policy, batch, chunk=5)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other, theirs, rtol=1e-5, atol=1e-4)
        found = _gradient(policy, ours)
        assert float((found - gradient).norm() / gradient.norm()) < 1e-5
        assert not other.requires_grad


def test_the_pass_for_both_equals_the_context_of_the_reference_from_a_starting_adapter(
    policy: PeftModel, tmp_path: Path, tiny_model: Path
) -> None:
    policy.save_pretrained(tmp_path / "start")
    started = load_policy(tiny_model, adapter=tmp_path / "start")
    move_adapter(started, std=0.3)
    choose_engine(started, ROWS, 9, "fast", chunk=64)
    assert fast_work(started).fusable
    batch = flat_pairs(ROWS)
    ours, theirs = both_logps(started, batch)
    with reference(started):
        expected = completion_logps(started, batch)
    torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=1e-5)
    assert float((ours - theirs).detach().abs().max()) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(completion_logps(started, batch), ours, rtol=1e-6, atol=1e-5)


def test_every_weight_is_dequantised_twice_a_micro_batch_and_four_times_without_us(
    policy: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = bitsandbytes.functional.dequantize_4bit

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", counting)
    quantised = sum(type(m).__name__ == "Linear4bit" for m in policy.modules()) // 2  # and base
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    work = fast_work(policy)
    for keeps, expected in ((True, 2), (False, 4)):
        work.keeps_weights = keeps
        work.dequantised.clear()
        calls.clear()
        ours, theirs = both_logps(policy, flat_pairs(ROWS))
        (ours - theirs).sum().backward()
        assert len(work.dequantised) == quantised
        # where none waits: not an MLP's last projection in a recomputation, nor what stands
        # before everything that is trained in backward
        names = {m: n for n, m in policy.named_modules()}
        spared = (
            "down_proj.base_layer",
            *(f"layers.0.self_attn.{x}_proj.base_layer" for x in "qkv"),
        )
        for layer, count in work.dequantised.items():
            assert count == (expected if keeps or not names[layer].endswith(spared) else 3)
        assert sum(work.dequantised.values()) == len(calls)


def test_bytes_kept_of_a_layer_are_its_input_or_less_than_the_librarys(policy: PeftModel) -> None:
    batch = flat_pairs(LONG)
    tokens = batch.input_ids.shape[1]
    hidden = policy.config.hidden_size

    def kept() -> int:
        ledger = Ledger()
        for tensor in [*policy.parameters(), *policy.buffers()]:
            ledger.watch(tensor)
        static = ledger.now
        with ledger:
            values = completion_logps(policy, batch)
            found = ledger.now - static
        values.sum().backward()
        return found

    choose_engine(policy, ROWS, 90, "fast", chunk=64)
    work = fast_work(policy)
    layers = len(decoder_layers(policy.get_base_model()))
    by_count = []
    for count in range(layers + 1):
        work.recomputed = count
        by_count.append(kept())
    steps = [a - b for a, b in pairwise(by_count)]
    assert all(step > 0 for step in steps), by_count
    # a recomputed layer keeps its input and nothing else; the most that one more can spare is less
    assert by_count[-1] >= layers * tokens * hidden * 4
    assert _kept_of_a_layer() == tokens * 64 * 4
    work.off = True
    assert by_count[0] < kept()


def _kept_of_a_layer() -> int:
    """Return the bytes that one more recomputed layer keeps, from models of two and four layers."""
    found = []
    for count in (2, 4):
        policy = load_policy(_model("llama", num_hidden_layers=count), lora=LoraConfig(rank=2))
        choose_engine(policy, ROWS, 90, "fast", chunk=64)
        ledger = Ledger()
        for tensor in [*policy.parameters(), *policy.buffers()]:
            ledger.watch(tensor)
        static = ledger.now
        with ledger:
            values = completion_logps(policy, flat_pairs(LONG))
            found.append(ledger.now - static)
        del values
    return (found[1] - found[0]) // 2


def test_pairs_of_one_prompt_share_it_and_an_answer_that_stands_twice_runs_once(
    policy: PeftModel,
) -> None:
    best, middle, worst = [5, 6, 7, 8], [5, 6, 9], [10, 11]
    prompt = [20, 21, 22]
    rows = [
        {"prompt_ids": prompt, "chosen_ids": best, "rejected_ids": middle},
        {"prompt_ids": [30], "chosen_ids": [31], "rejected_ids": [32, 33]},
        {"prompt_ids": prompt, "chosen_ids": best, "rejected_ids": worst},
    ]
    batch = flat_pairs(rows)
    # the prompt once, each of three answers once without its last token; the other pair alone
    assert batch.input_ids.shape[1] == (3 + 3 + 2 + 1) + (1 + 0 + 1)
    expected = _one_at_a_time(policy, rows)
    gradient = _gradient(policy, expected)
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    found = completion_logps(policy, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    moved = _gradient(policy, found)
    assert float((moved - gradient).norm() / gradient.norm()) < 1e-5


def test_a_pair_that_shares_more_with_itself_than_with_its_prompts_others_stays_alone() -> None:
    rows = [
        {"prompt_ids": [3], "chosen_ids": [4] * 5 + [5], "rejected_ids": [4] * 5 + [3]},
        {"prompt_ids": [3], "chosen_ids": [5], "rejected_ids": [3]},
    ]
    alone = sum(flat_pairs([row]).input_ids.shape[1] for row in rows)
    assert flat_pairs(rows).input_ids.shape[1] == alone == 7


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=2, targets=["q_proj", "v_proj"], modules_to_save=["mlp"]),
        LoraConfig(rank=2, targets=["q_proj", "down_proj", "lm_head"]),
        LoraConfig(rank=2, modules_to_save=["lm_head"]),
        LoraConfig(rank=2, modules_to_save=["embed_tokens", "norm"]),
    ],
)
def test_what_else_is_trained_gets_its_gradient_beside_the_fast_layers(
    tiny_model: Path, lora: LoraConfig
) -> None:
    base = _model("llama") if "mlp" in lora.modules_to_save else tiny_model  # no whole 4-bit copy
    policy = load_policy(base, lora=lora).eval()
    move_adapter(policy)
    expected = _one_at_a_time(policy, ROWS)
    gradient = _gradient(policy, expected)
    line = choose_engine(policy, ROWS, 9, "fast", chunk=64)
    assert has_fast_layers(policy), line
    batch = flat_pairs(ROWS)
    with reference(policy):
        theirs = completion_logps(policy, batch)
    for recomputed in (0, 2):
        fast_work(policy).recomputed = recomputed
        ours, other = both_logps(policy, batch)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other, theirs, rtol=1e-5, atol=1e-4)
        found = _gradient(policy, ours)
        assert float((found - gradient).norm() / gradient.norm()) < 1e-5


def test_rows_beyond_a_sliding_window_are_padded_wherever_they_come_from() -> None:
    policy = load_policy(_model("mistral", sliding_window=12), lora=LoraConfig(rank=2)).eval()
    move_adapter(policy)
    assert "rows end to end" in choose_engine(policy, ROWS, 9, "auto", chunk=64)
    expected = _one_at_a_time(policy, LONG)
    found = completion_logps(policy, collate(policy, LONG))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert hasattr(collate(policy, ROWS), "segments")
    row = {"prompt_ids": [3], "completion_ids": [4], "label": True}
    assert hasattr(collate(policy, [{**row, "mismatched_ids": [5] * 11}]), "segments")
    assert not hasattr(collate(policy, [{**row, "mismatched_ids": [5] * 12}]), "segments")


def test_checkpointing_that_is_asked_for_later_holds_for_every_batch(policy: PeftModel) -> None:
    choose_engine(policy, ROWS, 9, "fast", chunk=64, recompute=False)
    policy.train()
    assert fast_work(policy).recomputed == 0
    library = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    policy.get_base_model()._set_gradient_checkpointing(True, library)
    for _ in range(3):
        completion_logps(policy, flat_pairs(ROWS)).sum().backward()
        assert fast_work(policy).recomputed == 2


def test_layers_that_others_have_patched_or_that_are_not_known_are_left_to_the_library(
    policy: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = decoder_layers(policy.get_base_model())[0]
    calls = []
    original = layer.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = patched
    line = choose_engine(policy, ROWS, 9, "fast", chunk=64)
    assert "patched" in line and not has_fast_layers(policy)
    completion_logps(policy, flat_pairs(ROWS))
    assert calls and layer.forward is patched
    del layer.forward
    monkeypatch.setattr("lora_dpo.layers.decoder_layers", lambda causal: [])
    assert "of its own kind" in choose_engine(policy, ROWS, 9, "fast", chunk=64)


class _Logits(TorchDispatchMode):
    """Notes the most rows of a tensor with a dimension of the vocabulary, but for the head's weight."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0
        self.weight = {(vocabulary, hidden), (hidden, vocabulary)}  # as it is and turned round

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if not isinstance(value, torch.Tensor) or tuple(value.shape) in self.weight:
                continue
            if self.vocabulary in value.shape:
                self.rows = max(self.rows, value.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"kls", "confidences"})])
def test_no_tensor_with_a_vocabulary_dimension_is_larger_than_a_chunk(
    needs: frozenset[str], chunk: int
) -> None:
    vocabulary, hidden = 1013, 96  # a vocabulary that nothing else has, a width that no chunk has
    model = _model("llama", vocab_size=vocabulary, hidden_size=hidden)
    policy = load_policy(model, lora=LoraConfig(rank=2, targets=["q_proj", "down_proj"])).train()
    move_adapter(policy)
    assert all(not p.requires_grad for p in policy.parameters() if vocabulary in p.shape)
    choose_engine(policy, ROWS, 90, "fast", chunk=chunk)
    batch = flat_pairs(LONG * 2)
    assert len(batch.targets) > hidden  # one tensor of all logits would be seen
    with _Logits(vocabulary, hidden) as seen:
        stats = pair_stats(policy, batch, chunk=chunk, needs=needs)
        margins = stats.policy_chosen_logps - stats.policy_rejected_logps
        assert seen.rows == chunk  # forward, of policy and reference
    with _Logits(vocabulary, hidden) as seen:
        margins.sum().backward()
    assert seen.rows == 0  # the gradient of each value was taken with it
    with torch.no_grad(), reference(policy), _Logits(vocabulary, hidden) as seen:
        completion_logps(policy, batch, chunk=chunk)
    assert seen.rows == chunk


def test_generation_and_the_librarys_forward_run_on_the_librarys_layers(policy: PeftModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = policy(input_ids=ids).logits
        choose_engine(policy, ROWS, 9, "fast", chunk=64)
        work = fast_work(policy)
        work.dequantised.clear()
        assert torch.equal(policy(input_ids=ids).logits, expected)
    assert not work.dequantised


def test_layers_are_taken_off_again_and_a_copy_has_its_own(policy: PeftModel) -> None:
    before = {id(m): set(vars(m)) for m in policy.modules()}
    choose_engine(policy, ROWS, 9, "auto", chunk=64)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    batch = flat_pairs(ROWS)
    with torch.no_grad():
        moved, fresh = completion_logps(policy, batch), completion_logps(twin, batch)
        with reference(policy):
            theirs = completion_logps(policy, batch)
    torch.testing.assert_close(fresh, theirs, rtol=1e-5, atol=1e-4)
    assert float((moved - fresh).abs().max()) > 1e-3
    assert "plain" in choose_engine(policy, ROWS, 9, "plain", chunk=64)
    assert not has_fast_layers(policy)
    for module in policy.modules():
        assert set(vars(module)) - before[id(module)] <= {"gradient_checkpointing"}
    pickle.dumps(policy.get_base_model().config)


def test_a_batch_split_recomputation_and_order_change_no_number_along_a_trajectory(
    tiny_model: Path,
) -> None:
    def trajectory(engine: str, recomputed: int, groups: list[list[int]]) -> list[float]:
        torch.manual_seed(0)
        policy = load_policy(tiny_model, lora=LoraConfig(rank=4)).train()
        choose_engine(policy, ROWS, 9, engine, chunk=5)  # type: ignore[arg-type]
        if engine == "fast":
            fast_work(policy).recomputed = recomputed
        weights = [p for p in policy.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(weights, lr=0.05)
        found = []
        for _ in range(6):
            optimiser.zero_grad()
            loss = 0.0
            for group in groups:
                rows = [ROWS[i] for i in group]
                batch = flat_pairs(rows) if engine == "fast" else collate_pairs(rows, pad_id=0)
                ours, theirs = both_logps(policy, batch)
                chosen, rejected = (ours - theirs).chunk(2)
                part = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum() / 4
                part.backward()
                loss += float(part.detach())
            optimiser.step()
            found.append(loss)
        return found

    expected = trajectory("plain", 0, [[0, 1, 2, 3]])
    assert expected[-1] < expected[0] - 0.01
    for recomputed, groups in (
        (0, [[3, 1], [0, 2]]),
        (1, [[2], [0], [3], [1]]),
        (2, [[0, 1, 2, 3]]),
    ):
        found = trajectory("fast", recomputed, groups)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (LoraConfig(rank=2, dropout=0.1), "LoRA dropout"),
        (LoraConfig(rank=2, dora=True), "DoRA"),
    ],
)
def test_what_the_fast_layers_cannot_do_is_left_to_peft_by_name(
    tiny_model: Path, lora: LoraConfig, reason: str
) -> None:
    policy = load_policy(tiny_model, lora=lora)
    taken = take(policy)
    assert reason in str(taken) and not taken.fused and taken.linears == 0
    release(policy.get_base_model())
    line = choose_engine(policy, ROWS, 9, "fast", chunk=64)
    assert reason in line


def test_dropout_draws_the_same_in_a_recomputation(tiny_model: Path) -> None:
    policy = load_policy(tiny_model, lora=LoraConfig(rank=4, dropout=0.3))
    move_adapter(policy)
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    policy.train()
    work = fast_work(policy)
    found = []
    for recomputed in (0, len(decoder_layers(policy.get_base_model()))):
        work.recomputed = recomputed
        torch.manual_seed(3)
        found.append(_gradient(policy, completion_logps(policy, flat_pairs(ROWS))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_layer_whose_mlp_output_is_read_is_recomputed_whole() -> None:
    policy = load_policy(_model("gemma3_text"), lora=LoraConfig(rank=4)).eval()
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    assert not fast_work(policy).skips_last  # a norm stands behind it
    llama = load_policy(_model("llama"), lora=LoraConfig(rank=4)).eval()
    choose_engine(llama, ROWS, 9, "fast", chunk=64)
    assert fast_work(llama).skips_last
