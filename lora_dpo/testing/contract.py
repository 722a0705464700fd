"""The properties that every objective must have, each a check that raises where it does not hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_dpo import objectives
from lora_dpo.errors import ConfigError
from lora_dpo.objectives import BoundObjective, Objective
from lora_dpo.stats import LABELLED_NEEDS, PAIR_NEEDS, AnyStats, LabelledStats
from lora_dpo.testing.records import make_stats, random_stats

FAR = 1e4


def check_objective(row: Objective | str) -> None:
    """Check every property of ``CONTRACT``.

    Raises:
        AssertionError: with a sentence for every property that does not hold.
    """
    row = objectives.get(row) if isinstance(row, str) else row
    problems = []
    for name, check in CONTRACT.items():
        try:
            check(row)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            problems.append(f"{row.name}: {name}: {reason}")
    if problems:
        raise AssertionError("\n".join(problems))


# ---- the properties --------------------------------------------------------------------------


def finite_everywhere(row: Objective) -> None:
    """Losses and gradients are finite at log-ratios of 1e4 nats and for certain completions."""
    policy = ([-1.0, -FAR, 0.0, -FAR, 0.0], [-FAR, -1.0, -FAR, 0.0, 0.0])
    fixed = ([-FAR, -1.0, -1.0, 0.0, 0.0], [-1.0, -FAR, 0.0, -1.0, 0.0])
    for dtype in (torch.float32, torch.float64):
        for bound in _variants(row):
            leaves = _with_leaves(make_stats(row, policy, fixed, dtype=dtype))
            losses = _losses(bound, leaves)
            losses.sum().backward()
            assert bool(losses.isfinite().all()), f"{dtype} losses {losses.tolist()}"
            for name, leaf in _leaves(leaves).items():
                finite = leaf.grad is None or bool(leaf.grad.isfinite().all())
                assert finite, f"{dtype} gradient of {name} {leaf.grad}"


def gradient_is_numerical(row: Objective) -> None:
    """The gradient is the numerical one in float64; what is detached is held fixed for it."""
    stats = _with_leaves(random_stats(row, nats=8.0))
    leaves = _leaves(stats)
    for bound in _variants(row):
        frozen = _FrozenDetach()

        def losses(*values: Tensor, b: BoundObjective = bound, f: Any = frozen) -> Tensor:
            moved = dict(zip(leaves, values, strict=True))
            with f():
                return _losses(b, type(stats)(**{**stats.present(), **moved}))

        assert torch.autograd.gradcheck(losses, tuple(leaves.values()), atol=1e-6, rtol=1e-4)


def rows_stand_alone_unless_declared(row: Objective) -> None:
    """A row's loss does not depend on the rest of the batch, exactly unless ``couples_rows``."""
    together, bound = random_stats(row), _own(row)
    alone = torch.cat([_losses(bound, _one(together, i)) for i in range(len(together))])
    equal = torch.allclose(_losses(bound, together), alone, rtol=1e-12)
    assert equal is not row.couples_rows, f"couples_rows is {row.couples_rows}"


def reference_is_read_if_declared(row: Objective) -> None:
    """Without a reference it raises exactly if ``reference`` is declared."""
    needs = frozenset(n for n in row.needs if not any("reference" in f for f in _fields(row, n)))
    stats = random_stats(row, reference=False, needs=needs)
    if row.reference:
        _raises(ValueError, "it reads no reference", _losses, _own(row), stats)
        return
    bare, full = _losses(_own(row), stats), _losses(_own(row), random_stats(row))
    assert torch.equal(bare, full), "the reference changes the losses, and is not declared"


def needs_are_the_real_ones(row: Objective) -> None:
    """A record with the declared needs is enough, and without any one of them it raises."""
    assert len(_losses(_own(row), random_stats(row))) in (6, 12)
    for need in set(row.needs) - {"lengths"}:
        stats = random_stats(row, needs=frozenset(row.needs) - {need})
        _raises(ValueError, f"need {need!r} is never read", _losses, _own(row), stats)


def lengths_are_read_if_declared(row: Objective) -> None:
    """Other lengths change losses exactly if ``logps`` is "mean" or ``lengths`` is a need."""
    stats = random_stats(row)
    longer = stats.map(
        lambda name, v: v * (3 if "chosen" in name else 2) if "lengths" in name else v
    )
    same = torch.equal(_losses(_own(row), stats), _losses(_own(row), longer))
    if row.reduction == "tokens":
        return  # a row counts by its length whatever its loss reads
    assert same is not row.reads_lengths, f"reads_lengths is {row.reads_lengths}"


