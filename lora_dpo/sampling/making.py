"""``sample``: from prompts to completions, to scores, to rankings and pairs."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_dpo.callbacks import show_log_lines
from lora_dpo.data import Pair, load_preferences
from lora_dpo.data.scores import RULES, RankingPairs
from lora_dpo.errors import ConfigError, DataError, OutputError
from lora_dpo.journal import Journal, open_journal
from lora_dpo.labelling import label
from lora_dpo.prompt_tokens import Prompt
from lora_dpo.run_folder import Run
from lora_dpo.sampling.drawing import Drawer, check_context, draw_all, kept
from lora_dpo.sampling.result import Samples
from lora_dpo.sampling.scorers import (
    NO_VERDICT,
    Function,
    Scorer,
    check_judged,
    find_scorer,
    questions,
    score_all,
)
from lora_dpo.store import write_text

logger = logging.getLogger("lora_dpo")

ALONE = "prompts left out: fewer than two different completions"


def sample(
    policy: Run | str | Path,
    prompts: str | Path | Sequence[Prompt],
    to: str | Path,
    *,
    k: int = 4,
    by: str | Function | None = None,
    pairs: RankingPairs | None = None,
    min_margin: float | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    limit: int | None = None,
    checkpoint: str = "final",
    batch_size: int = 32,
    judge_model: str | None = None,
    judge_key: str | None = None,
    overwrite: bool = False,
    browser: bool = True,
) -> Samples:
    """Draw completions of each prompt from a policy, score them, and make them into preferences.

    Kept prompt by prompt in ``NAME.drawn.jsonl``: the same call goes on where a killed one stopped.

    Args:
        policy: a run or its folder, or a base (a folder or hub id) without adapter, in NF4.
        prompts: a file (a column ``prompt``, any format of preferences, or .txt with a prompt a
            line), a hub id, or a list. A text is a user's turn if the run was trained on chats.
        to: the file of rankings to write, which training reads as it is.
        k: completions of each prompt, at least 2.
        by: what scores them: a function of prompt and completion or its name, ``module:function`` or
            ``path/file.py:function``; ``reward:RUN``; ``judge:WHERE``, asked about each two in both
            orders, the score being the share won; ``hand``, with ``label``; None: nothing.
        pairs: write ``NAME.pairs.jsonl`` too, by a rule of ``data.ranking_pairs``.
        min_margin: least difference of the scores of a pair.
        temperature: above 0; at 1 samples are the policy's own distribution.
        max_new_tokens: longest completion, tokens; longer ones are left out.
        seed: of the random numbers. Batch size and other prompts change nothing.
        limit: the first so many prompts.
        checkpoint: of a run: ``final``, ``best`` or a step.
        batch_size: completions drawn at a time.
        judge_model: the name of the model at a judge's endpoint.
        judge_key: the environment variable that holds the endpoint's key.
        overwrite: replace ``to``; what was drawn is used again.
        browser: with ``hand``: whether to open the page.

    Raises:
        LoraDpoError: a setting, scorer, policy or file that cannot be used; before weights load.
    """
    show_log_lines()
    target = Path(to)
    _check(k, temperature, max_new_tokens, batch_size, pairs, min_margin, by)
    _check_target(target, prompts, pairs is not None, overwrite, by)
    judge = {"model": judge_model, "key_variable": judge_key}
    if any(judge.values()) and not str(by).startswith("judge:"):
        raise ConfigError("sample: settings of a judge, and no judge; name it: by judge:WHERE.")
    scorer = find_scorer(by, **judge) if by not in (None, "hand") else None
    drawer = Drawer.open(policy, checkpoint)
    asked = drawer.prompts(prompts, limit)
    settings = {"k": k, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    found, rows = _drawn(drawer, asked, scorer, target, settings, batch_size)
    if pairs is not None:
        found = _with_pairs(found, rows, target, pairs, min_margin)
    if by == "hand":
        found = replace(found, labels=label(target, _labels_of(target), browser=browser))
    return found


def _drawn(
    drawer: Drawer,
    prompts: dict[str, Prompt],
    scorer: Scorer | None,
    target: Path,
    settings: dict[str, Any],
    batch_size: int,
) -> tuple[Samples, list[dict[str, Any]]]:
    """Draw, score and write the rankings."""
    k, left_out = settings["k"], Counter[str]()
    if scorer is not None and scorer.is_judge:
        check_judged(k)
        most = len(prompts) * questions(k)
        logger.info("judge: at most %d questions for %d prompts", most, len(prompts))
    check_context(drawer, prompts, settings["max_new_tokens"])
    head = {"drawn_by": "lora-dpo sample", **drawer.facts(), **settings}
    with open_journal(_journal_of(target), head) as journal:
        draw_all(drawer, prompts, journal, batch_size=batch_size, **settings)
        _free_memory()
        texts = kept(prompts, journal, left_out)
        rows = _rows(prompts, texts, scorer, journal, left_out)
    if not rows:
        counts = "".join(f"\n  {count} {what}" for what, count in left_out.items())
        raise DataError(f"{target}: nothing to write.{counts}\nRaise k or max_new_tokens.")
    _write(target, rows)
    found = Samples(
        policy=str(head["policy"]),
        to=str(target),
        prompts=len(prompts),
        drawn=len(prompts) * k,
        written=sum(len(row["completions"]) for row in rows),
        rows=len(rows),
        left_out=dict(left_out),
        scored_by=scorer.name if scorer else None,
        notes=tuple(scorer.lines()) if scorer else (),
        **(_summary([row["scores"] for row in rows]) if scorer else {}),
    )
    return found, rows


def _check(
    k: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    pairs: str | None,
    min_margin: float | None,
    by: Any,
) -> None:
    wrong = []
    if k < 2:
        wrong.append(f"k is {k}; expected at least 2 completions, to have something to prefer.")
    if not (temperature > 0 and math.isfinite(temperature)):
        wrong.append(f"temperature is {temperature:g}; expected above 0, or all would be the same.")
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            wrong.append(f"{name} is {value}; expected at least 1.")
    if pairs is not None and pairs not in RULES:
        wrong.append(f"pairs is {pairs!r}; expected one of {', '.join(RULES)}.")
    if pairs is not None and by in (None, "hand"):
        wrong.append("pairs: they are made from scores; say with 'by' what gives them.")
    if min_margin is not None and (pairs is None or min_margin < 0):
        wrong.append(f"min_margin is {min_margin:g}; expected at least 0, and 'pairs' beside it.")
    if wrong:
        raise ConfigError([f"sample: {sentence}" for sentence in wrong])


def _check_target(target: Path, prompts: Any, with_pairs: bool, overwrite: bool, by: Any) -> None:
    if target.suffix != ".jsonl":
        raise OutputError(
            f"{target}: rankings are written as JSON lines; expected a name in .jsonl."
        )
    written = (target, *([_pairs_of(target)] if with_pairs else []))
    for path in (*written, _journal_of(target)):
        if isinstance(prompts, (str, Path)) and Path(prompts).resolve() == path.resolve():
            raise OutputError(f"{path}: is the prompts themselves; choose another file with --to.")
    for path in written:
        if path.exists() and not overwrite:
            hand = f"go on by hand with: lora-dpo label {path} --to {_labels_of(path)}; or "
            raise OutputError(
                f"{path}: exists already; {hand if by == 'hand' else ''}choose another file, or "
                "overwrite it (what was drawn for it is used again)."
            )


def _journal_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}.drawn.jsonl")


def _labels_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}.labels.jsonl")


def _pairs_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}.pairs.jsonl")


def _rows(
    prompts: Mapping[str, Prompt],
    texts: Mapping[str, Sequence[str]],
    scorer: Scorer | None,
    journal: Journal,
    left_out: Counter[str],
) -> list[dict[str, Any]]:
    """Return the rows of the file: prompts with at least two completions, and scores if any."""
    groups = {key: (prompts[key], own) for key, own in texts.items() if len(own) > 1}
    left_out[ALONE] += len(texts) - len(groups)
    if scorer is None:
        rows = [{"prompt": prompt, "completions": list(own)} for prompt, own in groups.values()]
        left_out += Counter()  # drops zeros
        return rows
    scores, rows = score_all(scorer, groups, journal), []
    for key, (prompt, own) in groups.items():
        there = [(t, s) for t, s in zip(own, scores[key], strict=True) if s is not None]
        left_out[NO_VERDICT] += len(own) - len(there)
        if len(there) < 2:
            left_out[ALONE] += 1
            continue
        known, values = zip(*there, strict=True)
        rows.append({"prompt": prompt, "completions": list(known), "scores": list(values)})
    left_out += Counter()
    return rows


def _summary(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    every = [value for own in scores for value in own]
    return {
        "best": sum(map(max, scores)) / len(scores),
        "mean": sum(every) / len(every),
        "worst": sum(map(min, scores)) / len(scores),
        "tied": sum(min(own) == max(own) for own in scores),
    }


def _with_pairs(
    found: Samples,
    rows: list[dict[str, Any]],
    target: Path,
    rule: RankingPairs,
    min_margin: float | None,
) -> Samples:
    path = _pairs_of(target)
    try:
        read = load_preferences(rows, ranking_pairs=rule, min_margin=min_margin)
    except DataError as error:  # of rows of ours it can say one thing only
        raise DataError(f"{path}: no pairs, though {target} is written: {error}") from None
    made = [row for row in read.rows if isinstance(row, Pair)]
    _write(path, [_pair(row) for row in made])
    dropped = {
        reason: entry.count
        for (_, reason), entry in read.report.entries.items()
        if reason.startswith("dropped")
    }
    return replace(found, pairs_to=str(path), pairs=len(made), pairs_left_out=dropped)


def _pair(row: Pair) -> dict[str, Any]:
    sides = (row.prompt, row.chosen, row.rejected)
    texts = [side if isinstance(side, str) else [dict(turn) for turn in side] for side in sides]
    values = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    return {**values, "score_chosen": row.score_chosen, "score_rejected": row.score_rejected}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _free_memory() -> None:
    """Give back what the policy held, before a judge or a reward model loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
