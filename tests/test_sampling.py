"""``sample``: draws that depend on seed and prompt alone, kept one by one, scored, made into pairs."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import sys
import threading
import webbrowser
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lora_dpo import Run, load_preferences, sample, score, train
from lora_dpo.cli import app
from lora_dpo.errors import ConfigError, DataError, JudgeError, OutputError
from lora_dpo.generation import draw
from lora_dpo.journal import open_journal
from lora_dpo.quickstart import DATA_DIR
from lora_dpo.quickstart.main import quickstart_config
from lora_dpo.quickstart.reward import true_reward
from lora_dpo.sampling.scorers import find_scorer, score_all
from tests.judge_server import completion, serving

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {"k": 4, "max_new_tokens": 120, "seed": 3}
SCORER = """
from lora_dpo.quickstart.reward import true_reward

def kindness(prompt, completion):
    assert prompt[-1]["role"] == "user"
    return true_reward(completion)

def same(prompt, completion):
    return 1

def broken(prompt, completion):
    return completion.no_such_thing

def endless(prompt, completion):
    return float("inf")
"""


def _lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    return [row["prompt"] for row in _lines(DATA_DIR / "eval_prompts.jsonl")[:5]]


@pytest.fixture(scope="module")
def drawn(
    quickstart_model: Path, prompts: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The journal of a sampling without scores, and beside it its rankings."""
    to = tmp_path_factory.mktemp("drawn") / "s.jsonl"
    found = sample(quickstart_model, prompts, to, **SETTINGS)
    assert found.drawn == 20 and found.scored_by is None
    return to.with_name("s.drawn.jsonl")


@pytest.fixture
def again(drawn: Path, tmp_path: Path) -> Path:
    """Where the same samples are drawn already, and nothing is written."""
    shutil.copy(drawn, tmp_path / "s.drawn.jsonl")
    return tmp_path / "s.jsonl"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scorer") / "scorer.py"
    path.write_text(SCORER)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, quickstart_model: Path) -> Run:
    """Two steps on chats, far enough to differ from the base."""
    to = tmp_path_factory.mktemp("run")
    rows = to / "rows.jsonl"
    rows.write_text("".join((DATA_DIR / "train.jsonl").read_text().splitlines(True)[:8]))
    config = quickstart_config(to)
    for key, value in {
        "data.train": [{"path": str(rows)}],
        "data.eval": None,
        "data.eval_fraction": 0.0,
        "output.diagnose": False,
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 4,
        "train.lr_scheduler_type": "constant",
        "train.warmup_steps": 0,
        "train.learning_rate": 0.01,
    }.items():
        config = config.replace(key, value)
    return train(config)


