"""Assignment: which logical expert lives in which slot of which rank. No policy replaces another in silence.

linear    experts in order over the ranks, redundant copies on distinct ranks; ranks may own different numbers of slots
deepseek  DeepSeek's EPLB over all ranks (see eplb.py), then copies of one expert that met on a rank swap apart at
          the least cost in balance, or give their slot to another expert; every rank that owns slots must own the same
          number
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import FloatArray, IntArray, as_load_LE, check_slots
from moe_core.experts.copies import lay_out
from moe_core.experts.eplb import rebalance_experts
from moe_core.outcome import InvalidInput

Policy = Literal["linear", "deepseek"]


def even_slots(num_logical_experts: int, num_ranks: int, *, redundant_per_rank: int = 0) -> tuple[int, ...]:
    """Slots per rank: an even share (the first ranks take what does not divide) plus the redundant ones.

    >>> even_slots(16, 3, redundant_per_rank=2)
    (8, 7, 7)
    """
    share, rest = divmod(num_logical_experts, num_ranks)
    return tuple(share + (rank < rest) + redundant_per_rank for rank in range(num_ranks))


def assign(
    policy: Policy,
    *,
    num_layers: int,
    num_logical_experts: int,
    slots_of_rank: Sequence[int],
    load: ArrayLike | None = None,
    generation: int = 0,
) -> ExpertMap:
    """A whole map. `load` is [L][E] tokens per logical expert; none, or a layer without any, spreads the copies evenly.

    With `linear`, slots that could only repeat an expert on its rank stay empty. Raises InvalidInput that names the
    argument: too few slots, a load of the wrong shape, negative or not finite, slots that the policy cannot use.
    """
    if policy not in get_args(Policy):
        raise InvalidInput(f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")
    if num_layers < 0:
        raise InvalidInput(f"num_layers must not be negative, got {num_layers}")
    check_slots(slots_of_rank, num_logical_experts=num_logical_experts)
    load_LE = None
    if load is not None:
        load_LE = as_load_LE(load, num_layers=num_layers, num_logical_experts=num_logical_experts)
    layer_loads = [_load_of_layer(load_LE, layer_idx) for layer_idx in range(num_layers)]
    if policy == "linear":
        rows = _linear(layer_loads, slots_of_rank, num_logical_experts)
    else:
        rows = _deepseek(layer_loads, slots_of_rank, num_logical_experts)
    return ExpertMap(
        generation=generation,
        num_logical_experts=num_logical_experts,
        slots_of_rank=tuple(slots_of_rank),
        logical_of_slot=tuple(rows),
    )


def _load_of_layer(load_LE: FloatArray | None, layer_idx: int) -> FloatArray | None:
    """None when nothing was counted."""
    if load_LE is None or not load_LE[layer_idx].any():
        return None
    layer: FloatArray = load_LE[layer_idx]
    return layer


def _linear(
    layer_loads: Sequence[FloatArray | None], slots_of_rank: Sequence[int], num_logical: int
) -> list[tuple[int, ...]]:
    unmeasured: tuple[int, ...] | None = None
    rows = []
    for load_E in layer_loads:
        if load_E is None and unmeasured is not None:
            rows.append(unmeasured)
            continue
        per_rank = lay_out(slots_of_rank, num_logical, load_E).rows()
        row = tuple(
            logical
            for held, room in zip(per_rank, slots_of_rank, strict=True)
            for logical in (*held, *(EMPTY_SLOT for _ in range(room - len(held))))
        )
        unmeasured = row if load_E is None else unmeasured
        rows.append(row)
    return rows


def _deepseek(
    layer_loads: Sequence[FloatArray | None], slots_of_rank: Sequence[int], num_logical: int
) -> list[tuple[int, ...]]:
    sizes = sorted({count for count in slots_of_rank if count})
    if len(sizes) > 1:
        raise InvalidInput(f"slots_of_rank must be equal for policy deepseek, got {list(slots_of_rank)}")
    num_ranks = sum(1 for count in slots_of_rank if count)
    if not layer_loads:
        return []
    weight = np.stack([np.ones(num_logical) if load_E is None else load_E for load_E in layer_loads])
    logical, _, copies = rebalance_experts(weight, sizes[0] * num_ranks, 1, 1, num_ranks)
    rows: list[tuple[int, ...]] = []
    row_of_load: dict[bytes, tuple[int, ...]] = {}
    for layer_idx in range(len(layer_loads)):
        key = weight[layer_idx].tobytes()
        if key not in row_of_load:  # unmeasured layers are alike
            separated = _separate(logical[layer_idx].reshape(num_ranks, sizes[0]), weight[layer_idx], copies[layer_idx])
            row_of_load[key] = tuple(separated.ravel().tolist())
        rows.append(row_of_load[key])
    return rows


def _separate(logical_RS: IntArray, load_E: FloatArray, copies_E: IntArray) -> IntArray:
    """Part the copies of an expert that met on a rank, each time by the swap that shifts the least load.

    logical_RS [R, S] experts in each rank's slots. Where every rank holds the expert already, the slot goes to the
    hottest expert that the rank lacks.
    """
    logical_RS, copies_E = logical_RS.copy(), copies_E.copy()
    count_RE = np.zeros((len(logical_RS), len(load_E)), dtype=np.int64)
    np.add.at(count_RE, (np.arange(len(logical_RS))[:, None], logical_RS), 1)
    for rank, place in np.ndindex(logical_RS.shape):
        logical = logical_RS[rank, place]
        if count_RE[rank, logical] < 2 or logical not in logical_RS[rank, :place]:
            continue
        per_copy_E = load_E / copies_E
        lacking_R = count_RE[:, logical] == 0
        useful_RS = lacking_R[:, None] & (count_RE[rank] == 0)[logical_RS]
        if useful_RS.any():
            shift_RS = np.where(useful_RS, np.abs(per_copy_E[logical_RS] - per_copy_E[logical]), np.inf)
            other_rank, other_place = np.unravel_index(int(np.argmin(shift_RS)), shift_RS.shape)
            given = logical_RS[other_rank, other_place]
            logical_RS[other_rank, other_place] = logical
            count_RE[other_rank, given] -= 1
            count_RE[other_rank, logical] += 1
        elif (count_RE[rank] == 0).any():
            given = int(np.argmax(np.where(count_RE[rank] == 0, per_copy_E, -1.0)))
            copies_E[logical] -= 1
            copies_E[given] += 1
        else:
            continue
        logical_RS[rank, place] = given
        count_RE[rank, logical] -= 1
        count_RE[rank, given] += 1
    return logical_RS
