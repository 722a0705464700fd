"""Runs beside each other on one base: checked before weights load, sampled, scored, judged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_dpo.comparing.answering import Sampled, sample_answers
from lora_dpo.comparing.comparison import AnswerRow, Comparison, ModelFigures
from lora_dpo.comparing.measures import Array, Measured, against, columns_of, measure, wins
from lora_dpo.comparing.together import adapters_of, check_together, load_together, names_of
from lora_dpo.errors import ConfigError, JudgeError, UnreadableAnswerError
from lora_dpo.judging import Judge, Judgement, judge_answers, open_judge
from lora_dpo.policy import acting, check_base
from lora_dpo.prompt_tokens import encode_prompt, prompt_text
from lora_dpo.prompts import check_room, read_prompts
from lora_dpo.run_folder import Run
from lora_dpo.scoring import Scores, context_of, reward_in_words, score_ids
from lora_dpo.store import write_json

logger = logging.getLogger("lora_dpo")

Folder = Run | str | Path


@dataclass(frozen=True)
class _Settings:
    samples: int
    max_new_tokens: int
    seed: int
    batch_size: int


def compare(
    runs: Folder | Sequence[Folder],
    prompts: Any = None,
    *,
    judge: Judge | str | Path | None = None,
    judge_model: str | None = None,
    judge_key: str | None = None,
    samples: int = 1,
    limit: int | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    checkpoint: str = "final",
    batch_size: int = 16,
    write: bool = True,
) -> Comparison:
    """Compare policies with their reference on the same prompts and random numbers.

    The base is in memory once, and the adapters beside each other on it.

    Args:
        runs: a run or its folder, or several that share base, quantisation, template and reference.
        prompts: a file (a prompt a line, a column ``prompt``, or preferences) or a list; the held-out
            prompts of the first run if left out.
        judge: a judge, the folder of a model, or an OpenAI-compatible endpoint; None asks nobody.
        judge_model: the model's name at an endpoint.
        judge_key: the environment variable with the endpoint's key.
        samples: answers a prompt of each model, at temperature 1.
        limit: the first so many prompts.
        max_new_tokens: longest answer, tokens.
        seed: of the random numbers.
        checkpoint: ``final``, ``best`` or a step, of all runs.
        batch_size: answers at a time.
        write: whether ``comparison.json`` is written to the first run's folder.

    Raises:
        ConfigError: runs that cannot stand on one base, or a number out of range.
        DataError: prompts that cannot be read, or that leave no room for an answer.
        JudgeError: a judge that cannot be asked; if it fails at the end, what needs no judge is
            written first.
    """
    given = [runs] if isinstance(runs, (Run, str, Path)) else list(runs)
    opened = [run if isinstance(run, Run) else Run.open(run) for run in given]
    numbers = {"samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if low := [f"{name} is {value}" for name, value in numbers.items() if value < 1]:
        raise ConfigError([f"compare: {problem}; expected at least 1." for problem in low])
    check_together(opened, checkpoint)
    asked = read_prompts(opened[0], prompts, limit=limit)
    tokenizer, template = opened[0].tokenizer(), opened[0].config.data.template_arguments
    ids = [encode_prompt(tokenizer, prompt, template) for prompt in asked]
    check_room(ids, context_of(check_base(opened[0].config.model)), max_new_tokens)
    texts = [prompt_text(prompt) for prompt in asked]
    opened_judge = _judge(judge, judge_model, judge_key)
    if opened_judge is not None:
        _try(opened_judge, texts[0])
    policy = load_together(opened, checkpoint)
    settings = _Settings(samples, max_new_tokens, seed, batch_size)
    made, failed = _Work(opened, policy, tokenizer, ids, texts, settings).compare(opened_judge)
    path = opened[0].folder / "comparison.json"
    if write:
        write_json(path, made.to_dict())
    if failed is not None:
        kept = f" What was found without it is in {path}." if write else ""
        raise JudgeError(f"{failed}{kept}") from failed
    return made


@dataclass(frozen=True)
class _Work:
    """All that the steps of one comparison share."""

    runs: list[Run]
    policy: Any
    tokenizer: Any
    prompts: list[list[int]]
    texts: list[str]
    settings: _Settings

    @property
    def clusters(self) -> NDArray[np.int64]:
        """The prompt of each answer, ``[answers]``."""
        return np.repeat(np.arange(len(self.prompts)), self.settings.samples)

    def compare(self, judge: Judge | None) -> tuple[Comparison, JudgeError | None]:
        """Return the comparison, and what went wrong where the judge failed."""
        fixed = self._answers(None)
        base = columns_of(fixed)
        plain = {name: Measured(measure(name, v, self.clusters)) for name, v in base.items()}
        models = [ModelFigures("reference", "", "", plain, ())]
        answers = [fixed]
        adapters = adapters_of(self.runs)
        for name, adapter, run in zip(names_of(self.runs), adapters, self.runs, strict=True):
            mine = self._answers(adapter)
            figures = {
                key: against(key, values, base[key], self.clusters)
                for key, values in columns_of(mine).items()
            }
            figures |= self._by_reward(adapter, run, mine, fixed)
            rule = reward_in_words(run.objective)
            models.append(ModelFigures(name, str(run.folder), rule, figures, ()))
            answers.append(mine)
        failed = None
        if judge is not None:  # last: whatever happens to it, the rest is there
            models, failed = self._judged(judge, models, answers)
        made = Comparison(
            models=tuple(models),
            answers=tuple(self._side_by_side([model.name for model in models], answers)),
            prompts=len(self.prompts),
            samples=self.settings.samples,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            judge=_name(judge),
        )
        return made, failed

    def _answers(self, adapter: str | None) -> Sampled:
        settings = self.settings
        with acting(self.policy, adapter) if adapter else nullcontext():
            return sample_answers(
                self.policy,
                self.tokenizer,
                self.prompts,
                as_reference=adapter is None,
                samples=settings.samples,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed,
                batch_size=settings.batch_size,
                template_arguments=self.runs[0].config.data.template_arguments,
            )

    def _scores(self, run: Run, answers: Sampled) -> Scores:
        rows = [
            (self.prompts[place], ids)
            for place, ids in zip(self.clusters, answers.ids, strict=True)
        ]
        return score_ids(
            self.policy,
            rows,
            run.objective,
            batch_size=self.settings.batch_size,
            chunk=run.config.train.chunk_tokens,
        )

    def _by_reward(
        self, adapter: str, run: Run, mine: Sampled, fixed: Sampled
    ) -> dict[str, Measured]:
        """Return the KL to the reference, and how often the model's reward prefers its own answer."""
        with acting(self.policy, adapter):
            ours, theirs = self._scores(run, mine), self._scores(run, fixed)
        # of the model's own samples: unbiased for its KL to the reference
        kl = ours.logps - ours.reference_logps
        shares: Array = (np.sign(ours.rewards - theirs.rewards) + 1) / 2
        shares[[a == b for a, b in zip(mine.ids, fixed.ids, strict=True)]] = 0.5
        return {
            "kl": Measured(measure("kl", kl, self.clusters)),
            "reward_wins": wins("reward_wins", shares, self.clusters),
        }

    def _judged(
        self, judge: Judge, models: Sequence[ModelFigures], answers: Sequence[Sampled]
    ) -> tuple[list[ModelFigures], JudgeError | None]:
        """Return the models with the judge's figures, as far as it came."""
        found, failed, answered = [models[0]], None, False
        for model, mine in zip(models[1:], answers[1:], strict=True):
            if failed is None:
                try:
                    wins_, notes, said = self._by_judge(judge, mine, answers[0], answered)
                except JudgeError as error:
                    failed = error
                else:
                    failed, answered = said.failed, answered or any(said.verdicts)
                    figures = {**model.measures, "judge_wins": wins_}
                    found.append(replace(model, measures=figures, notes=notes))
                    continue
            found.append(replace(model, notes=(f"judge: it failed, so no figures: {failed}",)))
        return found, failed

    def _by_judge(
        self, judge: Judge, mine: Sampled, fixed: Sampled, answered: bool
    ) -> tuple[Measured, tuple[str, ...], Judgement]:
        """Return win rate, notes, and what the judge said."""
        places = [i for i, (a, b) in enumerate(zip(mine.texts, fixed.texts, strict=True)) if a != b]
        asked = [(self.texts[self.clusters[i]], mine.texts[i], fixed.texts[i]) for i in places]
        shares = np.full(len(mine.texts), 0.5)  # the same answer is a tie, and needs no judge
        judgement: Judgement = judge_answers(judge, asked, answered=answered)
        for place, verdict in zip(places, judgement.verdicts, strict=True):
            shares[place] = np.nan if verdict is None else verdict.share
        notes = [f"judge: {line}" for line in judgement.lines()]
        if same := len(shares) - len(places):
            notes.append(f"judge: {same} answers equal to the reference's count as ties, unasked")
        return wins("judge_wins", shares, self.clusters), tuple(notes), judgement

    def _side_by_side(self, names: Sequence[str], answers: Sequence[Sampled]) -> list[AnswerRow]:
        return [
            AnswerRow(
                self.texts[place],
                {name: made.texts[i] for name, made in zip(names, answers, strict=True)},
            )
            for i, place in enumerate(self.clusters)
        ]


def _judge(judge: Judge | str | Path | None, model: str | None, key: str | None) -> Judge | None:
    if isinstance(judge, (str, Path)):
        return open_judge(judge, model=model, key_variable=key)
    if model is not None or key is not None:
        raise ConfigError(
            "compare: a judge's model or key belongs to an endpoint; give its address."
        )
    return judge


def _name(judge: Judge | None) -> str | None:
    if judge is None or type(judge).__repr__ is not object.__repr__:
        return repr(judge) if judge is not None else None
    return type(judge).__name__


def _try(judge: Judge, prompt: str) -> None:
    """Ask one question before any weight loads: a judge that is not there would cost all answers."""
    try:
        judge.choose(prompt, "Yes.", "No.")
    except UnreadableAnswerError:
        return  # of this question, perhaps; of many it is an error
