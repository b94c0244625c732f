"""How the copies of an expert divide its tokens: unevenly, so that the heaviest rank carries as little as it can.

A copy on a rank that has much else to do gets less, and no expert moves for it. The copies of one expert join their
ranks into one vessel, further copies join vessels: the best split levels each as far as its copies can carry the load.

Of all splits the one with the least sum of (rank load squared / speed) is sought, which has the least largest load
too: by projected gradient steps with Nesterov's momentum, all experts of all layers at once. After 20 rounds the
largest load is within 2e-4 of what linear programming finds, after 60 within 1e-6.

A map has whole parts. Every copy has at least one, so that those that live can always divide the rest. Shapes as in
shelf.py; share_LRS sums to 1 over an expert's copies and is 0 in empty slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.shelf import BoolArray
from moe_core.outcome import InvalidInput

SHARE_PARTS = 27720
"""Divides by 1 to 12. A part of the hottest of 256 experts, Zipf, is 0.02 % of what each of 32 ranks carries."""
ROUNDS = 40
_SETTLED = 1e-6


@dataclass(frozen=True, slots=True)
class _Copies:
    """Some slots that hold an expert, an expert's next to each other; C of them, P pairs of layer and expert.

    flat_C: place in an array [L, R, S]; rank_C: place in [L, R]; pair_C: place in [P]; first_P: place in [C].
    """

    flat_C: IntArray
    rank_C: IntArray
    pair_C: IntArray
    first_P: IntArray
    layer_P: IntArray
    logical_P: IntArray

    @classmethod
    def of(cls, logical_LRS: IntArray, chosen_LRS: BoolArray) -> Self:
        _, num_ranks, width = logical_LRS.shape
        flat = np.flatnonzero(chosen_LRS)
        logical = logical_LRS.reshape(-1)[flat]
        key = flat // (num_ranks * width) * (int(logical_LRS.max(initial=0)) + 1) + logical
        order = np.argsort(key, kind="stable")
        flat, key, logical = flat[order], key[order], logical[order]
        is_first = np.diff(key, prepend=-1) != 0
        first = np.flatnonzero(is_first)
        layer = flat[first] // (num_ranks * width)
        return cls(flat, flat // width, is_first.cumsum() - 1, first, layer, logical[first])

    def sum_P(self, values_C: FloatArray | IntArray) -> FloatArray:
        return np.add.reduceat(values_C, self.first_P) if len(self.first_P) else np.zeros(0)


def even_shares(logical_LRS: IntArray, num_experts: int) -> FloatArray:
    """[L, R, S] every copy the same."""
    return shares_of(np.ones(logical_LRS.shape), logical_LRS, num_experts)


def shares_of(weight_LRS: FloatArray | IntArray, logical_LRS: IntArray, num_experts: int) -> FloatArray:
    """[L, R, S] in proportion to any weights of the copies; evenly for an expert whose copies all have none."""
    width = num_experts + 2
    key_LRS = logical_LRS + np.arange(len(logical_LRS))[:, None, None] * width
    keys, size = key_LRS.reshape(-1), len(logical_LRS) * width
    total = np.bincount(keys, weight_LRS.reshape(-1), minlength=size)
    count = np.bincount(keys, minlength=size)
    total_LRS, is_filled_LRS = total[key_LRS], logical_LRS < num_experts
    share_LRS = np.where(total_LRS > 0, weight_LRS, 1.0) / np.where(total_LRS > 0, total_LRS, count[key_LRS])
    return np.where(is_filled_LRS, share_LRS, 0.0)


def load_in_slots(load_LE: FloatArray, logical_LRS: IntArray) -> FloatArray:
    """[L, R, S] the whole load of the expert in each slot."""
    load_LX = np.concatenate([load_LE, np.zeros((len(load_LE), 2))], axis=1)
    return np.take_along_axis(load_LX[:, None, :], logical_LRS, axis=2)


def level_of_ranks(load_LE: FloatArray, logical_LRS: IntArray, share_LRS: FloatArray, fleet: Fleet) -> FloatArray:
    """[L, R] load over speed."""
    return np.asarray((load_in_slots(load_LE, logical_LRS) * share_LRS).sum(2) / fleet.speed_R)


def best_shares(
    load_LE: FloatArray,
    logical_LRS: IntArray,
    fleet: Fleet,
    *,
    rounds: int = ROUNDS,
    start_LRS: FloatArray | None = None,
) -> FloatArray:
    """[L, R, S] of the rounds the best; an expert without load evenly. start_LRS: any weights to begin from."""
    even_LRS = even_shares(logical_LRS, load_LE.shape[1])
    found = even_LRS if start_LRS is None else shares_of(start_LRS, logical_LRS, load_LE.shape[1])
    load_LRS = load_in_slots(load_LE, logical_LRS)
    copies = _Copies.of(logical_LRS, (even_LRS < 1) & (load_LRS > 0))
    if len(copies.flat_C):
        load_C = load_LRS.reshape(-1)[copies.flat_C]
        found.reshape(-1)[copies.flat_C] = _level(copies, found * load_LRS, load_C, fleet, rounds) / load_C
    return found


def _level(copies: _Copies, amount_LRS: FloatArray, load_C: FloatArray, fleet: Fleet, rounds: int) -> FloatArray:
    """[C] what each copy gets, of the rounds the best. A step is as long as a rank's copies allow together."""
    num_layers, num_ranks = amount_LRS.shape[:2]
    speed_N = np.tile(fleet.speed_R, num_layers)  # N ranks of all layers
    load_P = load_C[copies.first_P]
    layer_C = copies.rank_C // num_ranks
    now_C = amount_LRS.reshape(-1)[copies.flat_C]
    fixed_N = amount_LRS.sum(2).reshape(-1) - np.bincount(copies.rank_C, now_C, minlength=len(speed_N))
    step_C = (speed_N / np.maximum(np.bincount(copies.rank_C, minlength=len(speed_N)), 1))[copies.rank_C]

    def level_N(amount_C: FloatArray) -> FloatArray:
        return np.asarray((fixed_N + np.bincount(copies.rank_C, amount_C, minlength=len(speed_N))) / speed_N)

    best_C, ahead_C, inertia_L = now_C, now_C, np.ones(num_layers)
    least_L = level_N(now_C).reshape(num_layers, num_ranks).max(1)
    for _ in range(rounds):
        next_C = _poured(copies, ahead_C - step_C * level_N(ahead_C)[copies.rank_C], step_C, load_P)
        worst_L = level_N(next_C).reshape(num_layers, num_ranks).max(1)
        best_C = np.where((worst_L < least_L)[layer_C], next_C, best_C)
        least_L = np.minimum(worst_L, least_L)
        overshot_L = np.bincount(layer_C, (ahead_C - next_C) * (next_C - now_C) / step_C, minlength=num_layers) > 0
        inertia_L = np.where(overshot_L, 1.0, inertia_L)
        next_inertia_L = (1 + np.sqrt(1 + 4 * inertia_L**2)) / 2
        ahead_C = next_C + ((inertia_L - 1) / next_inertia_L)[layer_C] * (next_C - now_C)
        has_settled = (np.abs(next_C - now_C) <= _SETTLED * load_C).all()
        now_C, inertia_L = next_C, next_inertia_L
        if has_settled:
            break
    return best_C


