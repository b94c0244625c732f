"""Between two layouts: which moves lead from one to the other, and how to name ranks so that they are few."""

from collections.abc import Sequence

import numpy as np

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.experts.checks import IntArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.shelf import BoolArray
from moe_core.outcome import InvalidInput

MOST_HOLDERS = 256
"""Ranks that hold an expert and are thought of for a row that wants it; only fleets of a thousand ranks have more."""


def slots_on_ranks(logical_of_slot: Sequence[Sequence[int]], fleet: Fleet, *, num_experts: int) -> IntArray:
    """A map's rows as logical_LRS (see shelf.py). Raises InvalidInput for a row of another length or an unknown id."""
    for layer, row in enumerate(logical_of_slot):
        if len(row) != fleet.num_slots:
            raise InvalidInput(f"current[{layer}] must have {fleet.num_slots} slots, got {len(row)}")
    flat = np.asarray(logical_of_slot, dtype=np.int64).reshape(len(logical_of_slot), fleet.num_slots)
    if flat.size and not (flat.min() >= EMPTY_SLOT and flat.max() < num_experts):
        raise InvalidInput(f"current must name experts -1..{num_experts - 1}, got {flat.min()}..{flat.max()}")
    found = np.full((len(flat), *fleet.exists_RS.shape), num_experts + 1, dtype=np.int64)
    found[:, fleet.exists_RS] = np.where(flat == EMPTY_SLOT, num_experts, flat)
    return found


def copies_in(logical_LRS: IntArray, num_experts: int) -> IntArray:
    """[L, E] copies of each expert."""
    copies_LX = np.zeros((len(logical_LRS), num_experts + 2), dtype=np.int64)
    np.add.at(copies_LX, (np.arange(len(logical_LRS))[:, None, None], logical_LRS), 1)
    return copies_LX[:, :num_experts]


def arrivals(start_LRS: IntArray, end_LRS: IntArray, num_experts: int) -> BoolArray:
    """[L, R, S] slots of `end` whose expert the rank does not hold in `start`: what has to be sent."""
    num_layers, num_ranks, _ = start_LRS.shape
    held = np.zeros((num_layers, num_ranks, num_experts + 2), dtype=bool)
    np.put_along_axis(held, start_LRS, True, axis=2)
    held[..., num_experts:] = True
    return ~np.take_along_axis(held, end_LRS, axis=2)


def keep_places(end_LRS: IntArray, start_LRS: IntArray, num_experts: int) -> IntArray:
    """`end` with every expert that stays on its rank in the slot it had; newcomers take what is free, in order."""
    stays_LRS = ~arrivals(end_LRS, start_LRS, num_experts) & (start_LRS < num_experts)
    new_LRS = arrivals(start_LRS, end_LRS, num_experts)
    kept = np.where(stays_LRS, start_LRS, np.where(start_LRS > num_experts, num_experts + 1, num_experts))
    for layer, rank in np.argwhere(new_LRS.any(2)):
        free = np.flatnonzero(kept[layer, rank] == num_experts)
        newcomers = end_LRS[layer, rank][new_LRS[layer, rank]]
        kept[layer, rank, free[: len(newcomers)]] = newcomers
    return kept


def align(anew_LRS: IntArray, start_LRS: IntArray, fleet: Fleet, num_experts: int) -> IntArray:
    """`anew` with its rows dealt to ranks so that few experts move: the pair that shares most comes first.

    Only ranks that are alike (slots, speed, failure domain) change rows: neither balance nor spread changes. A pair of
    ranks counts only if it shares an expert, and of the ranks that hold a row's expert no more than MOST_HOLDERS do, so
    time grows with the slots and not with all pairs of ranks.
    """
    kind_R = _kinds(fleet)
    kind_N = (np.arange(len(anew_LRS))[:, None] * (int(kind_R.max()) + 1) + kind_R).reshape(-1)  # N = L * R
    row_P, target_P = _pairs(anew_LRS, start_LRS, kind_N, num_experts)
    target_of_row, row_of_target = [-1] * len(kind_N), [-1] * len(kind_N)
    for row, target in zip(row_P.tolist(), target_P.tolist(), strict=True):
        if target_of_row[row] < 0 and row_of_target[target] < 0:
            target_of_row[row], row_of_target[target] = target, row
    target_N, row_N = np.asarray(target_of_row), np.asarray(row_of_target)
    left_rows, left_targets = (np.flatnonzero(partner_N < 0) for partner_N in (target_N, row_N))
    by_kind_rows, by_kind_targets = (
        left[np.argsort(kind_N[left], kind="stable")] for left in (left_rows, left_targets)
    )
    row_N[by_kind_targets] = by_kind_rows
    aligned_LRS: IntArray = anew_LRS.reshape(len(kind_N), anew_LRS.shape[2])[row_N].reshape(anew_LRS.shape)
    return aligned_LRS


