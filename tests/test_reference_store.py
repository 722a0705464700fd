"""Laws of the stored reference: what it is keyed by, that it changes no number, what it survives."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from lora_dpo import objectives, reference_store
from lora_dpo.config import Config, LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import ConfigError, OutputError, TrainingError
from lora_dpo.finished import evaluate
from lora_dpo.heads import causal_lm
from lora_dpo.layers import attention
from lora_dpo.policy import load_policy, reference_identity, save_adapter
from lora_dpo.reference_cache import COLUMNS, check_known_reference, with_reference_logps
from lora_dpo.reference_store import RECORD, ReferenceStore, answer_keys, stored_reference_logps
from lora_dpo.run import train
from lora_dpo.store import lock
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter
from tests.test_trainer import _arguments, _logs, _weights


def _tokenised(tiny_model: Path, data: list[dict[str, Any]], kind: Any = None) -> Tokenised:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenise(load_preferences(data, kind=kind), tokenizer, max_length=128)


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    return _tokenised(tiny_model, pairs)


@pytest.fixture(scope="module")
def single(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    return _tokenised(tiny_model, pairs, "unpaired")


def _policy(tiny_model: Path, seed: int = 11, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    lora = {"rank": 4, **settings.pop("lora", {})}
    return load_policy(tiny_model, lora=LoraConfig.model_validate(lora), **settings)


def _values(data: Tokenised) -> torch.Tensor:
    return torch.tensor([data.rows[name][:] for name in COLUMNS[data.kind]], dtype=torch.float64)


@contextmanager
def _counting(policy: PeftModel) -> Iterator[list[int]]:
    """Collect the token count of every forward pass of the model inside the policy."""
    seen: list[int] = []
    hook = causal_lm(policy).register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(int(kw["input_ids"].numel())), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.logps"))


def _shared(a: PeftModel, b: PeftModel) -> bool:
    return reference_identity(a) == reference_identity(b)


# ---- values ----------------------------------------------------------------------------------


def test_stored_values_are_computed_once_and_are_those_of_the_pass_in_memory(
    tiny_model: Path, rows: Tokenised, single: Tokenised, tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    expected = _values(with_reference_logps(policy, rows, batch_size=3))
    with _counting(policy) as passes:
        first = _values(stored_reference_logps(policy, rows, tmp_path, batch_size=5))
    assert len(passes) == 4
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
    with _counting(policy) as passes:
        again = stored_reference_logps(policy, rows, tmp_path)
        unpaired = stored_reference_logps(policy, single, tmp_path)
    assert passes == [] and torch.equal(_values(again), first)
    torch.testing.assert_close(
        _values(unpaired), _values(with_reference_logps(policy, single)), rtol=0, atol=1e-4
    )
    assert again.rows.column_names == [*rows.rows.column_names, *COLUMNS["paired"]]


def test_only_unknown_answers_are_computed(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    stored_reference_logps(policy, _tokenised(tiny_model, pairs[:6]), tmp_path, batch_size=1)
    more = [pairs[9], *pairs[2:8], {**pairs[9], "rejected": " maybe"}]
    with _counting(policy) as passes:
        found = stored_reference_logps(policy, _tokenised(tiny_model, more), tmp_path, batch_size=1)
    assert len(passes) == 4  # rows 6, 7, 9, and the new answer of 9
    expected = _values(with_reference_logps(policy, found))
    torch.testing.assert_close(_values(found), expected, rtol=0, atol=1e-4)
    assert _values(found)[0, 0] == _values(found)[0, -1]  # one answer, one value


@pytest.mark.parametrize("layout", ["sdpa", attention.NAME])
def test_in_16_bits_values_of_any_batch_shape_agree_within_the_bound_of_the_self_check(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, layout: str
) -> None:
    policy = _policy(tiny_model, compute_dtype="bfloat16")
    causal_lm(policy).config._attn_implementation = layout
    first = stored_reference_logps(policy, rows, tmp_path, batch_size=1)
    for batch_size in (3, 16):
        other = _values(with_reference_logps(policy, rows, batch_size=batch_size))
        (line,) = check_known_reference(list(first.rows), other.flatten(), torch.bfloat16)
        assert "on the first 16 they differ by" in line


# ---- keys ------------------------------------------------------------------------------------


def test_rank_seed_targets_dropout_and_training_share_one_reference(tiny_model: Path) -> None:
    first = _policy(tiny_model)
    others: list[dict[str, Any]] = [
        {"rank": 8, "alpha": 3.0, "dropout": 0.3, "targets": ["q_proj", "up_proj"]},
        {"dora": True, "rslora": True, "init": "gaussian"},
        {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        {"targets": ["v_proj", "lm_head"]},
    ]
    for number, lora in enumerate(others):
        assert _shared(first, _policy(tiny_model, seed=number, lora=lora)), lora
    before = reference_identity(first)
    move_adapter(first)
    first.train()
    assert reference_identity(first) == before


def test_the_reference_is_the_same_before_and_after_a_training_run(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    trainer = PreferenceTrainer(policy, args=_arguments(tmp_path), train_data=rows, engine="plain")
    before = reference_identity(policy)
    trainer.train()
    assert reference_identity(policy) == before
    assert _shared(policy, _policy(tiny_model, seed=3))


@pytest.mark.parametrize("quantisation", ["nf4", "fp4", "int8", "none"])
def test_a_forward_pass_changes_no_reference(
    tiny_model: Path, rows: Tokenised, quantisation: str
) -> None:
    """The layers of bitsandbytes move parts of their state at the first one."""
    policy = _policy(tiny_model, quantisation=quantisation)
    before = reference_identity(policy)
    with_reference_logps(policy, rows)
    policy.train()(torch.arange(8)[None]).logits.sum().backward()
    assert reference_identity(policy) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"quantisation": "fp4"},
        {"quantisation": "int8"},
        {"quantisation": "none"},
        {"double_quantisation": False},
        {"compute_dtype": "bfloat16"},
        {"attention": "eager"},
    ],
)
def test_another_quantisation_dtype_or_attention_is_another_reference(
    tiny_model: Path, settings: dict[str, Any]
) -> None:
    assert _shared(_policy(tiny_model, **settings), _policy(tiny_model, seed=2, **settings))
    assert not _shared(_policy(tiny_model), _policy(tiny_model, **settings))


def test_every_tensor_and_setting_of_the_base_makes_another_reference(tiny_model: Path) -> None:
    policy = _policy(tiny_model)
    before = reference_identity(policy)
    base: Any = causal_lm(policy)
    layer = base.model.layers[1].mlp.up_proj.base_layer
    tensors = (
        layer.weight.data,
        layer.weight.quant_state.absmax,
        layer.weight.quant_state.state2.absmax,
        base.model.norm.weight.data,
        base.model.embed_tokens.weight.data,
        base.lm_head.weight.data,
    )
    for tensor in tensors:
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert reference_identity(policy)["base"] != before["base"]
        tensor.copy_(kept)
    assert reference_identity(policy) == before
    base.config.rms_norm_eps *= 2
    assert reference_identity(policy)["config"] != before["config"]


def test_a_frozen_starting_adapter_is_part_of_the_reference(
    tiny_model: Path, tmp_path: Path
) -> None:
    identities = []
    for number in (1, 2):
        start = _policy(tiny_model)
        move_adapter(start, seed=number)
        save_adapter(start, tmp_path / str(number))
        policy = load_policy(tiny_model, adapter=tmp_path / str(number))
        identities.append(reference_identity(policy))
        move_adapter(policy, seed=9)
        assert reference_identity(policy) == identities[-1]
    plain = reference_identity(_policy(tiny_model))
    values = {identity["reference"] for identity in (plain, *identities)}
    assert len(values) == 3
    assert {identity["base"] for identity in (plain, *identities)} == {plain["base"]}


def test_an_answer_is_known_by_its_tokens_and_by_where_its_prompt_ends(
    tiny_model: Path, rows: Tokenised, single: Tokenised
) -> None:
    keys = answer_keys(rows)
    assert set(keys.ravel()) == set(answer_keys(single).ravel())
    assert len(set(keys.ravel())) == keys.size
    some = dataclasses.replace(rows, rows=rows.rows.select([7, 2, 11]))
    assert np.array_equal(answer_keys(some), keys[[7, 2, 11]])
    columns = rows.rows.to_dict()

    def changed(prompt: list[int], chosen: list[int]) -> bytes:
        new = {**columns, "prompt_ids": [prompt, *columns["prompt_ids"][1:]]}
        new["chosen_ids"] = [chosen, *columns["chosen_ids"][1:]]
        data = type(rows.rows).from_dict(new, features=rows.rows.features)
        return bytes(answer_keys(dataclasses.replace(rows, rows=data))[0, 0])

    prompt, chosen = columns["prompt_ids"][0], columns["chosen_ids"][0]
    assert changed(prompt, chosen) == keys[0, 0]
    assert changed(prompt, [chosen[0] + 1, *chosen[1:]]) != keys[0, 0]
    assert changed([*prompt[:-1], prompt[-1] + 1], chosen) != keys[0, 0]
    assert changed([*prompt, chosen[0]], chosen[1:]) != keys[0, 0]


def test_keys_with_any_bytes_are_found_in_the_order_in_which_they_are_sorted() -> None:
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (4000, 16), dtype=np.uint8)
    raw[::3, generator.integers(0, 16, 3)] = 0
    keys = raw.view("S16").ravel()
    pairs = sorted({key: float(i) for i, key in enumerate(keys.tolist())}.items())
    records = np.array(pairs, dtype=RECORD)
    found = reference_store._lookup([records[::2], records[1::2]], keys[:, None])
    assert found[:, 0].tolist() == list(range(4000))


# ---- damage, crashes, company ----------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_is_named_left_out_and_replaced(
    tiny_model: Path,
    rows: Tokenised,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference_store, "FLUSH_ROWS", 16)  # answers
    policy = _policy(tiny_model)
    first = _values(stored_reference_logps(policy, rows, tmp_path, batch_size=4))
    whole, broken = _files(tmp_path)
    content = bytearray(broken.read_bytes())
    content[-3] ^= 64
    new = {"truncated": content[:-24], "flipped": content, "emptied": b""}[damage]
    broken.write_bytes(bytes(new))
    with _counting(policy) as passes, caplog.at_level(logging.WARNING, "lora_dpo"):
        again = _values(stored_reference_logps(policy, rows, tmp_path, batch_size=4))
    assert len(passes) == 2
    assert f"{broken}: damaged" in caplog.text
    torch.testing.assert_close(again, first, rtol=0, atol=1e-4)
    assert whole in _files(tmp_path) and len(_files(tmp_path)) == 2
    with _counting(policy) as passes:
        stored_reference_logps(policy, rows, tmp_path)
    assert passes == []


def test_many_files_become_one_unless_another_process_is_at_it(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_store, "FLUSH_ROWS", 1)
    monkeypatch.setattr(reference_store, "MANY", 3)
    policy = _policy(tiny_model)
    first = _values(stored_reference_logps(policy, rows, tmp_path, batch_size=2))
    folder = ReferenceStore(policy, tmp_path).folder
    assert len(_files(tmp_path)) == 8
    with lock(folder):
        stored_reference_logps(policy, rows, tmp_path)
    assert len(_files(tmp_path)) == 8
    stored_reference_logps(policy, rows, tmp_path)
    assert len(_files(tmp_path)) == 1
    assert torch.equal(_values(stored_reference_logps(policy, rows, tmp_path)), first)


def test_values_that_are_not_finite_are_told_by_their_rows_and_never_stored(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(tiny_model)
    plain = reference_store.reference_batches

    def broken(*args: Any, **options: Any) -> Iterator[Any]:
        for places, logps in plain(*args, **options):
            logps[0, 0] = torch.nan
            yield places, logps

    monkeypatch.setattr(reference_store, "reference_batches", broken)
    with pytest.raises(
        TrainingError, match=r"<memory>:\d+, <memory>:\d+: .* is nan, so no log-ratio"
    ):
        stored_reference_logps(policy, rows, tmp_path, batch_size=8)
    assert sum(path.stat().st_size for path in _files(tmp_path)) == 30 * RECORD.itemsize
    monkeypatch.setattr(reference_store, "reference_batches", plain)
    assert bool(_values(stored_reference_logps(policy, rows, tmp_path)).isfinite().all())


def test_a_full_disk_costs_the_stored_values_and_not_the_run(
    tiny_model: Path,
    rows: Tokenised,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_store, "write_bytes", full)
    policy = _policy(tiny_model)
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        found = _values(stored_reference_logps(policy, rows, tmp_path))
    assert "32 reference log-probs could not be written" in caplog.text
    torch.testing.assert_close(
        found, _values(with_reference_logps(policy, rows)), rtol=0, atol=1e-4
    )
    assert _files(tmp_path) == []


_FILLING = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import AutoTokenizer
from lora_dpo import reference_store
from lora_dpo.config import LoraConfig
from lora_dpo.data import load_preferences, tokenise
from lora_dpo.policy import load_policy
model, data, folder, pause = sys.argv[1:5]
pairs = json.loads(Path(data).read_text())
rows = tokenise(load_preferences(pairs), AutoTokenizer.from_pretrained(model), max_length=128)
policy = load_policy(model, lora=LoraConfig(rank=2))
plain = reference_store.reference_batches
def slow(*args, **options):
    for item in plain(*args, **options):
        time.sleep(float(pause))
        yield item
reference_store.reference_batches = slow
reference_store.FLUSH_ROWS = 1
print("filling", flush=True)
reference_store.stored_reference_logps(policy, rows, folder, batch_size=1)
"""