def _poured(copies: _Copies, wish_C: FloatArray, step_C: FloatArray, load_P: FloatArray) -> FloatArray:
    """The amounts nearest to `wish_C` that are not negative and sum to each expert's load (Michelot's algorithm)."""
    is_open_C = np.ones(len(wish_C), dtype=bool)
    while True:
        surplus_P = copies.sum_P(np.where(is_open_C, wish_C, 0.0)) - load_P
        amount_C = wish_C - (surplus_P / copies.sum_P(np.where(is_open_C, step_C, 0.0)))[copies.pair_C] * step_C
        stays_C = is_open_C & (amount_C > 0)
        if (stays_C == is_open_C).all():
            return np.where(is_open_C, amount_C, 0.0)
        is_open_C = stays_C


def whole_parts(share_LRS: FloatArray, logical_LRS: IntArray, num_experts: int) -> IntArray:
    """[L, R, S] parts of SHARE_PARTS, largest remainders first; 1 for an only copy, 0 where empty."""
    found = (logical_LRS < num_experts).astype(np.int64)
    copies = _Copies.of(logical_LRS, (found > 0) & (even_shares(logical_LRS, num_experts) < 1))
    if len(copies.flat_C) == 0:
        return found
    spare_P = SHARE_PARTS - copies.sum_P(np.ones(len(copies.flat_C), dtype=np.int64))  # one is each copy's own
    exact_C = share_LRS.reshape(-1)[copies.flat_C] * spare_P[copies.pair_C]
    part_C = np.floor(exact_C + 1e-6).astype(np.int64)
    rest_P = spare_P - copies.sum_P(part_C)
    by_remainder = np.lexsort((part_C - exact_C, copies.pair_C))
    place_C = np.empty_like(part_C)
    place_C[by_remainder] = np.arange(len(part_C)) - copies.first_P[copies.pair_C]
    found.reshape(-1)[copies.flat_C] = part_C + 1 + (place_C < rest_P[copies.pair_C])
    return found


