"""What says how good a completion is: a function, another run's implicit reward, or a judge."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.data.messages import shown
from lora_dpo.errors import ConfigError, nearest
from lora_dpo.journal import Journal
from lora_dpo.judging import Judge, PositionBias, Verdict, judge_answers, open_judge
from lora_dpo.policy import check_base
from lora_dpo.preparing import stop_ids
from lora_dpo.prompt_tokens import Prompt, as_trained, prompt_text
from lora_dpo.run_folder import Run
from lora_dpo.sampling.drawing import base_config
from lora_dpo.scoring import score
from lora_dpo.store import file_sha256, fingerprint

logger = logging.getLogger("lora_dpo")

Function = Callable[[Any, str], float]
Group = tuple[Prompt, Sequence[str]]
Rate = Callable[[Sequence[Group]], list[list[float | None]]]
AT_ONCE = 16  # prompts whose scores are saved together
MOST_JUDGED = 8  # completions of a prompt: 56 questions to the judge
# what a function knows beside its code: with other values it is another one
_BOUND = ("__closure__", "__self__", "__defaults__", "__kwdefaults__")
NO_VERDICT = "left out: the judge gave no verdict that could be read"


@dataclass
class Scorer:
    """A way of scoring, by a name that tells it from others; opened once it is needed.

    Args:
        name: stands in the journal beside each score.
        open: returns a function from prompts with their completions to scores, None for a completion
            that got none.
        version: of what stands behind the name; scores of another version are not used again.
        is_judge: whether it is one, and is asked questions.
        verdicts: of a judge, as they come; ``prompts``: what each is about.
        answered: whether the judge ever gave a verdict, in an earlier session too.
    """

    name: str
    open: Callable[[], Rate]
    version: str = ""
    is_judge: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answered: bool = False

    def lines(self) -> list[str]:
        """Return what there is to know about a judge that was asked."""
        if not self.verdicts:
            return []
        return [f"judge: {PositionBias.of(self.verdicts, self.prompts)}"]


def find_scorer(by: str | Function, **judge: Any) -> Scorer:
    """Return the scorer that a user names; what is wrong with the name is told here.

    Args:
        by: a function of prompt and completion, its name as ``module:function`` or
            ``path/file.py:function``, ``reward:RUN``, or ``judge:WHERE``.
        judge: further arguments of ``open_judge``.

    Raises:
        ConfigError: no such function, or a name of no known form.
    """
    if not isinstance(by, str):
        if not callable(by):
            raise ConfigError(f"by is {shown(by)}; expected a function, or its name.")
        return _of_function(getattr(by, "__qualname__", repr(by)), by)
    kind, _, rest = by.partition(":")
    if kind == "judge" and rest:
        return _of_judge(rest, judge)
    if kind == "reward" and rest:
        run = Run.open(rest)
        weights = run.adapter_folder("final") / "adapter_model.safetensors"
        return Scorer(by, lambda: _rewards(run), file_sha256(weights)[:16])
    place, _, name = by.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"by is {by!r}; expected module:function, path/file.py:function, reward:RUN, judge:WHERE "
            "or hand."
        )
    return _of_function(by, find_function(place, name))


def find_function(place: str, name: str) -> Function:
    """Import a user's function: from a file if the place ends in .py, else from a module.

    Raises:
        ConfigError: no such file, module or function, or it does not import.
    """
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"by {place}:{name}: {place} does not import: {_last(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"by {place}:{name}: {place} has no function {name!r}.{nearest(name, known)}"
        )
    return found  # type: ignore[no-any-return]  # what it returns is checked at every call


def score_all(
    scorer: Scorer, groups: Mapping[str, Group], journal: Journal
) -> dict[str, list[float | None]]:
    """Return the scores of each prompt's completions; those that the journal has are not asked for."""
    found: dict[str, list[float | None]] = {}
    for line in journal.lines:
        if (line.get("scorer"), line.get("version")) == (scorer.name, scorer.version):
            own = groups.get(line["scored"])
            if own is not None and line["completions"] == list(own[1]):
                found[line["scored"]] = line["scores"]
    scorer.answered |= any(value is not None for scores in found.values() for value in scores)
    missing = [key for key in groups if key not in found]
    if scorer.is_judge:
        logger.info("judge: %d questions", sum(questions(len(groups[key][1])) for key in missing))
    if not missing:
        return found
    rate = scorer.open()
    for start in range(0, len(missing), AT_ONCE):
        keys = missing[start : start + AT_ONCE]
        for key, scores in zip(keys, rate([groups[key] for key in keys]), strict=True):
            texts = list(groups[key][1])
            journal.add(
                {
                    "scored": key,
                    "scorer": scorer.name,
                    "version": scorer.version,
                    "completions": texts,
                    "scores": scores,
                }
            )
            found[key] = scores
        logger.info("scored: %d of %d prompts", start + len(keys), len(missing))
    return found


def questions(k: int) -> int:
    """Return how many questions a judge is asked about ``k`` completions: each two, both orders."""
    return k * (k - 1)


