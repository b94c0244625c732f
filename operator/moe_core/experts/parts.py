"""Which part of its expert's tokens each live copy answers.

The map's shares say it, as far as the copies live. A map without shares leaves it to what is known of the ranks: how
fast they are and what they have to do besides. Then every copy gets what brings its rank to the same level as the
others, (queue + part) / speed, and nothing where the queue alone is higher: water-filling. Each expert on its own; what
one adds to a rank is no queue to the next.

X live slots, ascending.
"""

from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_core.contract.expert_map import EMPTY_SLOT, MAX_SHARE, ExpertMap
from moe_core.experts.checks import FloatArray, IntArray, as_load_LE
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


def weights_of_slots(
    expert_map: ExpertMap,
    slots: IntArray,
    *,
    load: ArrayLike | None = None,
    speed_of_rank: Sequence[float] | None = None,
    queue_of_rank: Sequence[float] | None = None,
) -> IntArray:
    """[L, X] whole numbers in whose proportion the copies in `slots` divide their experts' tokens; 0 for empty slots.

    speed_of_rank and queue_of_rank matter to a map without shares. A queue is in the unit of `load` [L][E], which must
    be given with it. Raises InvalidInput for a bad load, a speed that is not above 0, a queue that is below.
    """
    unit_LX = _units(expert_map, slots)
    is_copy_LX = expert_map.table_LS[:, slots] != EMPTY_SLOT
    speed_X = _of_slots(expert_map, slots, "speed_of_rank", speed_of_rank)
    queue_X = _of_slots(expert_map, slots, "queue_of_rank", queue_of_rank)
    if speed_X is not None and not (speed_X > 0).all():
        raise InvalidInput(f"speed_of_rank must be above 0, got {speed_X.min()}")
    if queue_X is not None and load is None:
        raise InvalidInput("queue_of_rank is in the unit of load, and load is None")
    if expert_map.share_of_slot or (speed_X is None and queue_X is None):
        weight_LX = expert_map.share_LS[:, slots]
        return np.where(is_copy_LX & (_sums(unit_LX, weight_LX) == 0), 1, weight_LX)
    speed_LX: FloatArray = np.ones(unit_LX.shape) if speed_X is None else np.where(is_copy_LX, speed_X, 1.0)
    amount_LX = speed_LX
    if queue_X is not None and load is not None:
        load_LE = as_load_LE(load, num_layers=expert_map.num_layers, num_logical_experts=expert_map.num_logical_experts)
        load_LX = np.append(load_LE, np.zeros((len(load_LE), 1)), axis=1).ravel()[unit_LX]
        filled_LX = _filled(unit_LX, load_LX, speed_LX, np.broadcast_to(queue_X, load_LX.shape))
        amount_LX = np.where(load_LX > 0, filled_LX, speed_LX)
    part_LX = amount_LX / _sums(unit_LX, amount_LX)
    return np.where(is_copy_LX, np.rint(part_LX * MAX_SHARE), 0).astype(np.int64)


def _of_slots(expert_map: ExpertMap, slots: IntArray, name: str, of_rank: Sequence[float] | None) -> FloatArray | None:
    if of_rank is None:
        return None
    if len(of_rank) < expert_map.num_ranks:
        raise InvalidInput(f"{name} must name {expert_map.num_ranks} ranks, got {len(of_rank)}")
    value_X = np.asarray(of_rank, dtype=np.float64)[np.asarray(expert_map.rank_of_slot, dtype=np.int64)[slots]]
    bad = ~np.isfinite(value_X) | (value_X < 0)
    if bad.any():
        raise InvalidInput(f"{name} must be finite and not negative, got {value_X[bad][0]}")
    return value_X


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


def _filled(unit_LX: IntArray, load_LX: FloatArray, speed_LX: FloatArray, queue_LX: FloatArray) -> FloatArray:
    """[L, X] part of its expert's load that each copy gets: all that get any come to one level.

    Copies join in the order of their level without any part, as long as the water reaches them.
    """
    order_N = np.lexsort(((queue_LX / speed_LX).ravel(), unit_LX.ravel()))
    unit_N = unit_LX.ravel()[order_N]
    load_N, speed_N, queue_N = (value_LX.ravel()[order_N] for value_LX in (load_LX, speed_LX, queue_LX))
    level_N = (load_N + sums_so_far(unit_N, queue_N)) / sums_so_far(unit_N, speed_N)  # shared by those up to this one
    joins_N = level_N >= queue_N / speed_N
    level_of_unit = np.zeros(int(unit_N.max(initial=0)) + 1)
    level_of_unit[unit_N[joins_N]] = level_N[joins_N]  # the last one to join is written last
    filled_LX = np.zeros(unit_LX.shape)
    filled_LX.ravel()[order_N] = np.maximum(0.0, level_of_unit[unit_N] * speed_N - queue_N)
    return filled_LX


def sums_so_far(key_N: IntArray, value_N: NDArray[Number]) -> NDArray[Number]:
    """[N] sum of `value_N` over the run of equal keys up to each place, itself included."""
    ends_N = np.cumsum(value_N)
    is_first_N = np.ones(len(key_N), dtype=np.bool_)
    is_first_N[1:] = key_N[1:] != key_N[:-1]
    start_N = np.flatnonzero(is_first_N)[np.cumsum(is_first_N) - 1]
    so_far_N: NDArray[Number] = ends_N - (ends_N - value_N)[start_N]
    return so_far_N
