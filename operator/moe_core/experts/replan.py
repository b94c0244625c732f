"""The next assignment: stay, improve what is there, or start anew, whichever wins most by the clock.

Everything is weighed in seconds over the horizon, the time for which the load that was measured is believed to last:

    step_s    a step is as slow as its slowest rank: per layer the largest load of a rank x seconds_per_pick
    moved_s   bytes that go to other ranks / bytes_per_s

A plan is taken per layer, and only as far as it pays: of all layouts on the way from the current one (improve.py) and
the best from scratch (pack.py), brought near to the current one, the one with the largest gain less cost. Where the
moves of all layers exceed the budget, the price of a move is raised until they do not. The result says both numbers
and, where it stays, why.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_core.experts.align import align, arrivals, copies_in, keep_places, slots_on_ranks
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.improve import improve
from moe_core.experts.pack import pack_anew
from moe_core.experts.shelf import Shelf, rows_of
from moe_core.outcome import InvalidInput

Rows = tuple[tuple[int, ...], ...]
"""logical_of_slot of an ExpertMap: [L][slots]."""
_STEPS = 48
"""Improving steps per layer before starting anew is the better way."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a plan weighs. All times in seconds, sizes in bytes.

    seconds_per_pick: time of one token at one expert on a rank of speed 1; horizon: how many windows like the measured
    one are expected; bytes_per_s: what one rank can receive while it works; most_moves: budget over all layers, None
    for no bound.
    """

    seconds_per_pick: float = 1e-6
    bytes_per_expert: int = 0
    bytes_per_s: float = 1e9
    horizon: float = 10.0
    most_moves: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds_per_pick", "bytes_per_s", "horizon"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise InvalidInput(f"{name} must be positive and finite, got {value}")
        if self.bytes_per_expert < 0:
            raise InvalidInput(f"bytes_per_expert must not be negative, got {self.bytes_per_expert}")
        if self.most_moves is not None and self.most_moves < 0:
            raise InvalidInput(f"most_moves must not be negative, got {self.most_moves}")


@dataclass(frozen=True, slots=True)
class Replan:
    """logical_of_slot [L][slots], as in an ExpertMap; worst_before and worst_after [L] are loads of the heaviest rank.

    moves counts experts that a rank has to be sent; gain_s is over the horizon, cost_s once.
    """

    logical_of_slot: Rows
    moves: int
    worst_before: tuple[float, ...]
    worst_after: tuple[float, ...]
    gain_s: float
    cost_s: float
    reason: str

    @property
    def payback(self) -> float:
        """Share of the horizon after which the gain has paid for the moves; 0 without moves, inf without gain."""
        if self.cost_s == 0:
            return 0.0
        return self.cost_s / self.gain_s if self.gain_s > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class _Choices:
    """Per layer the layouts to choose among; K of them, the first is to stay."""

    layouts: Sequence[IntArray]
    worst_KL: FloatArray
    moves_KL: IntArray

    def best(self, price_s: float, second_per_load: float) -> IntArray:
        """[L] the choice with the largest gain less cost; of equals the earliest, which moves least."""
        value_KL = (self.worst_KL[0] - self.worst_KL) * second_per_load - self.moves_KL * price_s
        return np.asarray(value_KL.argmax(0))


def replan(
    load_LE: FloatArray, fleet: Fleet, current: Sequence[Sequence[int]], *, prices: Prices, least_copies: int = 1
) -> Replan:
    """The assignment to go on with. `current` [L][slots] must hold every expert; slots of ranks that are gone (none in
    `fleet`) are not in it. Raises InvalidInput.
    """
    start_LRS = slots_on_ranks(current, fleet, num_experts=load_LE.shape[1])
    copies_LE = copies_in(start_LRS, load_LE.shape[1])
    if not copies_LE.all():
        layer, expert = (int(i) for i in np.argwhere(copies_LE == 0)[0])
        raise InvalidInput(f"current[{layer}] must hold every expert, expert {expert} is in no slot")
    shelf = Shelf.of(load_LE, copies_LE, fleet, start_LRS.copy())
    path = improve(load_LE, shelf, most_steps=_STEPS)
    anew = _anew(load_LE, fleet, start_LRS, least_copies)
    layouts = [*path.layouts, anew.logical_LRS]
    choices = _Choices(
        layouts=layouts,
        worst_KL=np.concatenate([path.worst_KL, anew.load_LR.max(1)[None]]),
        moves_KL=np.stack([arrivals(start_LRS, layout, load_LE.shape[1]).sum((1, 2)) for layout in layouts]),
    )
    second_per_load = prices.seconds_per_pick * prices.horizon
    price_s = prices.bytes_per_expert / prices.bytes_per_s
    chosen_L = _within(choices, price_s, second_per_load, prices.most_moves)
    return _replan(choices, chosen_L, fleet, load_LE.shape[1], price_s=price_s, second_per_load=second_per_load)


def _within(choices: _Choices, price_s: float, second_per_load: float, most: int | None) -> IntArray:
    """The best choices whose moves fit the budget: a dearer move makes every layer choose fewer of them."""
    layers = np.arange(choices.worst_KL.shape[1])

    def moves(chosen_L: IntArray) -> int:
        return int(choices.moves_KL[chosen_L, layers].sum())

    best_L = choices.best(price_s, second_per_load)
    if most is None or moves(best_L) <= most:
        return best_L
    low, high = price_s, max(float(choices.worst_KL[0].max()) * second_per_load, price_s) * 2 + 1e-12
    for _ in range(50):
        middle = (low + high) / 2
        if moves(choices.best(middle, second_per_load)) <= most:
            high = middle
        else:
            low = middle
    return choices.best(high, second_per_load)


def _anew(load_LE: FloatArray, fleet: Fleet, start_LRS: IntArray, least_copies: int) -> Shelf:
    shelf = pack_anew(load_LE, fleet, least_copies=least_copies)
    aligned = align(shelf.logical_LRS, start_LRS, fleet, load_LE.shape[1])
    return Shelf.of(load_LE, shelf.copies_LE, fleet, aligned)


def _replan(
    choices: _Choices, chosen_L: IntArray, fleet: Fleet, num_experts: int, *, price_s: float, second_per_load: float
) -> Replan:
    layers = np.arange(len(chosen_L))
    slots = np.stack([choices.layouts[k][layer] for layer, k in enumerate(chosen_L)])
    moves = int(choices.moves_KL[chosen_L, layers].sum())
    before, after = choices.worst_KL[0], choices.worst_KL[chosen_L, layers]
    best_s = float((before - choices.worst_KL.min(0)).sum()) * second_per_load
    gain_s, cost_s = float((before - after).sum()) * second_per_load, moves * price_s
    kept = keep_places(slots, choices.layouts[0], num_experts)
    return Replan(
        logical_of_slot=rows_of(kept, fleet, num_experts),
        moves=moves,
        worst_before=tuple(before.tolist()),
        worst_after=tuple(after.tolist()),
        gain_s=gain_s,
        cost_s=cost_s,
        reason=_reason(moves, gain_s, cost_s, best_s),
    )


def _reason(moves: int, gain_s: float, cost_s: float, best_s: float) -> str:
    if moves:
        return f"{moves} moves cost {cost_s:.3g} s and save {gain_s:.3g} s over the horizon"
    if best_s <= 0:
        return "stays: no other assignment is more even"
    return f"stays: the most even assignment saves {best_s:.3g} s over the horizon, less than its moves cost"
