"""EP groups side by side: every group of ranks holds all experts, and a token leaves its group only for an expert that
has no live copy there.

Which copy a source uses is chosen in two tiers, each as choice.py has it: among the copies of its own group, so that
they share its load and near ones are preferred; and for what the group has lost, among all that live.

Ranks of a group are neighbours: rank r is in group r // group_ranks, and no groups (0) are one. The map of such a fleet
has each group's layout once for every group, which makes the ranks of one number mirrors of each other (groups.py): so
it stays as the load changes. After the EP and DP mesh of DeepSpeed-MoE (arXiv:2201.05596), whose experts are
data-parallel over such groups.
"""

from collections.abc import Collection, Sequence

import numpy as np

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.checks import IntArray
from moe_core.experts.choice import NO_SLOT, Lanes, deal_lanes
from moe_core.outcome import InvalidInput


def side_by_side(group: ExpertMap, num_groups: int) -> ExpertMap:
    """The layout of one group, once for each of them."""
    if num_groups < 1:
        raise InvalidInput(f"num_groups must be at least 1, got {num_groups}")
    return ExpertMap(
        generation=group.generation,
        num_logical_experts=group.num_logical_experts,
        slots_of_rank=group.slots_of_rank * num_groups,
        logical_of_slot=tuple(row * num_groups for row in group.logical_of_slot),
        share_of_slot=tuple(row * num_groups for row in group.share_of_slot),
    )


def first_group(expert_map: ExpertMap, group_ranks: int) -> ExpertMap:
    """The layout of the first EP group alone."""
    slots = expert_map.slots_of_rank[:group_ranks]
    return ExpertMap(
        generation=expert_map.generation,
        num_logical_experts=expert_map.num_logical_experts,
        slots_of_rank=slots,
        logical_of_slot=tuple(row[: sum(slots)] for row in expert_map.logical_of_slot),
        share_of_slot=tuple(row[: sum(slots)] for row in expert_map.share_of_slot),
    )


class Tiers:
    """What every source chooses while `live_ranks` live; made once for all of them. Raises InvalidInput."""

    def __init__(
        self,
        expert_map: ExpertMap,
        live_ranks: Collection[int],
        *,
        group_ranks: int = 0,
        domain_of_rank: Sequence[str] | None = None,
    ) -> None:
        self._map, self._live, self._domains = expert_map, sorted(live_ranks), domain_of_rank
        self._group_ranks = group_ranks
        self._lanes: dict[int | None, Lanes] = {}

    def of_source(self, source_rank: int) -> IntArray:
        """[W, L, E] as `choice.choose_slots` has it."""
        if not self._group_ranks:
            return self._among(None).of_source(source_rank)
        own_WLE = self._among(source_rank // self._group_ranks).of_source(source_rank)
        if (own_WLE != NO_SLOT).all():
            return own_WLE
        return np.asarray(np.where(own_WLE == NO_SLOT, self._among(None).of_source(source_rank), own_WLE))

    def _among(self, group: int | None) -> Lanes:
        """The lanes of one group's ranks, None for all ranks together."""
        if group not in self._lanes:
            ranks = [rank for rank in self._live if group is None or rank // self._group_ranks == group]
            self._lanes[group] = deal_lanes(self._map, ranks, domain_of_rank=self._domains)
        return self._lanes[group]