def check_judged(k: int) -> None:
    """Hold that a judge can be asked about so many completions of a prompt."""
    if k > MOST_JUDGED:
        raise ConfigError(
            f"k is {k}: a judge compares each completion with each, in both orders, which is "
            f"{questions(k)} questions a prompt; at most {MOST_JUDGED} completions are judged."
        )


def _of_function(name: str, function: Function) -> Scorer:
    def rate(groups: Sequence[Group]) -> list[list[float | None]]:
        return [
            [_called(name, function, prompt, text) for text in texts] for prompt, texts in groups
        ]

    return Scorer(name, lambda: rate, _version(function))


def _version(function: Function) -> str:
    """Return a fingerprint of the file that a function is in: what it calls there counts too."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object with __call__, a function of C
        file = None
    code = getattr(function, "__code__", None)
    bound = [getattr(function, name, None) is not None for name in _BOUND]
    if file is None or not Path(file).is_file() or code is None or any(bound):
        return secrets.token_hex(8)  # nobody can say whether it is the same: scored anew
    return f"{file_sha256(Path(file))[:16]}:{code.co_firstlineno}"


def _called(name: str, function: Function, prompt: Prompt, completion: str) -> float:
    where = f"by {name}: for the prompt {prompt_text(prompt)[:60]!r}"
    try:
        value = function(prompt, completion)
    except Exception as error:
        raise ConfigError(f"{where} it raised {_last(error)}") from error
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{where} it returned {shown(value)}; expected a finite number.")
    return found


def _last(error: BaseException) -> str:
    """Return an error with the line that raised it: the code is the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _module(name: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ConfigError(f"by {name}: no module of that name; a file ends in .py, as in f.py:f.")
    return importlib.import_module(name)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"by {path}: no such file.")
    name = f"lora_dpo_scorer_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def _rewards(run: Run) -> Rate:
    policy, tokenizer = run.load_policy(), run.tokenizer()
    chat = run.is_chat

    def rate(groups: Sequence[Group]) -> list[list[float | None]]:
        rows = [
            (prompt, text)
            for (_, texts), prompt in zip(
                groups, as_trained([p for p, _ in groups], chat=chat), strict=True
            )
            for text in texts
        ]
        found = score(
            policy,
            tokenizer,
            [prompt for prompt, _ in rows],
            [text for _, text in rows],
            objective=run.objective,
            stop_ids=stop_ids(run.config),
            template_arguments=run.config.data.template_arguments,
        ).rewards
        ends = np.cumsum([len(texts) for _, texts in groups])
        return [part.tolist() for part in np.split(found, ends[:-1])]

    return rate


def _of_judge(where: str, settings: Mapping[str, Any]) -> Scorer:
    settings = {name: value for name, value in settings.items() if value is not None}
    opened: Callable[[], Judge]
    version = ""
    if where.lower().startswith(("http://", "https://")):
        judge = open_judge(where, **settings)  # nothing is sent yet
        opened = partial(_same, judge)
    else:
        if not Path(where).is_dir() or settings:
            open_judge(where, **settings)  # says what is wrong
        check_base(base_config(where).model)
        opened, version = partial(open_judge, where), _version_of_folder(Path(where))
    told = "".join(f" {name}={value}" for name, value in sorted(settings.items()))
    name = f"judge:{where}{told}"
    scorer = Scorer(name, lambda: _judged(opened(), scorer), version, is_judge=True)
    return scorer


def _version_of_folder(folder: Path) -> str:
    """Return a fingerprint of a model's files, without reading gigabytes of weights."""
    facts = [(path, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return fingerprint([(path.name, fact.st_size, fact.st_mtime_ns) for path, fact in facts])[:16]


def _same(judge: Judge) -> Judge:
    return judge


def _judged(judge: Judge, scorer: Scorer) -> Rate:
    def rate(groups: Sequence[Group]) -> list[list[float | None]]:
        places = [
            (g, a, b)
            for g, (_, texts) in enumerate(groups)
            for a, b in combinations(range(len(texts)), 2)
        ]
        asked = [
            (prompt_text(groups[g][0]), groups[g][1][a], groups[g][1][b]) for g, a, b in places
        ]
        judgement = judge_answers(judge, asked, answered=scorer.answered)
        if judgement.failed is not None:
            raise judgement.failed  # scores of whole prompts are in the journal
        for (prompt, _, _), verdict in zip(asked, judgement.verdicts, strict=True):
            if verdict is not None:
                scorer.verdicts.append(verdict)
                scorer.prompts.append(prompt)
                scorer.answered = True
        if judgement.unreadable:
            logger.info("judge: without a verdict, for example: %s", judgement.example)
        shares: list[list[list[float]]] = [[[] for _ in texts] for _, texts in groups]
        for (g, a, b), verdict in zip(places, judgement.verdicts, strict=True):
            if verdict is not None:
                shares[g][a].append(verdict.share)
                shares[g][b].append(1 - verdict.share)
        return [[sum(own) / len(own) if own else None for own in group] for group in shares]

    return rate