def test_a_draw_depends_on_its_seed_and_prompt_and_on_nothing_beside_it(
    quickstart_model: Path, prompts: list[Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    asked = prompts[:3] * 2
    seeds = list(range(6))
    options: dict[str, Any] = {"max_new_tokens": 20}
    whole = draw(model, tokenizer, asked, seeds, batch_size=6, **options)
    assert draw(model, tokenizer, asked, seeds, batch_size=4, **options) == whole
    alone = draw(model, tokenizer, asked[::-1], seeds[::-1], batch_size=1, **options)
    assert alone[::-1] == whole
    assert all(one != other for one, other in zip(whole[:3], whole[3:], strict=True))
    state = torch.random.get_rng_state()
    draw(model, tokenizer, asked[:1], [0], max_new_tokens=2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_draws_are_of_the_models_own_distribution_at_the_temperature(tiny_model: Path) -> None:
    """2000 first tokens against softmax(logits / T), by chi-square."""
    from scipy.stats import chisquare

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    temperature, count = 1.5, 2000
    found = draw(
        model, tokenizer, ["Question"] * count, range(count),
        max_new_tokens=1, temperature=temperature, batch_size=500,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**tokenizer("Question", return_tensors="pt")).logits[0, -1].double()
    expected: Counter[Any] = Counter()
    for token, p in enumerate((logits / temperature).softmax(0).tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text, token == tokenizer.eos_token_id] += p * count  # type: ignore[assignment]
    seen = Counter((one.text, one.finished) for one in found)
    assert set(seen) <= set(expected)
    likely = [key for key, value in expected.items() if value >= 5]
    assert len(likely) > 20
    rest = count - sum(seen[key] for key in likely)
    values = [*(seen[key] for key in likely), rest]
    wanted = [*(expected[key] for key in likely), count - sum(expected[key] for key in likely)]
    assert chisquare(values, wanted).pvalue > 0.01


def test_prompt_and_completion_give_back_the_tokens_that_were_drawn(tiny_model: Path) -> None:
    """A decoder that drops the first space must not drop it from a completion."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"▁w{i}": i for i in range(3, 320)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<s>")
    assert tokenizer.decode([7, 8]) == "w7 w8"
    (found,) = draw(model, tokenizer, ["w5 w6"], [0], max_new_tokens=5)
    assert found.text.startswith(" w") and not found.finished
    assert tokenizer("w5 w6" + found.text)["input_ids"][:2] == [5, 6]
    assert len(tokenizer("w5 w6" + found.text)["input_ids"]) == 7


def test_a_killed_sampling_goes_on_and_draws_nothing_twice(
    quickstart_model: Path, prompts: list[Any], drawn: Path, tmp_path: Path
) -> None:
    lines = drawn.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(prompts)
    journal = tmp_path / "s.drawn.jsonl"
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:50])  # killed while it wrote the last
    found = sample(quickstart_model, prompts, tmp_path / "s.jsonl", batch_size=5, **SETTINGS)
    assert journal.read_bytes() == drawn.read_bytes()  # another batch size, too
    assert (tmp_path / "s.jsonl").read_bytes() == drawn.with_name("s.jsonl").read_bytes()
    assert found.rows == 5 and "no scores" in str(found)


def test_what_was_drawn_otherwise_or_written_already_is_refused(
    quickstart_model: Path, prompts: list[Any], again: Path, scorer: Path
) -> None:
    with pytest.raises(OutputError, match="was begun with k 4, and this is 3"):
        sample(quickstart_model, prompts, again, **{**SETTINGS, "k": 3})
    sample(quickstart_model, prompts, again, **SETTINGS)
    with pytest.raises(OutputError, match="exists already"):
        sample(quickstart_model, prompts, again, **SETTINGS)
    with pytest.raises(OutputError, match=r"lora-dpo label \S+s.jsonl --to \S+s.labels.jsonl"):
        sample(quickstart_model, prompts, again, by="hand", **SETTINGS)
    by = f"{scorer}:kindness"
    found = sample(quickstart_model, prompts, again, by=by, overwrite=True, **SETTINGS)
    assert found.scored_by == by and "scores" in _lines(again)[0]
    edited = again.with_name("scorer.py")
    for value in (1, 2):  # the same name, and another function behind it
        edited.write_text(f"def f(prompt, completion):\n    return len(completion) * {value}\n")
        by = f"{edited}:f"
        sample(quickstart_model, prompts, again, by=by, overwrite=True, **SETTINGS)
        for row in _lines(again):
            assert row["scores"] == [len(text) * value for text in row["completions"]]


def test_rankings_and_pairs_are_what_training_reads(
    quickstart_model: Path, prompts: list[Any], again: Path, scorer: Path
) -> None:
    found = sample(
        quickstart_model, prompts, again, by=f"{scorer}:kindness",
        pairs="all", min_margin=0.4, **SETTINGS,
    )  # fmt: skip
    rows = _lines(again)
    for row in rows:
        assert row["scores"] == [true_reward(text) for text in row["completions"]]
    assert found.best == pytest.approx(np.mean([max(row["scores"]) for row in rows]))
    assert found.worst == pytest.approx(np.mean([min(row["scores"]) for row in rows]))
    margins = [
        abs(a - b)
        for row in rows
        for i, a in enumerate(row["scores"])
        for b in row["scores"][i + 1 :]
    ]
    assert found.pairs == sum(margin >= 0.4 for margin in margins) > 5
    below = found.pairs_left_out["dropped: score margin below min_margin 0.4"]
    assert below == sum(0 < margin < 0.4 for margin in margins)
    assert found.pairs_to is not None
    told, written = (
        [(row.chosen, row.rejected) for row in read.rows]
        for read in (
            load_preferences(again, ranking_pairs="all", min_margin=0.4),
            load_preferences(found.pairs_to),
        )
    )
    assert written == told
    assert "pairs in" in str(found) and "Samples(20" in repr(found)
    assert "completions of 5 prompts" in found.to_html() and found.to_dict()["pairs"] == found.pairs


def test_ties_make_no_pair_and_are_counted(
    quickstart_model: Path, prompts: list[Any], again: Path, scorer: Path
) -> None:
    by = f"{scorer}:same"
    found = sample(quickstart_model, prompts, again, by=by, **SETTINGS)
    assert found.tied == 5 and found.best == found.worst == 1
    with pytest.raises(DataError, match=r"no pairs(.|\n)*5  dropped: ranking in which all"):
        sample(quickstart_model, prompts, again, by=by, pairs="all", overwrite=True, **SETTINGS)


def test_unfinished_and_equal_completions_are_left_out_and_counted(
    quickstart_model: Path, prompts: list[Any], tmp_path: Path
) -> None:
    cold = {**SETTINGS, "temperature": 1e-4}  # the likeliest answer each time
    with pytest.raises(DataError, match=r"3 left out: equal to another(.|\n)*1 prompts left out"):
        sample(quickstart_model, prompts, tmp_path / "cold.jsonl", limit=1, **cold)
    short = {**SETTINGS, "max_new_tokens": 3}
    with pytest.raises(DataError, match=r"8 left out: cut off at max_new_tokens(.|\n)*Raise"):
        sample(quickstart_model, [*prompts[:2], prompts[0]], tmp_path / "short.jsonl", **short)
    assert not list(tmp_path.glob("cold.jsonl"))


def test_the_implicit_reward_of_a_run_scores_and_a_text_is_a_turn_where_it_saw_chats(
    run: Run, tmp_path: Path
) -> None:
    to = tmp_path / "s.jsonl"
    asked = ["Tell me a story about Bruno the fox and a red drum."] * 2
    found = sample(run, asked, to, by=f"reward:{run.folder}", k=2, max_new_tokens=120)
    assert found.prompts == 1  # the same one twice
    (row,) = _lines(to)
    assert row["prompt"] == [{"role": "user", "content": asked[0]}]
    again = score(run.load_policy(), run.tokenizer(), row["prompt"], row["completions"], beta=0.5)
    np.testing.assert_allclose(row["scores"], again.rewards, rtol=1e-5, atol=1e-5)
    assert len(set(row["scores"])) > 1  # it has moved off its reference
    assert run.config.objective.to_dict()["beta"] == 0.5


def test_a_judge_is_asked_about_each_two_in_both_orders_once(
    quickstart_model: Path, prompts: list[Any], again: Path, caplog: Any
) -> None:
    """This one likes the longer answer."""

    def answer(number: int, body: dict[str, Any]) -> Any:
        asked = body["messages"][-1]["content"]
        first = asked.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
        second = asked.split("[Answer B]\n")[1].split("\n\n[Question]")[0]
        return completion("A" if len(first) > len(second) else "B" if first != second else "C")

    caplog.set_level("INFO", "lora_dpo")
    with serving(answer) as endpoint:
        options = {**SETTINGS, "by": f"judge:{endpoint.address}", "judge_model": "m"}
        found = sample(quickstart_model, prompts, again, **options)
        assert len(endpoint.requests) == 5 * 4 * 3
        sample(quickstart_model, prompts, again, overwrite=True, **options)
        assert len(endpoint.requests) == 5 * 4 * 3  # every answer was kept
    assert "judge: at most 60 questions for 5 prompts" in caplog.text
    for row in _lines(again):
        lengths = [len(text) for text in row["completions"]]
        shares = [sum((n > m) + (n == m) / 2 for m in lengths) - 0.5 for n in lengths]
        assert row["scores"] == pytest.approx([share / 3 for share in shares])
    assert "the place decided in 0 of 30 pairs" in str(found)


def test_scores_of_another_scorer_are_not_taken_for_this_ones(
    quickstart_model: Path, prompts: list[Any], again: Path
) -> None:
    class Weighted:
        def __init__(self, weight: float) -> None:
            self.weight = weight

        def score(self, prompt: Any, completion: str) -> float:
            return self.weight * len(completion)

    def with_default(weight: float) -> Any:
        return lambda p, c, w=weight: w * len(c)

    for make in (lambda weight: Weighted(weight).score, with_default):
        for weight in (1.0, 2.0):
            sample(quickstart_model, prompts, again, overwrite=True, by=make(weight), **SETTINGS)
            for row in _lines(again):
                assert row["scores"] == [weight * len(text) for text in row["completions"]]


def test_a_judge_is_another_one_when_the_files_in_its_folder_change(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "judge")
    before = find_scorer(f"judge:{folder}").version
    assert before and find_scorer(f"judge:{folder}").version == before
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))
    assert find_scorer(f"judge:{folder}").version != before


def test_a_judge_that_answered_in_an_earlier_session_is_not_given_up_for_one_long_prompt(
    tmp_path: Path,
) -> None:
    """Its first prompt is scored; of the second it reads nothing."""

    def answer(number: int, body: dict[str, Any]) -> Any:
        asked = body["messages"][-1]["content"]
        return completion("hm" if "long" in asked else "A")

    texts = ["a", "b", "c", "d"]
    with serving(answer) as endpoint:
        for groups in ({"1": ("short", texts)}, {"1": ("short", texts), "2": ("long", texts)}):
            with open_journal(tmp_path / "j.jsonl", {"drawn_by": "test"}) as journal:
                judge = find_scorer(f"judge:{endpoint.address}", model="m")
                found = score_all(judge, groups, journal)
    assert found == {"1": [0.5] * 4, "2": [None] * 4}


def test_a_person_judges_what_was_drawn(
    quickstart_model: Path,
    prompts: list[Any],
    again: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def person(url: str) -> bool:
        threading.Thread(target=answer_all, args=(url,), daemon=True).start()
        return True

    def answer_all(url: str) -> None:
        host, token = url.removeprefix("http://").strip("/").split("/")
        headers = {"Content-Type": "application/json", "Origin": f"http://{host}"}
        turn, path = 0, "choose"
        while True:
            connection = http.client.HTTPConnection(host, timeout=10)
            body = json.dumps({"turn": turn, "choice": "left"})
            connection.request("POST", f"/{token}/{path}", body, headers)
            state = json.loads(connection.getresponse().read())
            connection.close()
            if state["over"]:
                return
            turn, path = state["turn"], "finish" if state["done"] == state["all"] else "choose"

    monkeypatch.setattr(webbrowser, "open", person)
    found = sample(quickstart_model, prompts, again, by="hand", **SETTINGS)
    assert found.labels is not None and found.labels.choices["left"] == 10  # each of 20 once
    read = load_preferences(again.with_name("s.labels.jsonl"))
    assert len(read) == 10 and read.kind == "paired"
    assert "10 of 10 answered" in str(found)


def test_mistakes_are_told_before_anything_is_drawn(
    quickstart_model: Path, prompts: list[Any], scorer: Path, tmp_path: Path
) -> None:
    to = tmp_path / "s.jsonl"
    wrong: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        r"k is 1; .*\n.*temperature is 0; ": (ConfigError, {"k": 1, "temperature": 0.0}),
        "pairs: they are made from scores": (ConfigError, {"pairs": "all"}),
        "min_margin is 1; ": (ConfigError, {"min_margin": 1.0}),
        "no such file": (ConfigError, {"by": "no/such.py:f"}),
        "no module of that name": (ConfigError, {"by": "no_such_module:f"}),
        "Did you mean 'kindness'": (ConfigError, {"by": f"{scorer}:kindnes"}),
        "expected module:function": (ConfigError, {"by": "f"}),
        "no judge; name it": (ConfigError, {"by": f"{scorer}:same", "judge_model": "m"}),
        "settings of a judge, and no": (ConfigError, {"judge_key": "KEY"}),
        "is a base, without any": (ConfigError, {"checkpoint": "best"}),
        "no run there": (OutputError, {"by": f"reward:{tmp_path}"}),
        "neither a folder here": (JudgeError, {"by": f"judge:{tmp_path / 'no'}"}),
        "90 questions a prompt; at most 8": (
            ConfigError,
            {"by": f"judge:{quickstart_model}", "k": 10},
        ),
        "no causal language model": (Exception, {"by": f"judge:{tmp_path}"}),
    }
    for message, (kind, options) in wrong.items():
        with pytest.raises(kind, match=message):
            sample(quickstart_model, prompts, to, **options)
    with pytest.raises(DataError, match=r"prompts: number 1 ends with the assistant"):
        sample(quickstart_model, [[{"role": "assistant", "content": "x"}]], to)
    with pytest.raises(DataError, match=r"prompt 1 has .* context of 256"):
        sample(quickstart_model, [[{"role": "user", "content": "x " * 500}]], to)
    for name in ("s.jsonl", "s.pairs.jsonl", "s.drawn.jsonl"):
        with pytest.raises(OutputError, match="is the prompts themselves"):
            sample(quickstart_model, to.with_name(name), to, overwrite=True, by=f"{scorer}:same",
                   pairs="all")  # fmt: skip
    with pytest.raises(OutputError, match=r"expected a name in \.jsonl"):
        sample(quickstart_model, prompts, tmp_path / "s.parquet")
    assert not list(tmp_path.iterdir())
    found = CliRunner().invoke(
        app, ["sample", str(tmp_path / "no"), "--prompts", str(scorer), "--to", str(to)]
    )
    assert found.exit_code == 1 and "no such folder" in found.output


def test_a_scorers_own_error_is_told_with_its_line_and_costs_no_draw(
    quickstart_model: Path, prompts: list[Any], again: Path, scorer: Path
) -> None:
    with pytest.raises(ConfigError, match=r"raised AttributeError: .*scorer\.py:\d+"):
        sample(quickstart_model, prompts, again, by=f"{scorer}:broken", **SETTINGS)
    with pytest.raises(ConfigError, match=r"returned float \(inf\); expected a finite"):
        sample(quickstart_model, prompts, again, by=f"{scorer}:endless", **SETTINGS)
    assert len(_lines(again.with_name("s.drawn.jsonl"))) == 1 + len(prompts)


def test_the_loop_goes_on_from_its_own_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location(
        "self_improve", ROOT / "examples" / "self_improve.py"
    )
    assert specification is not None and specification.loader is not None
    loop = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "self_improve", loop)
    specification.loader.exec_module(loop)
    base, *rounds = loop.main(["--quick", "--to", str(tmp_path)])
    assert base.gain is None and len(rounds) == 2
    for before, after in zip([base, rounds[0]], rounds, strict=True):
        assert after.gain.mean == pytest.approx(after.reward.mean - before.reward.mean)
    second = Run.open(tmp_path / "round-2")
    assert second.config.model.adapter == str(tmp_path / "round-1" / "adapter")
    assert "frozen" in second.results["reference"]
    assert second.history[-1]["train_loss"] != pytest.approx(np.log(2), abs=1e-4)  # it has moved
    first, other = (_lines(tmp_path / f"samples-{i}.drawn.jsonl") for i in (1, 2))
    assert other[0]["policy"] == str(tmp_path / "round-1") and other[0]["adapter"]
    asked = [{line["drawn"] for line in lines if "drawn" in line} for lines in (first, other)]
    assert not asked[0] & asked[1] and len(asked[0]) == len(asked[1]) == 6
