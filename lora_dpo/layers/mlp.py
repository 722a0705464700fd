"""A gated MLP with LoRA on its projections as one function that keeps its input, gate and up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.layers.linear import Part, obstacle, part_of, shaped_as
from lora_dpo.layers.work import Work

# What makes gate and up, one projection for each or one for both, and what the activation is called.
_GATES = ((("gate_proj", "up_proj"), "act_fn"), (("gate_up_proj",), "activation_fn"))
_LAST = "down_proj"
_ROWS = 2048  # tokens of a tile where weights wait: enough for products at their full rate
_FEW = 512  # tokens whose activation is differentiated at one time

Activation = Callable[[Tensor], Tensor]
Parts = Sequence[Part]  # gate, up and down, or gate with up and down


class _GatedMlp(torch.autograd.Function):
    """Runs in tiles of tokens, so that what is as wide as the MLP is not as long as the batch.

    Where the last projection is left out of a recomputation, nothing is computed before backward: gate
    and up are made there, tile by tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Activation,
        parts: Parts,
        keeps: bool,
        *factors: Tensor | None,
    ) -> Tensor:
        gating, last = parts[0], parts[-1]
        ctx.parts, ctx.activation, ctx.shape, ctx.of = parts, activation, x.shape, x.dtype
        ctx.dtype = gating.dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        kept: list[Tensor] = []
        if last.work.recomputing and last.work.skips_last:
            # Nothing in the layer's backward reads this value. Should a model do so all the same,
            # it reads no numbers, and the proof before training sees that.
            y = flat.new_full((len(flat), last.base.out_features), torch.nan)
        else:
            y, kept = _forward(parts, activation, flat, keeps=keeps)
        ctx.save_for_backward(flat, *kept)
        return shaped_as(x, y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        flat, *kept = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1]).to(ctx.dtype)
        of_x: list[Tensor] = []
        factors: list[Tensor | None] = []
        with _tiles(flat, ctx.parts) as tiles:
            for rows in tiles:
                here = [value[rows] for value in kept]
                found, of_rows = _backward(ctx, flat[rows], here, g[rows])
                factors = _added(factors, found)
                of_x += of_rows
        whole = torch.cat(of_x) if len(of_x) > 1 else of_x[0] if of_x else None
        return (
            None if whole is None else whole.view(ctx.shape).to(ctx.of),
            None,
            None,
            None,
            *factors,
        )


def _backward(
    ctx: Any, x: Tensor, kept: list[Tensor], g: Tensor
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Return the gradients of all factors, and that of the input where it is wanted, of one tile."""
    *makers, last = ctx.parts
    gate, up = _made(makers, x, kept)
    kept.clear()
    active = ctx.activation(gate)
    of_last = last.gradients(active * up, g)
    of_hidden = last.backward(g)
    of_up = active * of_hidden if active is gate else active.mul_(of_hidden)
    of_gate = of_hidden.mul_(up)
    del active, up
    of_gate = _through(ctx.activation, gate, of_gate)
    del gate
    of_made = [of_gate, of_up] if len(makers) > 1 else [torch.cat([of_gate, of_up], dim=-1)]
    del of_gate, of_up
    found: list[Tensor | None] = []
    of_x: Tensor | None = None
    for part, of_part in zip(makers, of_made, strict=True):
        found += part.gradients(x, of_part)
        of_x = part.backward(of_part, into=of_x) if ctx.needs_input_grad[0] else None
    return [*found, *of_last], [] if of_x is None else [of_x]


def _made(makers: Parts, x: Tensor, kept: Sequence[Tensor]) -> Iterator[Tensor]:
    """Return gate, and then up, which is not made before it is asked for where it can be made alone."""
    if len(makers) == 1:
        yield from (kept[0] if kept else makers[0].forward(x)).chunk(2, dim=-1)
        return
    for place, part in enumerate(makers):
        yield kept[place] if kept else part.forward(x)


def tile(*, keeps_weights: bool) -> int:
    """Return the tokens of a tile: more where weights may not wait, and are made plain for each."""
    return _ROWS if keeps_weights else 2 * _ROWS


@contextmanager
def _tiles(flat: Tensor, parts: Parts) -> Iterator[list[slice]]:
    """Cut tokens into tiles; where there are several, plain weights wait for the next one if they may."""
    work = parts[0].work
    rows = tile(keeps_weights=work.keeps_weights)
    tiles = [slice(start, start + rows) for start in range(0, max(len(flat), 1), rows)]
    with work.keeping_weights() if len(tiles) > 1 else nullcontext():
        yield tiles


def _forward(
    parts: Parts, activation: Activation, flat: Tensor, *, keeps: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the MLP's output, ``[tokens, outputs]``, and gate and up where they are kept."""
    *makers, last = parts
    kept = [part.forward(flat) for part in makers] if keeps else []
    found = []
    with _tiles(flat, parts) as tiles:
        for rows in tiles:
            made = _made(makers, flat[rows], [value[rows] for value in kept])
            gate = next(made)
            active = activation(gate)
            owned = active is not gate
            del gate
            up = next(made)
            active = active.mul_(up) if owned else active * up
            del up, made
            found.append(last.forward(active))
            del active
    return torch.cat(found) if len(found) > 1 else found[0], kept


def _added(ours: list[Tensor | None], further: list[Tensor | None]) -> list[Tensor | None]:
    """Add what another tile found to what those before it did, in place."""
    if not ours:
        return further
    return [a if a is None or b is None else a.add_(b) for a, b in zip(ours, further, strict=True)]


def _through(activation: Activation, x: Tensor, g: Tensor) -> Tensor:
    """Turn the gradient of an activation's output, in its place, into that of its input."""
    for rows, of_rows in zip(x.split(_FEW), g.split(_FEW), strict=True):
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            active = activation(leaf)
        of_rows.copy_(torch.autograd.grad(active, leaf, of_rows)[0])
    return g


def gated_mlp(module: Any, work: Work, original: Any, x: Tensor) -> Tensor:
    """Return the MLP's output; outside a batch of ours, by the library's own forward."""
    if not work.running:
        out: Tensor = original(x)
        return out
    makers, activation = next(found for found in _GATES if hasattr(module, found[0][0]))
    parts = [part_of(getattr(module, name), work) for name in (*makers, _LAST)]
    factors = [factor for part in parts for factor in (part.down, part.up)]
    keeps = torch.is_grad_enabled()  # inside of a function it never is
    y: Tensor = _GatedMlp.apply(x, getattr(module, activation), parts, keeps, *factors)  # type: ignore[no-untyped-call]
    return y


def is_gated(module: nn.Module) -> bool:
    """Whether a module is ``down(act(gate(x)) * up(x))`` on layers that we can run."""
    return any(_runs(module, (*makers, _LAST), activation) for makers, activation in _GATES)


def _runs(module: nn.Module, names: Sequence[str], activation: str) -> bool:
    parts = [getattr(module, name, None) for name in names]
    if any(part is None or obstacle(part) for part in parts):
        return False
    children = {name for name, _ in module.named_children()}
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return (
        callable(getattr(module, activation, None))
        and not hooked
        and children <= {*names, activation}
    )


def take_mlp(module: Any, work: Work) -> None:
    """Put our forward on one MLP."""
    module.forward = partial(gated_mlp, module, work, module.forward)
