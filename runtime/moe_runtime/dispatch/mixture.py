"""Which way a layer's tokens go in a step: the one place that knows all dispatchers. All ranks come to the same answer.

alone      no group: no bytes
by node    where the epoch's relay says so (moe_core.contract.dispatch.goes_by_node); under Auto, not small steps
by token   a step without gradients and of few tokens
by pick    everything else
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch

from moe_core.contract.dispatch import SMALL_STEP_TOKENS
from moe_runtime.dispatch.all_to_all import run_by_pick, run_by_token
from moe_runtime.dispatch.by_node import run_by_node
from moe_runtime.dispatch.reference import RunSlots, run_local
from moe_runtime.dispatch.step import StepContext

T = TypeVar("T")


def mix(
    x_TD: torch.Tensor,
    address_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    *,
    context: StepContext,
    run_slots: RunSlots,
    only_by_pick: bool = False,
) -> torch.Tensor:
    """[T, D] the weighted sum over each token's picks. Raises GroupFault.

    only_by_pick: K may be another one on another rank, which only this way allows.
    """
    plan, group, legs = context.plan, context.group, context.legs
    if group is None:
        return run_local(x_TD, address_TK, weight_TK, run_slots)
    tokens = context.tokens_of_position
    is_small = tokens is not None and max(tokens) <= SMALL_STEP_TOKENS and not torch.is_grad_enabled()
    by_node = context.relay is not None and not only_by_pick and not (is_small and context.hierarchy == "Auto")
    if is_small and tokens is not None and not only_by_pick and not by_node:
        return run_by_token(
            x_TD,
            address_TK,
            weight_TK,
            plan=plan,
            group=group,
            run_slots=run_slots,
            legs=legs,
            tokens_of_position=tokens,
        )
    # the same on all ranks: one with a single token, or none, makes the exchanges of both batches all the same
    overlaps = context.overlap == "TwoBatch" and not is_small
    halves = 2 if overlaps else 1
    ways = []
    for part in zip(*(torch.tensor_split(given, halves) for given in (x_TD, address_TK, weight_TK)), strict=True):
        if by_node and context.relay is not None:
            way = run_by_node(
                *part, plan=plan, group=group, relay=context.relay, run_slots=run_slots, legs=legs, overlaps=overlaps
            )
        else:
            way = run_by_pick(*part, plan=plan, group=group, run_slots=run_slots, legs=legs, overlaps=overlaps)
        ways.append(way)
    parts = in_turn(ways)
    return torch.cat(parts) if overlaps else parts[0]


def in_turn(ways: Sequence[Generator[None, None, T]]) -> list[T]:
    """What dispatchers that stop on their ways come to: while the bytes of one travel, the next goes on."""
    results: list[T | None] = [None] * len(ways)
    going = list(enumerate(ways))
    while going:
        for index, way in list(going):
            try:
                next(way)
            except StopIteration as stop:
                results[index] = stop.value
                going.remove((index, way))
    return [result for result in results if result is not None]
