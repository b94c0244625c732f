"""From the layout there is, a few slots at a time: what a plan does that must not move half of the experts.

Copies that divide their expert's tokens join their ranks into one vessel: load poured into one of them runs on to the
others (split.py). So it is not the heaviest rank that has to be relieved, but its vessel, in one of two ways:

    recopy     a slot in a lighter vessel, empty or with one of several copies, takes a copy of something the heaviest
               rank holds: the two vessels become one                                          (one slot changes)
    exchange   something of the heaviest rank changes places with something lighter in a lighter vessel
                                                                                               (two slots change)

The most promising of each are tried, split anew, and the one that wins most for each slot that changes is taken. The
layouts on the way are kept, so that the caller can stop where the next step does not pay (see replan.py).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from moe_core.experts.align import copies_in
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.shelf import BoolArray, copies_in_domains
from moe_core.experts.split import best_shares, level_of_ranks, load_in_slots, vessels

RECOPIES, EXCHANGES = 4, 2
"""Tried at each step."""
_ROUNDS = 16
_LEAST_GAIN = 1e-5


@dataclass(frozen=True, slots=True)
class Path:
    """Layouts [K + 1] from the start on and the split of each; worst_KL the largest rank load of each."""

    layouts: tuple[IntArray, ...]
    shares: tuple[FloatArray, ...]
    worst_KL: FloatArray


@dataclass(frozen=True, slots=True)
class _Layers:
    """N layers that a step is looked for in. amount_NRS: load of each slot; heavy_N: the heaviest rank; for each rank
    level_NR is the load over speed of its vessel, size_NR the vessel's speed, and is_other_NR whether it is another
    than the heaviest rank's. holds_NRX: whether a rank has a copy of an expert already, and so may not take one more:
    never for an empty slot (column E), always for a slot that is not there (E + 1).
    """

    fleet: Fleet
    logical_NRS: IntArray
    share_NRS: FloatArray
    worst_N: FloatArray
    amount_NRS: FloatArray
    copies_NX: IntArray
    heavy_N: IntArray
    level_NR: FloatArray
    size_NR: FloatArray
    is_other_NR: BoolArray
    holds_NRX: BoolArray
    in_domain_NXG: IntArray | None

    @classmethod
    def of(cls, load_NE: FloatArray, logical_NRS: IntArray, share_NRS: FloatArray, fleet: Fleet) -> Self:
        num_layers, num_experts = load_NE.shape
        rows = np.arange(num_layers)
        amount_NRS = share_NRS * load_in_slots(load_NE, logical_NRS)
        carried_NR = amount_NRS.sum(2)
        heavy_N = (carried_NR / fleet.speed_R).argmax(1)
        vessel_NR = vessels(logical_NRS, amount_NRS)
        flat = vessel_NR + rows[:, None] * fleet.num_ranks
        size, load = (
            np.bincount(flat.reshape(-1), values.reshape(-1), minlength=flat.size)
            for values in (np.broadcast_to(fleet.speed_R * (fleet.slots_R > 0), carried_NR.shape), carried_NR)
        )
        size = np.where(size > 0, size, 1.0)  # ranks without slots: no step leads there
        nothing = np.full((num_layers, 2), num_experts, dtype=np.int64)  # empty slots: as many copies as one likes
        holds_NRX = np.zeros((num_layers, fleet.num_ranks, num_experts + 2), dtype=bool)
        np.put_along_axis(holds_NRX, logical_NRS, True, axis=2)
        holds_NRX[..., num_experts] = False
        holds_NRX[..., num_experts + 1] = True
        return cls(
            fleet,
            logical_NRS,
            share_NRS,
            (carried_NR / fleet.speed_R).max(1),
            amount_NRS,
            np.concatenate([copies_in(logical_NRS, num_experts), nothing], axis=1),
            heavy_N,
            load[flat] / size[flat],
            size[flat],
            vessel_NR != vessel_NR[rows, heavy_N][:, None],
            holds_NRX,
            copies_in_domains(logical_NRS, num_experts, fleet),
        )

    @property
    def num_experts(self) -> int:
        return int(self.copies_NX.shape[1]) - 2


@dataclass(frozen=True, slots=True)
class _Tries:
    """T layouts for each of N layers, and how many slots each changes, 0 where there is no such step."""

    logical_TNRS: IntArray
    changed_TN: IntArray


def improve(
    load_LE: FloatArray,
    start_LRS: IntArray,
    fleet: Fleet,
    *,
    most_steps: int,
    least_copies: int = 1,
    even_enough: float = 2e-4,
) -> Path:
    """Up to `most_steps` steps per layer from the start's best split on, all layers side by side; a layer ends early
    when no step helps, or when its heaviest rank is within `even_enough` of the mean.
    """
    share_LRS = best_shares(load_LE, start_LRS, fleet)
    layouts, shares = [start_LRS], [share_LRS]
    worst = [level_of_ranks(load_LE, start_LRS, share_LRS, fleet).max(1)]
    speed = fleet.speed_R[fleet.slots_R > 0].sum()
    target_L = load_LE.sum(1) / speed * (1 + even_enough)
    is_open_L = worst[0] > target_L
    for _ in range(most_steps):
        layer = np.flatnonzero(is_open_L)
        if layer.size == 0:
            break
        logical_LRS, share_LRS, worst_L = layouts[-1].copy(), shares[-1].copy(), worst[-1].copy()
        now = _Layers.of(load_LE[layer], logical_LRS[layer], share_LRS[layer], fleet)
        logical_LRS[layer], share_LRS[layer], worst_L[layer] = _step(now, load_LE[layer], least_copies)
        is_open_L &= (worst_L < worst[-1]) & (worst_L > target_L)
        layouts.append(logical_LRS)
        shares.append(share_LRS)
        worst.append(worst_L)
    return Path(tuple(layouts), tuple(shares), np.stack(worst))


def _step(layers: _Layers, load_NE: FloatArray, least_copies: int) -> tuple[IntArray, FloatArray, FloatArray]:
    """One step in each of these layers: slots, shares, largest load after it; as before where none helps."""
    logical_NRS, share_NRS, fleet = layers.logical_NRS, layers.share_NRS, layers.fleet
    kinds = (_recopies(layers, least_copies), _exchanges(layers))
    tried_TNRS = np.concatenate([kind.logical_TNRS for kind in kinds])
    changed_TN = np.concatenate([kind.changed_TN for kind in kinds])
    num_tries, rows = len(tried_TNRS), np.arange(len(load_NE))
    load, slots = np.tile(load_NE, (num_tries, 1)), tried_TNRS.reshape(-1, *logical_NRS.shape[1:])
    begin = np.where(tried_TNRS == logical_NRS, share_NRS, 0.0).reshape(slots.shape)
    share = best_shares(load, slots, fleet, rounds=_ROUNDS, start_LRS=begin)
    worst_TN = level_of_ranks(load, slots, share, fleet).max(1).reshape(num_tries, -1)
    worst_N = layers.worst_N
    gain_TN = np.where(changed_TN > 0, (worst_N - worst_TN) / np.maximum(changed_TN, 1), -np.inf)
    best_N = gain_TN.argmax(0)
    helps_N = gain_TN[best_N, rows] > worst_N * _LEAST_GAIN
    helps_NRS = helps_N[:, None, None]
    return (
        np.where(helps_NRS, tried_TNRS[best_N, rows], logical_NRS),
        np.where(helps_NRS, share.reshape(tried_TNRS.shape)[best_N, rows], share_NRS),
        np.where(helps_N, worst_TN[best_N, rows], worst_N),
    )


def _recopies(layers: _Layers, least_copies: int) -> _Tries:
    """The slots whose vessel would make the lightest with the heaviest rank's, and of those the least used ones."""
    num_layers, _, width = layers.logical_NRS.shape
    rows = np.arange(num_layers)
    level_N, size_N = layers.level_NR[rows, layers.heavy_N], layers.size_NR[rows, layers.heavy_N]
    both_NR = size_N[:, None] + layers.size_NR
    joined_NR = (level_N * size_N)[:, None] + layers.level_NR * layers.size_NR
    score = (joined_NR[:, :, None] + layers.amount_NRS) / both_NR[:, :, None]
    is_spare = np.take_along_axis(layers.copies_NX[:, None], layers.logical_NRS, axis=2) > max(1, least_copies)
    is_spare &= (layers.logical_NRS <= layers.num_experts) & _may_go(layers)
    score[~(is_spare & layers.is_other_NR[:, :, None])] = np.inf
    score = score.reshape(num_layers, -1)
    tries = min(RECOPIES, score.shape[1])
    best_NT = np.argsort(score, axis=1, kind="stable")[:, :tries]
    rank_NT, place_NT = np.divmod(best_NT, width)
    mine_NS = layers.logical_NRS[rows, layers.heavy_N]
    may_NTS = _may_copy(layers, mine_NS, rank_NT)
    gives_NTS = np.where(may_NTS, layers.amount_NRS[rows, layers.heavy_N][:, None], -1.0)
    given_NT = gives_NTS.argmax(2)
    is_found = np.isfinite(np.take_along_axis(score, best_NT, axis=1)) & (gives_NTS.max(2) > 0)
    found = np.repeat(layers.logical_NRS[None], tries, axis=0)
    lane = rows[:, None]
    found[np.arange(tries)[None, :], lane, rank_NT, place_NT] = np.where(
        is_found, mine_NS[lane, given_NT], layers.logical_NRS[lane, rank_NT, place_NT]
    )
    return _Tries(found, is_found.T.astype(np.int64))


