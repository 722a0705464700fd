"""Training reaches the closed form of an objective: NF4 base, LoRA, batches, trainer and all.

Two prompts with three answers of one or two tokens (and the end token): all that can be preferred
can be enumerated. The rows of a step hold every ordered pair ``(y, y')`` exactly in the proportion
``P(y > y')`` of Bradley-Terry, as whole numbers of rows, equally many for every unordered pair.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainingArguments

from lora_dpo import objectives
from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_labelled, load_preferences, tokenise
from lora_dpo.forward import completion_logps
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import load_policy, reference
from lora_dpo.reference_cache import with_reference_logps
from lora_dpo.trainer import PreferenceTrainer

# prompt -> answer -> integer Bradley-Terry strength s, so that the true reward is log s
STRENGTHS: dict[str, dict[str, int]] = {
    "Left or right? ": {"l": 1, "ri": 2, "x": 4},
    "Up or down? ": {"up": 3, "d": 1, "ox": 3},
}


def exact_rows(strengths: dict[str, dict[str, int]]) -> list[dict[str, str]]:
    """Return rows in which ``y`` beats ``y'`` in exactly ``s / (s + s')`` of their meetings."""
    rows = []
    for prompt, answers in strengths.items():
        shares = [Fraction(a, a + b) for a, b in permutations(answers.values(), 2)]
        meetings = math.lcm(*(share.denominator for share in shares))
        for (chosen, rejected), share in zip(permutations(answers, 2), shares, strict=True):
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            rows += [row] * int(meetings * share)
    return rows


def win_rate(strength: int, among: dict[str, int]) -> float:
    """Return the probability of beating a uniform opponent, oneself included (with 1/2)."""
    return sum(strength / (strength + other) for other in among.values()) / len(among)


def closed_form(name: str, beta: float, answers: dict[str, int]) -> Tensor:
    """Return what the log-ratios of the answers are at the optimum, up to a constant a prompt.

    DPO: ``r / beta``, summed log-probs. IPO: ``p(y) / beta`` per token (see
    ``objectives/test_optimum.py`` for both derivations); what is returned is divided by length, as
    the log-ratios are that it is compared with.
    """
    gain = {
        "dpo": lambda s: math.log(s) / beta,
        "ipo": lambda s: win_rate(s, answers) / beta,
    }[name]
    return torch.tensor([gain(s) for s in answers.values()], dtype=torch.float64)


def gaps(values: Tensor) -> Tensor:
    """Return all differences of the entries of a vector."""
    return values[:, None] - values[None, :]


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.5), ("ipo", 0.5)])
def test_a_trained_4_bit_policy_reaches_the_closed_form(
    name: str, beta: float, tiny_model: Path, tmp_path: Path
) -> None:
    """Log-ratio gaps to 1e-3; for DPO also the distribution over the answers of each prompt."""
    objective = objectives.get(name).bind(beta=beta)
    trainer = train(objective, tiny_model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for prompt, answers in STRENGTHS.items():
        policy, fixed, lengths = enumerate_answers(trainer.model, tokenizer, prompt, list(answers))
        assert sorted(set(lengths.tolist())) == [2, 3]  # one or two letters and the end
        ratios = (policy - fixed) / (lengths if objective.objective.logps == "mean" else 1)
        expected = closed_form(name, beta, answers)
        torch.testing.assert_close(gaps(ratios), gaps(expected), rtol=0, atol=1e-3)
        assert float(gaps(expected).abs().max()) > 0.5  # it had to go somewhere
        if name == "dpo":
            wanted = (fixed + expected).log_softmax(0).exp()
            assert 0.5 * float((policy.softmax(0) - wanted).abs().sum()) < 1e-3


def train(
    objective: BoundObjective, model: Path, folder: Path, steps: int = 200
) -> PreferenceTrainer:
    """Train on all rows at every step, with Adam and a learning rate that decays to 0."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = tokenise(
        load_preferences(exact_rows(STRENGTHS), duplicates="keep"), tokenizer, max_length=64
    )
    torch.manual_seed(3)
    policy = load_policy(model, lora=LoraConfig(rank=8))
    trainer = PreferenceTrainer(
        policy,
        objective=objective,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=len(data),
            max_steps=steps,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            adam_beta2=0.99,
            max_grad_norm=0.0,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_data=with_reference_logps(policy, data),
    )
    trainer.train()
    return trainer


def enumerate_answers(
    policy: torch.nn.Module, tokenizer: object, prompt: str, answers: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs under policy and reference, and lengths, of every answer ``[answers]``."""
    rows = [{"prompt": prompt, "completion": answer, "label": True} for answer in answers]
    data = tokenise(load_preferences(rows), tokenizer, max_length=64)  # type: ignore[arg-type]
    batch = collate_labelled([data.rows[i] for i in range(len(data))], pad_id=0)
    policy.eval()
    with torch.no_grad():
        mine = completion_logps(policy, batch).double()
    with reference(policy):
        fixed = completion_logps(policy, batch).double()
    lengths = torch.tensor([len(ids) for ids in data.rows["completion_ids"]])
    return mine, fixed, lengths