def monotone_exactly_if_declared(row: Objective) -> None:
    """No loss rises with the log-prob of a chosen (wanted) answer, exactly if ``monotone``."""
    every = list(itertools.product((-1.0, -30.0, -2000.0), repeat=4))  # near, far, and beyond
    chosen, rejected, fixed_chosen, fixed_rejected = map(list, zip(*every, strict=True))
    records = [make_stats(row, (chosen, rejected), (fixed_chosen, fixed_rejected))]
    records += [random_stats(row, seed=seed) for seed in range(3)]
    rising = set().union(*(_rising(_own(row), stats) for stats in records))
    told = f"a loss rises with {', '.join(sorted(rising))}" if rising else "no loss rises"
    assert bool(rising) is not row.monotone, f"monotone is {row.monotone}, and {told}"


def _rising(bound: BoundObjective, stats: AnyStats) -> set[str]:
    """Return the log-probs of chosen (wanted) answers, or of what is not, that pull the wrong way."""
    leaves = _with_leaves(stats)
    _losses(bound, leaves).sum().backward()
    found = set()
    for name, leaf in _leaves(leaves).items():
        if leaf.grad is None or not name.endswith("logps"):
            continue
        if isinstance(leaves, LabelledStats):
            signs = torch.where(leaves.labels, leaf.grad, -leaf.grad)
        elif "chosen" in name:
            signs = leaf.grad
        else:
            continue
        if bool((signs > 0).any()):
            found.add(name)
    return found


def fits_where_policy_equals_reference(row: Objective) -> None:
    """Value and gradient are finite where the policy equals the reference.

    If its rewards are 0 there, its losses do not depend on the log-probs themselves.
    """
    stats = _with_leaves(random_stats(row).at_reference())
    losses = _losses(_own(row), stats)
    losses.sum().backward()
    assert bool(losses.isfinite().all()), f"losses {losses.tolist()}"
    gradients = [leaf.grad for leaf in _leaves(stats).values() if leaf.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients), "gradient is not finite"
    rewards = row.bind().rewards(stats)
    if row.reference and all(bool((reward == 0).all()) for reward in rewards):
        others = _losses(_own(row), random_stats(row, seed=1).at_reference())
        torch.testing.assert_close(losses.detach(), others, rtol=1e-12, atol=1e-12)


def grows_as_declared(row: Objective) -> None:
    """As the chosen log-prob of one row of two falls without end, the mean loss grows as declared."""

    def at(fall: float) -> float:
        unwanted = [0.0, 0.0] if row.data == "paired" else []
        stats = make_stats(row, ([-fall, 0.0], unwanted), ([0.0, 0.0], unwanted))
        return float(_losses(_own(row), stats).mean())

    if row.extremes == "exponential":
        first, second = (math.log(at(b)) - math.log(at(a)) for a, b in ((200, 300), (300, 400)))
        assert first > 1 and abs(second / first - 1) < 0.05, f"log grows by {first}, then {second}"
        return
    first, second = at(2e6) - at(1e6), at(4e6) - at(2e6)
    if row.extremes == "bounded":
        assert abs(second) < 1e-6, f"grows by {second}"
        return
    expected = {"linear": 2.0, "quadratic": 4.0, "logarithmic": 1.0}[row.extremes]
    assert abs(second / first / expected - 1) < 1e-2, f"grows by {first}, then by {second}"


def float32_agrees_with_float64(row: Objective) -> None:
    """Losses in float32 are those of float64 to 1e-5."""
    exact = _losses(_own(row), random_stats(row))
    rough = _losses(_own(row), random_stats(row, dtype=torch.float32))
    assert rough.dtype == torch.float32, f"float32 statistics give {rough.dtype} losses"
    torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=1e-5)


def half_precision_is_refused(row: Objective) -> None:
    """Statistics of bfloat16 and float16 raise."""
    for dtype in (torch.bfloat16, torch.float16):
        _raises(TypeError, f"{dtype} is accepted", random_stats, row, dtype=dtype)


def rewards_rise_with_log_probs(row: Objective) -> None:
    """Rewards are one value a row and side, and never fall with the row's own log-prob."""
    stats = _with_leaves(random_stats(row))
    rewards = row.bind().rewards(stats)
    names = ["policy_chosen_logps", "policy_rejected_logps"][: len(rewards)]
    expected = 2 if row.data == "paired" else 1
    assert len(rewards) == expected, f"{len(rewards)} rewards for {row.data} rows"
    leaves = _leaves(stats)
    for name, reward in zip(names, rewards, strict=True):
        assert reward.shape == (len(stats),), f"rewards of shape {tuple(reward.shape)}"
        leaf = leaves[name if row.data == "paired" else "policy_logps"]
        (gradient,) = torch.autograd.grad(reward.sum(), leaf, retain_graph=True, allow_unused=True)
        assert gradient is None or bool((gradient >= 0).all()), f"a reward falls with {name}"


