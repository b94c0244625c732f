"""A routing trace played through ways of assigning experts: what each would have made of it, window by window.

A plan is made from one window's load and judged by the next one's, as it is in life. The first window only teaches.

    linear     the map without any load, never changed
    deepseek   EPLB's plan anew for every window (its slots must be equal on all ranks)
    fresh      our best plan anew for every window
    replan     from the map there is, as far as its moves pay
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.align import arrivals, slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.assign import assign
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.measure import balance
from moe_core.experts.replan import Prices, Rows, replan
from moe_core.outcome import InvalidInput

Held = tuple[Rows, Rows]
"""logical_of_slot and share_of_slot."""
Way = Callable[[FloatArray, Held], Held]
"""(load of the last window, what there is) -> what the next one is to meet."""
WAYS = ("linear", "deepseek", "fresh", "replan")


@dataclass(frozen=True, slots=True)
class Replayed:
    """balancedness and moves for every window but the first; `slots` of one map over all layers."""

    way: str
    balancedness: tuple[float, ...]
    moves: tuple[int, ...]
    slots: int

    @property
    def mean(self) -> float:
        return sum(self.balancedness) / len(self.balancedness)

    @property
    def moved_share(self) -> float:
        """Slots that change in a window, of all."""
        return sum(self.moves) / len(self.moves) / self.slots


def replay(load_WLE: FloatArray, slots_of_rank: Sequence[int], way: str, *, prices: Prices | None = None) -> Replayed:
    """`load_WLE` [windows, layers, experts]. Raises InvalidInput for fewer than two windows or an unknown way."""
    if way not in WAYS:
        raise InvalidInput(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    if len(load_WLE) < 2:
        raise InvalidInput(f"the trace must have at least two windows, got {len(load_WLE)}")
    _, num_layers, num_experts = load_WLE.shape
    fleet = Fleet(tuple(slots_of_rank))
    plain = assign("linear", num_layers=num_layers, num_logical_experts=num_experts, slots_of_rank=slots_of_rank)
    next_held = _way(way, fleet, prices or Prices())
    held: Held = (plain.logical_of_slot, ())
    balances, moves = [], []
    for last, coming in pairwise(load_WLE):
        before = slots_on_ranks(held[0], fleet, num_experts=num_experts)
        held = next_held(last, held)
        after = slots_on_ranks(held[0], fleet, num_experts=num_experts)
        moves.append(int(arrivals(before, after, num_experts).sum()))
        expert_map = ExpertMap(
            generation=0,
            num_logical_experts=num_experts,
            slots_of_rank=fleet.slots_of_rank,
            logical_of_slot=held[0],
            share_of_slot=held[1],
        )
        balances.append(balance(expert_map, coming).balancedness)
    return Replayed(way, tuple(balances), tuple(moves), fleet.num_slots * num_layers)


def _way(name: str, fleet: Fleet, prices: Prices) -> Way:
    match name:
        case "linear":
            return lambda _, held: held
        case "deepseek":
            return partial(_deepseek, fleet)
        case "fresh":
            return partial(_fresh, fleet)
    return partial(_replan, fleet, prices)


def _deepseek(fleet: Fleet, load_LE: FloatArray, _held: Held) -> Held:
    num_layers, num_experts = load_LE.shape
    planned = assign(
        "deepseek",
        num_layers=num_layers,
        num_logical_experts=num_experts,
        slots_of_rank=fleet.slots_of_rank,
        load=load_LE,
    )
    return planned.logical_of_slot, ()


def _fresh(fleet: Fleet, load_LE: FloatArray, _held: Held) -> Held:
    return pack_anew(load_LE, fleet).rows(), ()


def _replan(fleet: Fleet, prices: Prices, load_LE: FloatArray, held: Held) -> Held:
    found = replan(load_LE, fleet, held[0], prices=prices, current_shares=held[1])
    return found.logical_of_slot, found.share_of_slot
