"""Which part of its expert's tokens each live copy answers: what the map's shares say, as far as the copies live.

How fast ranks are and how far apart is in the shares already (replan.py). What a source chooses with must be the same
on all ranks, and the map is.

X live slots, ascending.
"""

from collections.abc import Collection
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.outcome import InvalidInput

Number = TypeVar("Number", np.int64, np.float64)


def live_slots(expert_map: ExpertMap, live_ranks: Collection[int] | None) -> IntArray:
    """Global slot ids of the live ranks, ascending. Raises InvalidInput for a rank that the map does not know."""
    if live_ranks is None:
        return np.arange(sum(expert_map.slots_of_rank), dtype=np.int64)
    for rank in sorted(live_ranks):
        if not 0 <= rank < expert_map.num_ranks:
            raise InvalidInput(f"live_ranks names rank {rank}, the map has ranks 0..{expert_map.num_ranks - 1}")
    return np.asarray(
        [slot for rank in sorted(set(live_ranks)) for slot in expert_map.slot_range(rank)], dtype=np.int64
    )


def parts_of_slots(expert_map: ExpertMap, live_ranks: Collection[int] | None = None) -> FloatArray:
    """[L, S] part of its expert's tokens that each slot answers: 1 in sum over the live copies of an expert, 0 in slots
    that are empty or of lost ranks."""
    slots = live_slots(expert_map, live_ranks)
    weight_LX = weights_of_slots(expert_map, slots)
    parts_LS = np.zeros(expert_map.table_LS.shape)
    parts_LS[:, slots] = weight_LX / np.maximum(_sums(_units(expert_map, slots), weight_LX), 1)
    return parts_LS


def weights_of_slots(expert_map: ExpertMap, slots: IntArray) -> IntArray:
    """[L, X] whole numbers in whose proportion copies in `slots` divide their expert's tokens; 0 for empty slots."""
    is_copy_LX = expert_map.table_LS[:, slots] != EMPTY_SLOT
    weight_LX = expert_map.share_LS[:, slots]
    return np.where(is_copy_LX & (_sums(_units(expert_map, slots), weight_LX) == 0), 1, weight_LX)


def _units(expert_map: ExpertMap, slots: IntArray) -> IntArray:
    """[L, X] a number for each layer's expert, and one more in each layer for its empty slots."""
    logical_LX = expert_map.table_LS[:, slots]
    num_columns = expert_map.num_logical_experts + 1
    first_L1 = np.arange(expert_map.num_layers)[:, None] * num_columns
    return np.where(logical_LX == EMPTY_SLOT, num_columns - 1, logical_LX) + first_L1


def _sums(unit_LX: IntArray, value_LX: FloatArray | IntArray) -> FloatArray:
    """[L, X] sum over the copies of the expert in each slot."""
    sums: FloatArray = np.bincount(unit_LX.ravel(), value_LX.ravel(), minlength=1).astype(np.float64)[unit_LX]
    return sums


def sums_so_far(key_N: IntArray, value_N: NDArray[Number]) -> NDArray[Number]:
    """[N] sum of `value_N` over the run of equal keys up to each place, itself included."""
    ends_N = np.cumsum(value_N)
    is_first_N = np.ones(len(key_N), dtype=np.bool_)
    is_first_N[1:] = key_N[1:] != key_N[:-1]
    start_N = np.flatnonzero(is_first_N)[np.cumsum(is_first_N) - 1]
    so_far_N: NDArray[Number] = ends_N - (ends_N - value_N)[start_N]
    return so_far_N