def _process(tiny_model: Path, data: Path, folder: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _FILLING, str(tiny_model), str(data), str(folder), str(pause)]
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_process_leaves_what_it_has_computed(
    tiny_model: Path, pairs: list[dict[str, str]], rows: Tokenised, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(pairs))
    process = _process(tiny_model, data, tmp_path, pause=0.2)
    deadline = time.monotonic() + 60
    while len(_files(tmp_path)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(_files(tmp_path))
    assert 5 <= there < 16
    policy = _policy(tiny_model)
    with _counting(policy) as passes:
        found = stored_reference_logps(policy, rows, tmp_path, batch_size=1)
    assert len(passes) == 16 - there
    expected = _values(with_reference_logps(policy, rows))
    torch.testing.assert_close(_values(found), expected, rtol=0, atol=1e-4)


def test_two_processes_may_fill_one_store(
    tiny_model: Path, pairs: list[dict[str, str]], rows: Tokenised, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(pairs))
    processes = [_process(tiny_model, data, tmp_path, pause=0.1) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    policy = _policy(tiny_model)
    with _counting(policy) as passes:
        found = stored_reference_logps(policy, rows, tmp_path)
    assert passes == []
    expected = _values(with_reference_logps(policy, rows))
    torch.testing.assert_close(_values(found), expected, rtol=0, atol=1e-4)


# ---- training and evaluation -----------------------------------------------------------------


def _passes_without_gradient(
    tiny_model: Path, data: Tokenised, folder: Path, bound: Any
) -> tuple[int, int]:
    """Train for two steps from the store; return such passes in training and in evaluation."""
    trainer = PreferenceTrainer(
        _policy(tiny_model),
        objective=bound,
        args=_arguments(folder, max_steps=2),
        train_data=data,
        eval_data=data,
        reference_cache=folder / "store",
    )
    passes: list[bool] = []
    hook = causal_lm(trainer.model).register_forward_pre_hook(
        lambda *_: None if torch.is_grad_enabled() else passes.append(True)
    )
    trainer.train()
    training = len(passes)
    trainer.evaluate()
    hook.remove()
    return training, len(passes) - training


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_training_and_evaluation_from_the_store_are_those_without_it(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, engine: Any
) -> None:
    bound = objectives.get("dpo").bind(beta=0.5)
    results = []
    for cache in (None, tmp_path / "store", tmp_path / "store"):
        trainer = PreferenceTrainer(
            _policy(tiny_model), objective=bound, args=_arguments(tmp_path), train_data=rows,
            eval_data=rows, engine=engine, reference_cache=cache,
        )  # fmt: skip
        trainer.train()
        results.append((_weights(trainer.model), _logs(trainer), trainer.evaluate()))
    weights, logs, metrics = results[0]
    for other, other_logs, other_metrics in results[1:]:
        torch.testing.assert_close(other, weights, rtol=1e-4, atol=1e-5)
        found, expected = ([entry["loss"] for entry in one] for one in (other_logs, logs))
        assert found == pytest.approx(expected, abs=1e-5)
        for name in ("eval_loss", "eval_rewards/margins", "eval_logratios/chosen"):
            assert other_metrics[name] == pytest.approx(metrics[name], abs=1e-4)
    assert torch.equal(results[1][0], results[2][0])


def test_a_sweep_over_betas_and_objectives_pays_for_the_reference_once(
    tiny_model: Path, rows: Tokenised, single: Tokenised, tmp_path: Path
) -> None:
    sweep = [("dpo", {"beta": 0.1}), ("dpo", {"beta": 0.5}), ("ipo", {}), ("kto_running", {})]
    for name, settings in sweep:
        bound = objectives.get(name).bind(**settings)
        data = rows if bound.data == "paired" else single
        training, evaluation = _passes_without_gradient(tiny_model, data, tmp_path, bound)
        assert training == 2, name  # of the self-check: the reference once, the policy once
        assert evaluation == len(data) / 4, name  # the policy alone
        assert len(_files(tmp_path)) == 1


def test_what_is_not_stored_is_said_and_still_runs(
    tiny_model: Path, single: Tokenised, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bound = objectives.get("kto").bind()
    with caplog.at_level(logging.INFO, "lora_dpo"):
        training, _ = _passes_without_gradient(tiny_model, single, tmp_path, bound)
    assert "kto reads mismatched completions too" in caplog.text
    assert training > 2


def test_the_self_check_prints_how_near_the_stored_values_are_and_refuses_wrong_ones(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def trainer() -> PreferenceTrainer:
        return PreferenceTrainer(
            _policy(tiny_model), args=_arguments(tmp_path), train_data=rows, reference_cache=store
        )

    text = "\n".join(trainer().self_check())
    assert "on the first 2 they differ by" in text and "nats" in text and "(allowed" in text
    (path,) = _files(store)
    records = np.fromfile(path, RECORD)
    records["logp"] -= 50
    path.unlink()
    reference_store._write_records(path.parent, records)
    with pytest.raises(TrainingError, match="kept with the rows differ by"):
        trainer().train()


def _config(tiny_model: Path, pairs: list[dict[str, str]], folder: Path, **changes: Any) -> Config:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "cache_reference": True,
        "reference_cache_dir": str(folder / "store"),
    }  # fmt: skip
    return Config.parse(
        {
            "model": {"base": str(tiny_model), **changes.pop("model", {})},
            "data": {"train": str(data), "eval_fraction": 0.3, "max_length": 128},
            "train": {**train, **changes.pop("train", {})},
            "output": {"dir": str(folder / "run"), "diagnose": False},
            **changes,
        }
    )


@pytest.mark.parametrize("started", [False, True])
def test_a_runs_evaluation_takes_what_its_training_stored(
    tiny_model: Path,
    pairs: list[dict[str, str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    started: bool,
) -> None:
    model = {}
    if started:
        start = _policy(tiny_model)
        move_adapter(start, std=0.02)
        save_adapter(start, tmp_path / "sft")
        model = {"adapter": str(tmp_path / "sft")}
    run = train(_config(tiny_model, pairs, tmp_path, model=model))
    with caplog.at_level(logging.INFO, "lora_dpo"):
        found = evaluate(run)
    assert ", 0 computed in" in caplog.text
    for name, (mean, _, _) in run.results["held_out"]["mean_low_high"].items():
        assert found[name].mean == pytest.approx(mean, rel=1e-4, abs=1e-4)


def test_an_interrupted_run_resumes_from_the_store(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tiny_model, pairs, tmp_path, train={"save_steps": 1, "max_steps": 2})
    train(config)
    weights = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    folder = tmp_path / "run"
    for path in (*folder.glob("checkpoint-2/*"), folder / "run.json"):
        path.unlink()
    (folder / "checkpoint-2").rmdir()
    caplog.clear()
    with caplog.at_level(logging.INFO, "lora_dpo"):
        train(config, resume=True)
    assert "resuming from" in caplog.text and ", 0 computed in" in caplog.text
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("dpo", {"reference_cache_dir": "d"}, "reference_cache_dir: set, but train.cache_ref"),
        ("dpo", {"cache_reference": True, "reference_update": "hard"}, "the reference moves"),
        ("simpo", {"cache_reference": True}, "simpo reads no reference"),
        ("tdpo1", {"cache_reference": True}, "tdpo1 reads kls of the reference"),
        ("sampo", {"cache_reference": True}, "sampo reads sampled_logps of the reference"),
    ],
)
def test_a_store_that_would_be_ignored_or_wrong_is_refused(
    objective: str, settings: dict[str, Any], message: str
) -> None:
    values = {"model": {"base": "b"}, "data": {"train": "d"}, "output": {"dir": "o"}}
    with pytest.raises(ConfigError, match=message):
        Config.parse({**values, "objective": objective, "train": settings})


def test_the_trainer_refuses_likewise(tiny_model: Path, rows: Tokenised, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="simpo reads no reference"):
        PreferenceTrainer(
            _policy(tiny_model), objective="simpo", args=_arguments(tmp_path), train_data=rows,
            reference_cache=tmp_path / "store",
        )  # fmt: skip


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        stored_reference_logps(_policy(tiny_model), rows, tmp_path / "file")


def test_the_folder_of_a_resolved_config_works_from_anywhere() -> None:
    values = {"model": {"base": "b"}, "data": {"train": "d"}, "output": {"dir": "o"}}
    settings = {"cache_reference": True, "reference_cache_dir": "somewhere"}
    resolved = Config.parse({**values, "train": settings}).resolved()
    assert resolved.train.reference_cache_dir == str(Path("somewhere").absolute())