def align_ranks(anew_LRS: IntArray, start_LRS: IntArray, fleet: Fleet, num_experts: int) -> IntArray:
    """As `align`, but a rank gets one row of `anew` for all layers: groups of ranks that hold the same stay groups."""
    num_layers, num_ranks, width = anew_LRS.shape
    first_L = np.arange(num_layers)[:, None, None] * num_experts

    def as_one_layer(logical_LRS: IntArray) -> IntArray:
        """[1, R, L * S], each layer's experts by numbers of their own."""
        names_LRS = np.where(logical_LRS < num_experts, logical_LRS + first_L, logical_LRS + first_L[-1])
        return names_LRS.transpose(1, 0, 2).reshape(1, num_ranks, num_layers * width)

    aligned = align(as_one_layer(anew_LRS), as_one_layer(start_LRS), fleet, num_layers * num_experts)
    names_LRS = aligned.reshape(num_ranks, num_layers, width).transpose(1, 0, 2)
    return np.where(names_LRS < num_layers * num_experts, names_LRS - first_L, names_LRS - first_L[-1])


def _kinds(fleet: Fleet) -> IntArray:
    """[R] equal for ranks that are alike."""
    domain_R = fleet.domain_R if fleet.num_domains < fleet.num_ranks else np.zeros(fleet.num_ranks)
    kind_R3 = np.stack([domain_R, fleet.slots_R, fleet.speed_R], axis=1)
    kind_R: IntArray = np.unique(kind_R3, axis=0, return_inverse=True)[1].reshape(-1)
    return kind_R


def _pairs(anew_LRS: IntArray, start_LRS: IntArray, kind_N: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """(row of `anew`, rank it would go to) of one kind with an expert in common, those with most first, then lowest."""
    row_K, wanted_K = _held(anew_LRS, kind_N, num_experts)
    rank_K, held_K = _held(start_LRS, kind_N, num_experts)
    by_key = np.argsort(held_K, kind="stable")
    first_K, after_K = (np.searchsorted(held_K[by_key], wanted_K, side=side) for side in ("left", "right"))
    holders_K = after_K - first_K
    looked_at_K = np.minimum(holders_K, MOST_HOLDERS)
    turn_P = np.arange(looked_at_K.sum()) - np.repeat(looked_at_K.cumsum() - looked_at_K, looked_at_K)
    is_many_K = holders_K > MOST_HOLDERS
    begin_K = np.where(is_many_K, row_K % np.maximum(holders_K, 1), 0)  # so that all holders are looked at by somebody
    turn_P = (turn_P + np.repeat(begin_K, looked_at_K)) % np.repeat(holders_K, looked_at_K)
    rank_P = rank_K[by_key[np.repeat(first_K, looked_at_K) + turn_P]]
    pair_P, shared_P = np.unique(np.repeat(row_K, looked_at_K) * len(kind_N) + rank_P, return_counts=True)
    row_P, target_P = np.divmod(pair_P[np.argsort(-shared_P, kind="stable")], len(kind_N))
    return row_P, target_P


def _held(logical_LRS: IntArray, kind_N: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """Each expert of each rank once: the rank, counted over all layers, and expert and kind as one number."""
    logical_NS = np.sort(logical_LRS.reshape(len(kind_N), logical_LRS.shape[2]), axis=1)
    is_one_NS = logical_NS < num_experts
    is_one_NS[:, 1:] &= logical_NS[:, 1:] != logical_NS[:, :-1]
    rank_K, place_K = np.nonzero(is_one_NS)
    return rank_K, kind_N[rank_K] * num_experts + logical_NS[rank_K, place_K]
