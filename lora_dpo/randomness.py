"""The state of torch's random numbers, on the CPU and on the card in use.

Other cards belong to other processes: only to look at them takes memory there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def random_state() -> RandomState:
    """Return the state; reading that of a card waits for the card."""
    on_card = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), on_card


def restore_random(state: RandomState) -> None:
    """Go back to a state."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def forked(enabled: bool = True) -> AbstractContextManager[None]:
    """Leave random numbers behind the block as they were before it."""
    cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(cards, enabled=enabled)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw inside the block from random numbers of its own, and leave the others alone."""
    with forked():
        torch.manual_seed(seed)
        yield
