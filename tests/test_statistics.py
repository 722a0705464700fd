"""Statistics beyond log-probs, on a real 4-bit model, against their definitions computed densely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lora_dpo import objectives
from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_labelled, collate_pairs
from lora_dpo.errors import DataError, ModelError
from lora_dpo.forward import labelled_stats, pair_stats
from lora_dpo.policy import load_policy, reference
from lora_dpo.stats import PAIR_NEEDS, PairStats
from tests.helpers import move_adapter, random_rows

TOKENS = random_rows(10, seed=3, vocabulary=300)
PAIRS = [
    {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    for (prompt, chosen), (_, rejected) in zip(TOKENS[:5], TOKENS[5:], strict=True)
]
LABELLED = [
    {
        "prompt_ids": prompt,
        "completion_ids": answer,
        "mismatched_ids": TOKENS[(i + 1) % 10][1],
        "label": i % 2 == 0,
    }
    for i, (prompt, answer) in enumerate(TOKENS)
]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PeftModel:
    policy = load_policy(tiny_model)
    move_adapter(policy)
    return policy.eval()


def distributions(policy: Any, prompt: list[int], answer: list[int], fixed: bool) -> Tensor:
    """Return ``log p`` of every token at every place of the answer, ``[tokens, vocabulary]``."""
    ids = torch.tensor([prompt + answer])
    if fixed:
        with reference(policy):
            logits = policy(input_ids=ids).logits
    else:
        logits = policy(input_ids=ids).logits
    found: Tensor = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return found


def dense(policy: Any) -> dict[str, Tensor]:
    """Return every statistic of the pairs by its definition, pair by pair, without padding."""
    found: dict[str, list[Tensor]] = {}
    for row in PAIRS:
        shorter = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            ours, theirs = (
                distributions(policy, row["prompt_ids"], answer, fixed) for fixed in (False, True)
            )
            places = torch.arange(len(answer)), torch.tensor(answer)
            for owner, logs in (("policy", ours), ("reference", theirs)):
                tokens = logs[places]
                found.setdefault(f"{owner}_{side}_logps", []).append(tokens.sum())
                found.setdefault(f"{owner}_{side}_first_logps", []).append(tokens[:shorter].sum())
            surprise = ours[places] - (2 * ours).logsumexp(-1)
            found.setdefault(f"{side}_confidences", []).append(surprise.mean().detach())
            kl = (theirs.exp() * (theirs - ours)).sum()
            found.setdefault(f"policy_{side}_kls", []).append(kl)
    return {name: torch.stack(values) for name, values in found.items()}


def gradient(policy: PeftModel, value: Tensor) -> Tensor:
    policy.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("chunk", [1024, 3])
def test_every_statistic_is_its_definition_whatever_padding_and_chunks(
    policy: PeftModel, chunk: int
) -> None:
    needs = {"first_logps", "confidences", "kls"}
    batch = collate_pairs(PAIRS, pad_id=0)
    stats = pair_stats(policy, batch, needs=needs, chunk=chunk)
    expected = dense(policy)
    present = stats.present()
    assert {name for need in needs for name in PAIR_NEEDS[need]} <= set(present)
    for name, value in expected.items():
        torch.testing.assert_close(present[name], value, rtol=1e-4, atol=1e-4)
        assert present[name].requires_grad is name.startswith("policy_")
    assert bool((stats.policy_chosen_kls > 0).all())


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "ld_dpo", "wpo"])
def test_gradients_of_token_level_objectives_reach_the_adapters_rightly(
    policy: PeftModel, name: str
) -> None:
    bound = objectives.get(name).bind(beta=0.5)
    batch = collate_pairs(PAIRS, pad_id=0)
    fast = gradient(policy, bound(pair_stats(policy, batch, needs=bound.needs, chunk=4)).mean())
    lengths = {
        f"{s}_lengths": torch.tensor([len(row[f"{s}_ids"]) for row in PAIRS])
        for s in ("chosen", "rejected")
    }
    slow = gradient(policy, bound(PairStats(**dense(policy), **lengths)).mean())
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4 * float(slow.abs().max()))


def test_sampled_tokens_are_as_many_as_the_shorter_side_has_and_the_same_for_both_models(
    policy: PeftModel,
) -> None:
    batch = collate_pairs(PAIRS, pad_id=0)
    torch.manual_seed(0)
    with torch.no_grad():
        stats = pair_stats(policy, batch, needs={"sampled_logps"})
        with reference(policy):
            same = pair_stats(policy, batch, needs={"sampled_logps"})
    # where policy and reference are one model, the drawn sums are equal: the draw is shared
    assert torch.equal(same.policy_chosen_sampled_logps, same.reference_chosen_sampled_logps)
    assert torch.equal(same.policy_rejected_sampled_logps, same.reference_rejected_sampled_logps)
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        lengths = stats.present()[f"{side}_lengths"]
        whole = lengths <= stats.present()[f"{other}_lengths"]
        drawn = stats.present()[f"policy_{side}_sampled_logps"]
        every = stats.present()[f"policy_{side}_logps"]
        torch.testing.assert_close(drawn[whole], every[whole])
        assert bool((drawn[~whole] > every[~whole]).all())  # fewer tokens, each below 0


def test_sampled_tokens_are_drawn_without_favour(policy: PeftModel) -> None:
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 10], "rejected_ids": [11, 12]}
    batch = collate_pairs([row] * 200, pad_id=0)
    torch.manual_seed(1)
    with torch.no_grad():
        stats = pair_stats(policy, batch, needs={"sampled_logps"}, with_reference=False)
    # each token is in half of the draws: the mean sum is half of the whole
    drawn, whole = stats.policy_chosen_sampled_logps, stats.policy_chosen_logps[0]
    error = float(drawn.std()) / 200**0.5
    assert float(drawn.mean()) == pytest.approx(float(whole) / 2, abs=4 * error)
    assert len(drawn.round(decimals=4).unique()) == 6  # 4 choose 2


def test_labelled_rows_and_their_mismatched_completions_are_scored(policy: PeftModel) -> None:
    batch = collate_labelled(LABELLED, pad_id=0)
    stats = labelled_stats(policy, batch, needs={"mismatched"})
    for name, key in (("logps", "completion_ids"), ("mismatched_logps", "mismatched_ids")):
        for owner, fixed in (("policy", False), ("reference", True)):
            expected = torch.stack(
                [
                    distributions(policy, row["prompt_ids"], row[key], fixed)[
                        torch.arange(len(row[key])), torch.tensor(row[key])
                    ].sum()
                    for row in LABELLED
                ]
            )
            found = stats.present()[f"{owner}_{name}"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert found.requires_grad is (f"{owner}_{name}" == "policy_logps")
    assert stats.labels.tolist() == [row["label"] for row in LABELLED]


def test_kto_on_single_rows_is_kto_on_the_whole_batch(policy: PeftModel) -> None:
    """The statistics of single rows, put together, give the loss that one batch gives."""
    bound = objectives.get("kto").bind(beta=0.5)
    with torch.no_grad():
        whole = labelled_stats(policy, collate_labelled(LABELLED, pad_id=0), needs=bound.needs)
        parts = [
            labelled_stats(policy, collate_labelled([row], pad_id=0), needs=bound.needs)
            for row in LABELLED
        ]
    together = type(whole).cat(parts)
    torch.testing.assert_close(bound(together), bound(whole), rtol=1e-4, atol=1e-5)
    # while single rows by themselves have each their own baseline
    assert not torch.allclose(torch.cat([bound(part) for part in parts]), bound(whole), atol=1e-4)


def test_scores_that_are_not_there_and_a_trained_head_are_refused(
    policy: PeftModel, tiny_model: Path
) -> None:
    with pytest.raises(DataError, match="chosen_scores, rejected_scores: not in the data"):
        pair_stats(policy, collate_pairs(PAIRS, pad_id=0), needs={"scores"})
    trained_head = load_policy(tiny_model, lora=LoraConfig(rank=2, modules_to_save=["lm_head"]))
    with pytest.raises(ModelError, match="policy and reference to share their head"):
        pair_stats(trained_head, collate_pairs(PAIRS, pad_id=0), needs={"kls"})