def hyperparameters_are_checked(row: Objective) -> None:
    """Foreign hyperparameters, values outside their interval and of another type are refused."""
    _raises(ConfigError, "a foreign hyperparameter is accepted", row.bind, certainly_not=1.0)
    for known in row.hyperparameters.values():
        outside: list[Any] = ["a", None, math.nan]
        interval = known.interval
        if interval is None:
            outside.append(1.0)
        else:
            outside += [True] + [
                e for e in (interval.above - 1, interval.below + 1) if math.isfinite(e)
            ]
        for value in outside:
            _raises(
                ConfigError,
                f"{known.name}={value!r} is accepted",
                row.bind,
                **{known.name: value},
            )


def state_is_remembered_apart(row: Objective) -> None:
    """``update`` returns the same keys with finite numbers, and changes nothing that it is given."""
    bound, stats = row.bind(), random_stats(row)
    before = bound.initial_states()
    copy = {name: dict(state) for name, state in before.items()}
    after = bound.updated(before, stats)
    assert before == copy, "update changed the state that it was given"
    for name, state in after.items():
        assert set(state) == set(before[name]), f"update returns the keys {sorted(state)}"
        finite = all(math.isfinite(value) for value in state.values())
        assert finite, f"update returns {dict(state)}"


def documented(row: Objective) -> None:
    """The docstring has Args, Returns, Limits and Source, each hyperparameter, and the paper."""
    for part in ("Args:", "Returns:", "Limits:", "Source:"):
        assert part in row.documentation, f"the docstring has no {part}"
    assert row.arxiv in row.documentation, f"the docstring does not name arXiv:{row.arxiv}"
    for name in row.hyperparameters:
        assert f"{name}:" in row.documentation, f"the docstring does not explain {name}"


CONTRACT: Mapping[str, Callable[[Objective], None]] = {
    check.__name__: check
    for check in (
        finite_everywhere,
        gradient_is_numerical,
        rows_stand_alone_unless_declared,
        reference_is_read_if_declared,
        needs_are_the_real_ones,
        lengths_are_read_if_declared,
        monotone_exactly_if_declared,
        fits_where_policy_equals_reference,
        grows_as_declared,
        float32_agrees_with_float64,
        half_precision_is_refused,
        rewards_rise_with_log_probs,
        hyperparameters_are_checked,
        state_is_remembered_apart,
        documented,
    )
}


# ---- tools -----------------------------------------------------------------------------------


def _losses(bound: BoundObjective, stats: AnyStats) -> Tensor:
    """Return the losses of the objective alone, with the same draws each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return bound(stats)


def _own(row: Objective) -> BoundObjective:
    """Return the objective with its defaults, without an SFT term beside it."""
    return row.bind(nll_weight=0.0) if row.nll_weight else row.bind()


def _variants(row: Objective) -> list[BoundObjective]:
    """Return the objective with its defaults, with label smoothing, and with switches turned."""
    given: list[dict[str, Any]] = [{}]
    if "label_smoothing" in row.hyperparameters:
        given.append({"label_smoothing": 0.2})
    given += [
        {name: not known.default}
        for name, known in row.hyperparameters.items()
        if known.interval is None
    ]
    return [row.bind(**values) for values in given]


def _moves(name: str) -> bool:
    return name.startswith("policy_") and "mismatched" not in name


def _with_leaves(stats: AnyStats) -> AnyStats:
    return stats.map(lambda name, v: v.clone().requires_grad_() if _moves(name) else v)


def _leaves(stats: AnyStats) -> dict[str, Tensor]:
    return {name: value for name, value in stats.present().items() if _moves(name)}


def _one(stats: AnyStats, i: int) -> AnyStats:
    return stats.map(lambda _, value: value[i : i + 1])


def _fields(row: Objective, need: str) -> tuple[str, ...]:
    return (PAIR_NEEDS if row.data == "paired" else LABELLED_NEEDS)[need]


def _raises(
    kind: type[Exception], otherwise: str, action: Callable[..., object], *given: Any, **named: Any
) -> None:
    try:
        action(*given, **named)
    except kind:
        return
    raise AssertionError(otherwise)


class _FrozenDetach:
    """Makes ``Tensor.detach`` give what it gave in the first run, so that it is a constant."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        original = torch.Tensor.detach
        first, number = not self._kept, 0

        def detach(tensor: Tensor) -> Tensor:
            nonlocal number
            if first:
                self._kept.append(original(tensor).clone())
            number += 1
            return self._kept[number - 1]

        torch.Tensor.detach = detach  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.Tensor.detach = original
