"""The state of torch's random numbers, on the CPU and on every card in use."""

from __future__ import annotations

import torch
from torch import Tensor

RandomState = tuple[Tensor, list[Tensor]]


def random_state() -> RandomState:
    """Return the state; reading that of a card waits for the card."""
    on_cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), on_cards


def restore_random(state: RandomState) -> None:
    """Go back to a state."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
