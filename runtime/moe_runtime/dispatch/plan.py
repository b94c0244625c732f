"""Where each pick of this rank goes, computed once per epoch: frozen tables, so that a step does nothing but index
them.

An address names one slot of one living rank: `position * slots_stride + local slot`. It is what travels with a token,
and what sorts picks by destination. -1 says that no copy lives; `experts.ladder` answers then.

W ways: tokens take turns among them, and so an expert's copies share its tokens (moe_core.experts.choice).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.tiers import Tiers
from moe_core.outcome import InvalidInput
from moe_runtime.kernels.map_count import addresses_of

LOST = -1


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer as one source rank sees it.

    address_WE [W, E] int64; lost: logical ids without a live copy, ascending (known on the host, so that a layer
    without lost experts pays nothing).
    """

    address_WE: torch.Tensor
    lost: tuple[int, ...]

    def addresses(self, expert_TK: torch.Tensor, *, first_way: int = 0) -> torch.Tensor:
        """[T, K] where each pick goes; token t takes the way (first_way + t) mod W."""
        return addresses_of(expert_TK, self.address_WE, first_way=first_way)


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


def make_plan(
    expert_map: ExpertMap,
    ranks: Sequence[int],
    *,
    rank: int,
    domains: Sequence[str] | None = None,
    group_ranks: int = 0,
    device: str = "cpu",
) -> DispatchPlan:
    """The plan of `rank` while exactly `ranks` (ascending) live.

    domains: of each of `ranks`; equal names are near each other, None says that none are. All ranks must be given the
    same, or copies get more than their part. group_ranks: of an EP group, which tokens leave only for what it has lost;
    0 where all ranks are one. Raises InvalidInput for ranks the map does not know.
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
    domain_of_rank = None
    if domains is not None:
        domain_of = dict(zip(living, domains, strict=True))
        domain_of_rank = [domain_of.get(r, "") for r in range(expert_map.num_ranks)]
    tiers = Tiers(expert_map, living, group_ranks=group_ranks, domain_of_rank=domain_of_rank)
    chosen_WLE = tiers.of_source(rank)
    address_LWE = address_of_slot[chosen_WLE].transpose(1, 0, 2)
    layers = tuple(
        LayerPlan(torch.from_numpy(table.copy()).to(device), tuple(np.flatnonzero(table[0] == LOST).tolist()))
        for table in address_LWE
    )
    return DispatchPlan(living, living.index(rank), stride, layers)


def logical_of_local_slot(expert_map: ExpertMap, rank: int, layer_idx: int) -> tuple[int, ...]:
    """Logical expert of each of the rank's slots in one layer, EMPTY_SLOT for none; () for a rank the map lacks."""
    if rank >= expert_map.num_ranks:
        return ()
    slots = expert_map.slot_range(rank)
    return expert_map.logical_of_slot[layer_idx][slots.start : slots.stop]
