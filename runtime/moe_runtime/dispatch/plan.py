"""Where each pick of this rank goes, computed once per epoch: frozen tables, so that a step does nothing but index
them.

An address names one slot of one living rank: `position * slots_stride + local slot`. It is what travels with a token,
and what sorts picks by destination. -1 says that no copy lives; `experts.ladder` answers then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.choice import choose_slots
from moe_core.outcome import InvalidInput

LOST = -1


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer as one source rank sees it.

    address_E [E] int64; lost: logical ids without a live copy, ascending (known on the host, so that a layer without
    lost experts pays nothing).
    """

    address_E: torch.Tensor
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """All layers for one rank of one epoch. `slots_stride` is the largest number of slots of any living rank (>= 1)."""

    ranks: tuple[int, ...]
    position: int
    slots_stride: int
    layers: tuple[LayerPlan, ...]

    @property
    def size(self) -> int:
        return len(self.ranks)


def make_plan(expert_map: ExpertMap, ranks: Sequence[int], *, rank: int, device: str = "cpu") -> DispatchPlan:
    """The plan of `rank` while exactly `ranks` (ascending) live. Raises InvalidInput for ranks the map does not
    know.
    """
    living = tuple(ranks)
    if list(living) != sorted(set(living)) or rank not in living:
        raise InvalidInput(f"ranks must be ascending and hold rank {rank}, got {list(living)}")
    if living[-1] >= expert_map.num_ranks:
        raise InvalidInput(f"rank {living[-1]} is unknown to the map, which has ranks 0..{expert_map.num_ranks - 1}")
    stride = max(1, *(expert_map.slots_of_rank[r] for r in living))
    address_of_slot = np.full(sum(expert_map.slots_of_rank) + 1, LOST, dtype=np.int64)  # the last one answers for -1
    for position, living_rank in enumerate(living):
        slots = expert_map.slot_range(living_rank)
        address_of_slot[slots.start : slots.stop] = position * stride + np.arange(len(slots))
    chosen_LE = choose_slots(expert_map, living, source_rank=rank)
    address_LE = address_of_slot[chosen_LE]
    layers = tuple(
        LayerPlan(torch.from_numpy(row.copy()).to(device), tuple(np.flatnonzero(row == LOST).tolist()))
        for row in address_LE
    )
    return DispatchPlan(living, living.index(rank), stride, layers)


def logical_of_local_slot(expert_map: ExpertMap, rank: int, layer_idx: int) -> tuple[int, ...]:
    """Logical expert of each of the rank's slots in one layer, EMPTY_SLOT for none; () for a rank the map lacks."""
    if rank >= expert_map.num_ranks:
        return ()
    slots = expert_map.slot_range(rank)
    return expert_map.logical_of_slot[layer_idx][slots.start : slots.stop]
