"""Published numbers as cases for our table: which loss of the file is which objective, and how.

The file was made by executing public implementations in float64 (its own ``implementations`` names
repository, commit and lines); it is data, and this is the translation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_dpo import objectives
from lora_dpo.logprobs import Fixed, predicting_positions, sum_by_row, token_values
from lora_dpo.objectives import BoundObjective
from lora_dpo.stats import AnyStats, LabelledStats, PairStats

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vectors.json"
VECTORS = json.loads(FIXTURE.read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in VECTORS["cases"]}

Params = Mapping[str, Any]
# our name, and our hyperparameters' names in theirs
_RENAMED = {
    "lambda": "beta", "lambda_d": "desirable_weight", "lambda_u": "undesirable_weight",
    "apply_to_ref": "discount_reference", "f": "shift", "a": "alpha", "tau": "tau",
}  # fmt: skip
_NOT_OURS = (
    "seed", "shared_draw", "gap_mean", "gap_std", "ema_mean", "ema_std", "previous_rewards",
    "reference_free", "variant", "loss_type", "nll",
)  # fmt: skip
_NAMES = {
    "bco_pair_noshift": "bco_pair", "bco_unpaired": "bco", "cal_dpo_turbo": "cal_dpo",
    "cpo_pref": "cpo", "orpo_avg": "orpo", "orpo_or": "orpo", "wpo_logits": "wpo",
    "dpo_logits": "dpo", "simpo_logits": "simpo", "rpo_nll_batchmean": "dpo", "cpo_full": "cpo",
}  # fmt: skip
_FIXED: dict[str, dict[str, float]] = {
    "cal_dpo_turbo": {"calibration": 1.0},
    "orpo_or": {"nll_weight": 0.0},
    **{name: {"nll_weight": 0.0} for name in ("cpo_pref", "cpo_hinge", "cpo_ipo")},
}
# Losses of the full file that are not in our table, and why.
LEFT_OUT = {
    "discopop_aql": "discovered losses that DiscoPOP's paper did not choose",
    "discopop_aqfl": "as discopop_aql",
    "discopop_dbaql": "as discopop_aql",
    "discopop_padll": "as discopop_aql",
    "discopop_cell": "as discopop_aql",
    "discopop_pfl": "as discopop_aql",
    "kto_pair": "lets gradient through its KL; TRL dropped it; pairs load as unpaired rows for kto",
    "mallows_dpo": "needs the entropy of the reference along each prompt, which no record has",
    "epsilon_dpo": "needs logits of interpolated models, two more heads a token",
    "epsilon_dpo_logits": "as epsilon_dpo",
    "relative_po": "needs embeddings of prompts by a further model",
    "tis_dpo": "needs token weights from two further models",
    "npo": "unlearning: a forget set is no preference data",
    "simnpo": "as npo",
    "xpo": "needs completions sampled while training",
    "exo_pref_official": "its target does not add up to 1; exo_pair is the normalised form",
    "exo_rw_official": "rpo_fwd_kl on the same scores, up to the names of beta and eta",
    "orpo_full": "its NLL runs over the prompt too, which no record has",
    "orpo_official_quirks": "counts a padding position, a fault of the source",
    "infonca_k4": "k-wise: pairs are read from rankings by ranking_pairs",
    "nca_k4": "as infonca_k4",
    "s_dpo": "as infonca_k4",
    "tpo": "needs a third, gold completion in each row",
    "ches_score": "a filter of data and no loss; see the diagnostics",
}


def bound_of(case: Mapping[str, Any]) -> BoundObjective:
    """Return our objective of a case."""
    loss, params = case["loss"], case["params"]
    if loss == "mpo":
        parts = [("dpo", params["beta"]), ("bco_pair", params["beta"]), ("sft", None)]
        terms = [
            {"name": name, "weight": weight, **({"beta": beta} if beta else {})}
            for (name, beta), weight in zip(parts, params["weights"], strict=True)
        ]
        return objectives.build({"name": "mixture", "terms": terms})
    name = _NAMES.get(loss, loss)
    given = {_RENAMED.get(k, k): v for k, v in params.items() if k not in _NOT_OURS}
    if loss == "dpo" and params.get("reference_free"):
        name = "dpo_reference_free"
    if loss in ("ipo", "ipo_sum", "cpo_ipo"):
        given["beta"] = given.pop("tau")
    if loss == "dpop":
        given["dpop_lambda"] = given.pop("beta") if "beta" not in params else params["lambda"]
        given["beta"] = params["beta"]
    if loss == "slic_hf":
        given["regularisation"] = given.pop("beta")
    if loss == "modpo":
        given["weight"] = given.pop("w")[0]
    if loss == "cpo_full":
        given["nll_weight"] = given.pop("cpo_alpha")
        name = "cpo_simpo" if params["loss_type"] == "simpo" else "cpo"
    given |= _FIXED.get(loss, {})
    return objectives.get(name).bind(**given)


def states_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the objective remembers at the start of a case."""
    params = case["params"]
    if case["loss"] == "beta_dpo":
        return {"beta_dpo": {"mean": params["gap_mean"], "std": params["gap_std"]}}
    if case["loss"] == "alpha_dpo":
        return {"alpha_dpo": {"mean": params["ema_mean"], "std": params["ema_std"]}}
    if case["loss"] == "bco_unpaired":
        earlier = [reward for step in params.get("previous_rewards", []) for reward in step]
        mean = sum(earlier) / len(earlier) if earlier else 0.0
        return {"bco": {"count": float(len(earlier)), "mean": mean}}
    return {}


