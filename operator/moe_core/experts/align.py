"""Between two layouts: which moves lead from one to the other, and how to name ranks so that they are few."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.experts.checks import IntArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.shelf import BoolArray
from moe_core.outcome import InvalidInput


def slots_on_ranks(logical_of_slot: Sequence[Sequence[int]], fleet: Fleet, *, num_experts: int) -> IntArray:
    """A map's rows as logical_LRS (see shelf.py). Raises InvalidInput for a row of another length or an unknown id."""
    flat = np.asarray([list(row) for row in logical_of_slot], dtype=np.int64).reshape(len(logical_of_slot), -1)
    if flat.shape[1] != fleet.num_slots:
        raise InvalidInput(f"current must have {fleet.num_slots} slots in each layer, got {flat.shape[1]}")
    if flat.size and not (flat.min() >= EMPTY_SLOT and flat.max() < num_experts):
        raise InvalidInput(f"current must name experts -1..{num_experts - 1}, got {flat.min()}..{flat.max()}")
    exists_RS = np.arange(int(fleet.slots_R.max()))[None, :] < fleet.slots_R[:, None]
    found = np.full((len(flat), *exists_RS.shape), num_experts + 1, dtype=np.int64)
    found[:, exists_RS] = np.where(flat == EMPTY_SLOT, num_experts, flat)
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

    Only ranks that are alike (slots, speed, failure domain) change rows: neither balance nor spread changes.
    """
    held_LRX, wanted_LRX = (np.zeros((*x.shape[:2], num_experts + 2), dtype=np.float32) for x in (start_LRS, anew_LRS))
    np.put_along_axis(held_LRX, start_LRS, 1, axis=2)
    np.put_along_axis(wanted_LRX, anew_LRS, 1, axis=2)
    aligned = anew_LRS.copy()
    for ranks in _alike(fleet):
        shared_Lnr = wanted_LRX[:, ranks, :num_experts] @ held_LRX[:, ranks, :num_experts].transpose(0, 2, 1)
        for layer, shared_nr in enumerate(shared_Lnr):
            rows, targets = _greedy_pairs(shared_nr)
            aligned[layer, ranks[targets]] = anew_LRS[layer, ranks[rows]]
    return aligned


def _alike(fleet: Fleet) -> list[IntArray]:
    domain_R = fleet.domain_R if fleet.num_domains < fleet.num_ranks else np.zeros(fleet.num_ranks)
    kind_R3 = np.stack([domain_R, fleet.slots_R, fleet.speed_R], axis=1)
    _, kind_R = np.unique(kind_R3, axis=0, return_inverse=True)
    return [np.flatnonzero(kind_R.reshape(-1) == kind) for kind in range(int(kind_R.max()) + 1)]


def _greedy_pairs(shared_nn: NDArray[np.float32]) -> tuple[list[int], list[int]]:
    """Each row with one column, largest entries first, ties to the lowest."""
    size = len(shared_nn)
    row_is_free, column_is_free = [True] * size, [True] * size
    rows, columns = [], []
    for flat in np.argsort(-shared_nn.reshape(-1), kind="stable").tolist():
        row, column = divmod(flat, size)
        if row_is_free[row] and column_is_free[column]:
            row_is_free[row] = column_is_free[column] = False
            rows.append(row)
            columns.append(column)
    return rows, columns
