"""Layers that wait in the memory of the CPU in place of being computed again: the plan of that.

It pays where a card computes slower than its link moves bytes. How fast both are is known of few cards, and
never of the machine around them, so training times it and takes what is faster.
"""

from __future__ import annotations

from dataclasses import replace

from lora_dpo.planning.plans import Plan, seconds_floor


def moved_instead(plan: Plan, most: int | None = None) -> Plan | None:
    """Return the plan with as few layers recomputed as can be, where others wait in the CPU's memory.

    Args:
        plan: the plan in which none waits.
        most: bytes of the CPU's memory that may be taken; any amount if left out.

    Returns:
        None where no layer is recomputed that could wait, on the library's layers, without a card, where
        it is not wanted, and where the floor of the time says that it cannot be faster.
    """
    if plan.card is None or plan.room is None or not plan.fits or plan.offloaded or plan.moved:
        return None
    if not (plan.offloads and plan.recompute and plan.setting.fast):
        return None
    limit = plan.bytes.layers * plan.bytes.kept if most is None else most
    found = plan.bytes.fewest_moved(plan.room, limit, plan.recomputed)
    if found is None:
        return None
    recomputed, moved = found
    other = replace(plan, recomputed=recomputed, moved=moved)
    other = replace(other, seconds=seconds_floor(other))
    if plan.seconds is not None and other.seconds is not None and other.seconds >= plan.seconds:
        return None
    return other