def inputs_of(case: Mapping[str, Any]) -> tuple[AnyStats, dict[str, Tensor]]:
    """Return the record of a case, and the leaves that the file gives gradients of."""
    values = VECTORS["batches"][case["batch"]]
    return _READERS[values["kind"]](values, case)


def _double(value: Any, *, leaf: bool = False) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=leaf)


def _paired(values: Mapping[str, Any], case: Mapping[str, Any]) -> Any:
    leaves = {f"policy_{side}": _double(values[f"policy_{side}"], leaf=True) for side in _SIDES}
    names = {"sppo": ("p_win", "p_lose")}.get(case["loss"], ("score_chosen", "score_rejected"))
    scores = [_double(values[name]) for name in names]
    if case["loss"] == "dpo_margin":
        scores = [_double(values["margin"]), torch.zeros_like(scores[0])]
    stats = PairStats(
        leaves["policy_chosen"],
        leaves["policy_rejected"],
        *(torch.tensor(values[f"len_{side}"]) for side in _SIDES),
        *(_double(values[f"ref_{side}"]) for side in _SIDES),
        *scores,
    )
    return stats, leaves


def _unpaired(values: Mapping[str, Any], case: Mapping[str, Any]) -> Any:
    leaf = _double(values["policy"], leaf=True)
    others = (_double(values[name]) for name in ("ref", "policy_kl", "ref_kl"))
    labels = torch.tensor(values["label"]).bool()
    return LabelledStats(leaf, torch.tensor(values["len"]), labels, *others), {"policy": leaf}


def _token_level(values: Mapping[str, Any], case: Mapping[str, Any]) -> Any:
    leaves = {f"policy_{s}_tok": _double(values[f"policy_{s}_tok"], leaf=True) for s in _SIDES}
    masks = {side: _double(values[f"mask_{side}"]) for side in _SIDES}  # [batch, time]
    lengths = {side: mask.sum(1) for side, mask in masks.items()}
    shorter = torch.minimum(*lengths.values())[:, None]
    fields: dict[str, Tensor] = {}
    for side, mask in masks.items():
        fields[f"{side}_lengths"] = lengths[side].long()
        first = mask * (mask.cumsum(1) <= shorter)
        tokens = {
            "policy": leaves[f"policy_{side}_tok"],
            "reference": _double(values[f"ref_{side}_tok"]),
        }
        for owner, of in tokens.items():
            fields[f"{owner}_{side}_logps"] = (of * mask).sum(1)
            fields[f"{owner}_{side}_first_logps"] = (of * first).sum(1)
        surprise = tokens["policy"].detach() - _double(values[f"lss_{side}_tok"])
        fields[f"{side}_confidences"] = (surprise * mask).sum(1) / lengths[side]
    return PairStats(**fields), leaves


def _logit_level(values: Mapping[str, Any], case: Mapping[str, Any]) -> Any:
    """From logits, through our own ``token_values`` with the identity for a head."""
    policy = _double(values["policy_logits"], leaf=True)
    fixed = _double(values["ref_logits"])
    ids, mask = torch.tensor(values["input_ids"]), torch.tensor(values["labels"]) != -100
    rows, columns = predicting_positions(mask)
    targets, count = ids[rows, columns + 1], len(ids)
    wants = {"confidences", "kls"}
    ours = token_values(
        policy[rows, columns],
        targets,
        _identity,
        chunk=3,
        wants=wants,
        fixed=Fixed(fixed[rows, columns], _identity),
    )
    with torch.no_grad():
        theirs = token_values(fixed[rows, columns], targets, _identity)["logps"]
    lengths = mask[:, 1:].sum(1)
    drawn = _drawn(case, mask, rows, columns) if case["loss"] == "sampo" else torch.ones(len(rows))
    by_row: dict[str, Tensor] = {
        "policy_{}_logps": sum_by_row(ours["logps"], rows, count),
        "reference_{}_logps": sum_by_row(theirs, rows, count),
        "policy_{}_kls": sum_by_row(ours["kls"], rows, count),
        "{}_confidences": sum_by_row(ours["confidences"], rows, count) / lengths,
        "policy_{}_sampled_logps": sum_by_row(ours["logps"] * drawn, rows, count),
        "reference_{}_sampled_logps": sum_by_row(theirs * drawn, rows, count),
        "{}_lengths": lengths,
    }
    fields = {
        name.format(side): half
        for name, value in by_row.items()
        for side, half in zip(_SIDES, value.split(count // 2), strict=True)
    }
    return PairStats(**fields), {"policy_logits": policy}


def _drawn(case: Mapping[str, Any], mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return which tokens the source drew: all of the shorter side, those recorded of the other."""
    lengths, pairs = mask[:, 1:].sum(1), len(mask) // 2
    drawn = torch.zeros(mask[:, 1:].shape, dtype=torch.float64)
    for pair, places in enumerate(case["expect"]["extra"]["policy_draws"]):
        shorter_is_chosen = lengths[pair] < lengths[pair + pairs]
        short, long = (pair, pair + pairs) if shorter_is_chosen else (pair + pairs, pair)
        drawn[short] = 1.0
        drawn[long, places] = 1.0
    return drawn[rows, columns]


def _identity(logits: Tensor) -> Tensor:
    return logits


_SIDES = ("chosen", "rejected")
_READERS: dict[str, Callable[..., Any]] = {
    "paired": _paired,
    "unpaired": _unpaired,
    "paired_tok": _token_level,
    "paired_logits": _logit_level,
}