def vessels(logical_LRS: IntArray, amount_LRS: FloatArray) -> IntArray:
    """[L, R] the lowest rank that each rank is joined with by copies that carry something."""
    num_layers, num_ranks, _ = logical_LRS.shape
    copies = _Copies.of(logical_LRS, amount_LRS > 0)
    found = np.tile(np.arange(num_ranks), num_layers)
    while len(copies.flat_C):
        lowest_P = np.minimum.reduceat(found[copies.rank_C], copies.first_P)
        before = found.copy()
        np.minimum.at(found, copies.rank_C, lowest_P[copies.pair_C])
        if (found == before).all():
            break
    return found.reshape(num_layers, num_ranks)


def parts_on_ranks(
    share_of_slot: Sequence[Sequence[int]], logical_LRS: IntArray, fleet: Fleet, num_experts: int
) -> IntArray:
    """share_of_slot of an ExpertMap as parts [L, R, S]; nothing at all means evenly. Raises InvalidInput."""
    found = (logical_LRS < num_experts).astype(np.int64)
    if not share_of_slot:
        return found
    lengths = sorted({len(row) for row in share_of_slot})
    if len(share_of_slot) != len(logical_LRS) or lengths != [fleet.num_slots]:
        raise InvalidInput(
            f"shares must have {len(logical_LRS)} layers of {fleet.num_slots} slots, "
            f"got {len(share_of_slot)} of {lengths}"
        )
    flat = np.asarray(share_of_slot, dtype=np.int64)
    if flat.min() < 0:
        raise InvalidInput(f"shares must not be negative, got {flat.min()}")
    found[:, fleet.exists_RS] = flat
    return found


def follow(part_LRS: IntArray, logical_LRS: IntArray, kept_LRS: IntArray, num_experts: int) -> IntArray:
    """The parts of `logical_LRS` where its experts are in `kept_LRS`, the same on each rank in other places."""
    of_expert_LRX = np.zeros((*part_LRS.shape[:2], num_experts + 2), dtype=np.int64)
    np.put_along_axis(of_expert_LRX, logical_LRS, part_LRS, axis=2)
    return np.where(kept_LRS < num_experts, np.take_along_axis(of_expert_LRX, kept_LRS, axis=2), 0)


def rows_of_parts(part_LRS: IntArray, fleet: Fleet) -> tuple[tuple[int, ...], ...]:
    """share_of_slot of an ExpertMap."""
    return tuple(tuple(row) for row in part_LRS[:, fleet.exists_RS].tolist())


def said_parts(
    part_LRS: IntArray, logical_LRS: IntArray, fleet: Fleet, num_experts: int
) -> tuple[tuple[int, ...], ...]:
    """The same where even shares go unsaid: () for a map all of whose copies share evenly."""
    shares = shares_of(part_LRS, logical_LRS, num_experts)
    is_even = (shares == even_shares(logical_LRS, num_experts)).all()
    return () if is_even else rows_of_parts(part_LRS, fleet)
