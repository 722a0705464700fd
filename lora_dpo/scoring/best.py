"""Best of n: samples of a policy, ranked by its own implicit reward."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from rich.console import RenderableType
from torch import nn

from lora_dpo import objectives
from lora_dpo.errors import ConfigError
from lora_dpo.generation import end_ids, sample_ids
from lora_dpo.heads import causal_lm
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import check_base
from lora_dpo.prompt_tokens import Prompt, as_trained, encode_prompt, prompt_text
from lora_dpo.prompts import check_room
from lora_dpo.run_folder import Run
from lora_dpo.scoring.rewards import context_of, score_ids
from lora_dpo.showing import Displayed, hanging, said
from lora_dpo.store import refuse_existing, write_text


@dataclass(frozen=True)
class Ranked:
    """One sample.

    Args:
        text: without special tokens.
        reward: implicit.
        logps: summed log-prob under the policy, nats; ``reference_logps``: under the reference.
        tokens: its end token included.
        ended: whether it reached an end token.
    """

    text: str
    reward: float
    logps: float
    reference_logps: float
    tokens: int
    ended: bool


@dataclass(frozen=True)
class BestOf:
    """Samples for one prompt, the best first."""

    prompt: str
    ranking: tuple[Ranked, ...]

    @property
    def best(self) -> Ranked:
        """The sample of the highest reward."""
        return self.ranking[0]


@dataclass(frozen=True, repr=False)
class Rankings(Displayed, Sequence[BestOf]):
    """Samples by prompt, in the prompts' order; ``rule`` says what the reward is."""

    prompts: tuple[BestOf, ...]
    rule: str

    template: ClassVar[str] = "rankings"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo score: best of n for {len(self)} prompts"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, place: Any) -> Any:
        return self.prompts[place]

    def __repr__(self) -> str:
        return f"Rankings({len(self)} prompts, reward {self.rule})"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        parts: list[RenderableType] = [said(f"reward: {self.rule}")]
        for found in self.prompts:
            parts += [said(""), hanging(f"{'prompt':<11}{found.prompt}", 11, "bold")]
            parts += [
                hanging(f"{sample.reward:>9.4g}  {sample.text}", 11) for sample in found.ranking
            ]
        return parts

    def write(self, path: str | Path) -> None:
        """Write a JSON line a prompt to a new file.

        Raises:
            OutputError: the file exists.
        """
        refuse_existing(Path(path))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.to_dict()["prompts"])
        write_text(Path(path), "".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"rule": self.rule, "prompts": [asdict(found) for found in self.prompts]}


def best_of(
    policy: nn.Module | Run | str | Path,
    tokenizer: Any | None,
    prompts: Sequence[Prompt],
    *,
    n: int,
    beta: float | None = None,
    objective: BoundObjective | None = None,
    checkpoint: str = "final",
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    template_arguments: Mapping[str, Any] | None = None,
) -> Rankings:
    """Draw n samples a prompt at temperature 1 and rank them by the implicit reward.

    Args:
        policy: a ``PeftModel`` (then with ``beta`` or ``objective``), or a run or its folder, which
            brings tokenizer, objective and template with it.
        tokenizer: the policy's; None with a run.
        prompts: texts, or chats as lists of messages.
        n: samples a prompt, at least 1.
        beta: scale of ``beta x logratio``, per nat.
        objective: a bound objective, whose own reward is taken.
        checkpoint: of a run: ``final``, ``best`` or a step.
        max_new_tokens: longest sample, tokens.
        seed: of the random numbers.
        batch_size: samples at a time.
        template_arguments: variables of the chat template.

    Raises:
        ConfigError: n below 1, or both or neither of ``beta`` and ``objective``.
    """
    if n < 1:
        raise ConfigError(f"best_of: n is {n}; expected at least 1 sample a prompt.")
    if isinstance(policy, (Run, str, Path)):
        if any(x is not None for x in (tokenizer, beta, objective, template_arguments)):
            raise ConfigError(
                "best_of: a run brings its tokenizer, objective and template; leave tokenizer, beta, "
                "objective and template_arguments out."
            )
        run = policy if isinstance(policy, Run) else Run.open(policy)
        objective, tokenizer = run.objective, run.tokenizer()
        template_arguments = run.config.data.template_arguments
        prompts = as_trained(prompts, chat=run.is_chat)
        asked = [encode_prompt(tokenizer, prompt, template_arguments) for prompt in prompts]
        check_room(asked, context_of(check_base(run.config.model)), max_new_tokens)
        policy = cast(nn.Module, run.load_policy(checkpoint))
    elif (beta is None) is (objective is None):
        raise ConfigError("best_of: give beta, or the objective whose reward is meant, not both.")
    else:
        asked = [encode_prompt(tokenizer, prompt, template_arguments) for prompt in prompts]
        check_room(asked, context_of(causal_lm(policy).config), max_new_tokens)
    bound = objective or objectives.get("dpo").bind(beta=cast(float, beta))
    rows = [ids for ids in asked for _ in range(n)]
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    made = sample_ids(policy, tokenizer, rows, template_arguments=template_arguments, **how)
    scores = score_ids(policy, list(zip(rows, made, strict=True)), bound, batch_size=batch_size)
    ends = end_ids(policy, tokenizer, template_arguments)
    samples = [
        Ranked(_text(tokenizer, ids), ended=ids[-1] in ends, **scores.row(i))
        for i, ids in enumerate(made)
    ]
    groups = [samples[i * n : (i + 1) * n] for i in range(len(prompts))]
    ranked = [
        BestOf(prompt_text(prompt), tuple(sorted(group, key=lambda s: -s.reward)))
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    return Rankings(tuple(ranked), scores.rule)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