def _may_go(layers: _Layers) -> BoolArray | bool:
    """[N, R, S] whether the other copies are no less spread over the domains than they need be without this one."""
    if layers.in_domain_NXG is None:
        return True
    most_NX = layers.in_domain_NXG.max(2)
    crowded_NX = (layers.in_domain_NXG == most_NX[..., None]).sum(2)
    cap_NX = -(-(layers.copies_NX - 1) // layers.fleet.domains_with_slots)
    rows = np.arange(len(most_NX))[:, None, None]
    logical = layers.logical_NRS
    here = layers.in_domain_NXG[rows, logical, layers.fleet.domain_R[None, :, None]]
    is_the_most = (here == most_NX[rows, logical]) & (crowded_NX[rows, logical] == 1)
    return np.asarray(most_NX[rows, logical] - is_the_most <= cap_NX[rows, logical])


def _may_copy(layers: _Layers, logical_NS: IntArray, rank_NT: IntArray) -> BoolArray:
    """[N, T, S] whether one more copy of an expert may be put on a rank."""
    rows = np.arange(len(rank_NT))[:, None, None]
    logical = logical_NS[:, None, :]
    may = ~layers.holds_NRX[rows, rank_NT[:, :, None], logical] & (logical < layers.num_experts)
    if layers.in_domain_NXG is None:
        return np.asarray(may)
    here = layers.in_domain_NXG[rows, logical, layers.fleet.domain_R[rank_NT][:, :, None]]
    return np.asarray(may & (here < -(-(layers.copies_NX[rows, logical] + 1) // layers.fleet.domains_with_slots)))


def _exchanges(layers: _Layers) -> _Tries:
    """Exchanges of the heaviest rank with ranks of other vessels that leave the two vessels most even."""
    num_layers, num_ranks, width = layers.logical_NRS.shape
    rows = np.arange(num_layers)
    mine_NS = layers.logical_NRS[rows, layers.heavy_N]
    shift = layers.amount_NRS[rows, layers.heavy_N][:, :, None, None] - layers.amount_NRS[:, None]
    level_N, size_N = layers.level_NR[rows, layers.heavy_N], layers.size_NR[rows, layers.heavy_N]
    after_mine = level_N[:, None, None, None] - shift / size_N[:, None, None, None]
    after_other = layers.level_NR[:, None, :, None] + shift / layers.size_NR[:, None, :, None]
    worst = np.maximum(after_mine, after_other)
    may_leave_NSR, may_come_NRS = _may_trade(layers, mine_NS)
    worst[~(may_leave_NSR[..., None] & may_come_NRS[:, None])] = np.inf
    worst = worst.reshape(num_layers, -1)
    tries = min(EXCHANGES, worst.shape[1])
    best_NT = np.argpartition(worst, tries - 1, axis=1)[:, :tries]
    place_NT, other_NT = np.divmod(best_NT, num_ranks * width)
    rank_NT, other_place_NT = np.divmod(other_NT, width)
    lane = rows[:, None]
    is_found = np.take_along_axis(worst, best_NT, axis=1) < level_N[:, None]
    mine, theirs = mine_NS[lane, place_NT], layers.logical_NRS[lane, rank_NT, other_place_NT]
    found = np.repeat(layers.logical_NRS[None], tries, axis=0)
    turn = np.arange(tries)[None, :]
    found[turn, lane, layers.heavy_N[:, None], place_NT] = np.where(is_found, theirs, mine)
    found[turn, lane, rank_NT, other_place_NT] = np.where(is_found, mine, theirs)
    changed = 2 - (mine == layers.num_experts).astype(np.int64) - (theirs == layers.num_experts)
    return _Tries(found, np.where(is_found, changed, 0).T)


def _may_trade(layers: _Layers, mine_NS: IntArray) -> tuple[BoolArray, BoolArray]:
    """[N, S, R] whether a place of the heaviest rank may go to a rank; [N, R, S] whether a slot may come from there."""
    rows = np.arange(len(mine_NS))
    lane = rows[:, None, None]
    logical = layers.logical_NRS
    may_leave = ~layers.holds_NRX[lane, np.arange(layers.fleet.num_ranks)[None, None, :], mine_NS[:, :, None]]
    may_come = ~np.take_along_axis(layers.holds_NRX[rows, layers.heavy_N][:, None, :], logical, axis=2)
    may_leave &= (mine_NS <= layers.num_experts)[:, :, None]
    may_come &= (logical <= layers.num_experts) & layers.is_other_NR[:, :, None]
    if layers.in_domain_NXG is not None:
        domain_R = layers.fleet.domain_R
        home_N = domain_R[layers.heavy_N]
        cap_NX = -(-layers.copies_NX // layers.fleet.domains_with_slots)
        is_near_NR = domain_R[None, :] == home_N[:, None]
        room_NXG = layers.in_domain_NXG < cap_NX[..., None]
        may_leave &= room_NXG[lane, mine_NS[:, :, None], domain_R[None, None, :]] | is_near_NR[:, None, :]
        may_come &= room_NXG[lane, logical, home_N[:, None, None]] | is_near_NR[:, :, None]
    return may_leave, may_come
