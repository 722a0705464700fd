"""Hyperparameters of objectives: their defaults, their types, and the weights of unequal classes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_dpo import objectives
from lora_dpo.errors import ConfigError
from lora_dpo.objectives import OBJECTIVES

DEFAULTS = json.loads((Path(__file__).parent / "defaults.json").read_text())


def test_every_default_is_the_one_that_was_decided() -> None:
    """A changed default changes every run that relies on it: it belongs here and in the changelog.

    The table was written from the signatures: it shows a change, and is no evidence for a value. Where
    each comes from stands on the objective's page.
    """
    found = {
        name: {
            **{key: h.default for key, h in row.hyperparameters.items()},
            **({} if row.nll_weight is None else {"nll_weight": row.nll_weight}),
        }
        for name, row in OBJECTIVES.items()
    }
    assert found == DEFAULTS


RANGE = re.compile(r"[\[(]-?(?:[\d.]+|inf), (?:[\d.]+|inf)[\])]")


@pytest.mark.parametrize("row", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_number_has_the_range_that_its_page_states(row: Any) -> None:
    """What is refused is told by the signature, what is promised by the docstring."""
    stated = inspect.getdoc(row.loss).partition("Args:")[2].partition("\n\n")[0]
    paragraphs = re.split(r"^ {4}(\w+): ", stated, flags=re.MULTILINE)[1:]
    texts = dict(zip(paragraphs[::2], map(" ".join, map(str.split, paragraphs[1::2])), strict=True))
    numbers = {key: h for key, h in row.hyperparameters.items() if h.interval}
    assert {key: RANGE.findall(texts[key]) for key in numbers} == {
        key: [str(h.interval)] for key, h in numbers.items()
    }


def test_a_weight_of_the_likelihood_below_nothing_is_refused_and_nothing_is_none() -> None:
    with pytest.raises(
        ConfigError, match=r"nll_weight: got -0\.01; 'dpo' expects a number in \[0, inf\)"
    ):
        objectives.get("dpo").bind(nll_weight=-0.01)
    assert str(objectives.get("ipo").bind(nll_weight=0, beta=0.2)) == "ipo(beta=0.2)"


def test_a_number_is_a_float_however_it_is_given_and_a_switch_stays_one() -> None:
    given = objectives.get("ld_dpo").bind(beta=1, discount_reference=False).hyperparameters
    assert {key: type(value) for key, value in given.items()} == {
        "beta": float,
        "alpha": float,
        "discount_reference": bool,
    }


@pytest.mark.parametrize(("wanted", "unwanted"), [(30, 10), (10, 30), (7, 7), (1, 999)])
def test_weights_make_both_classes_weigh_the_same_and_the_larger_one_keeps_1(
    wanted: int, unwanted: int
) -> None:
    """arXiv:2402.01306, section 4.2: desirable_weight x wanted : undesirable_weight x unwanted = 1 : 1."""
    found = objectives.get("kto").bind().balanced(wanted, unwanted).hyperparameters
    ours, theirs = found["desirable_weight"], found["undesirable_weight"]
    assert ours * wanted == pytest.approx(theirs * unwanted)
    assert min(ours, theirs) == 1.0
    assert found["beta"] == DEFAULTS["kto"]["beta"]


def test_weights_stay_that_were_given_or_have_no_class_to_balance_or_do_not_exist() -> None:
    for given in ({"desirable_weight": 1.0}, {"undesirable_weight": 2.0}):
        bound = objectives.get("kto").bind(**given)
        assert bound.balanced(30, 10) is bound
    bare = objectives.get("kto").bind()
    assert bare.balanced(0, 10) is bare and bare.balanced(10, 0) is bare
    dpo = objectives.get("dpo").bind()
    assert dpo.balanced(30, 10) is dpo
