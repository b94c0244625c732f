"""The assignment for another set of ranks: what a rank holds already stays with it where the new plan allows that."""

from collections.abc import Sequence

import numpy as np

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.align import align, align_ranks, keep_places, slots_on_ranks
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import mirrors, pack_groups
from moe_core.experts.naming import Naming, first_slots
from moe_core.experts.shelf import rows_of


def carry_over(
    expert_map: ExpertMap, load_LE: FloatArray, fleet: Fleet, *, least_copies: int = 1
) -> tuple[tuple[int, ...], ...]:
    """logical_of_slot [L][slots of `fleet`]: packed for the load from scratch (groups.pack_groups),
    and dealt to the ranks so that few experts move.

    Ranks keep their numbers; those that `fleet` does not have are gone, those that the map does not have hold nothing.
    """
    num_experts = expert_map.num_logical_experts
    held_LRS = slots_on_ranks(_held(expert_map, fleet.slots_of_rank), fleet, num_experts=num_experts)
    naming = Naming.of(load_LE, first_slots(held_LRS, num_experts))
    held_LRS = naming.numbers(held_LRS)
    anew = pack_groups(naming.by_number(load_LE), fleet, least_copies=least_copies)
    is_mirrored = mirrors(anew.logical_LRS, fleet) is not None
    deal = align_ranks if is_mirrored else align
    dealt_LRS = deal(anew.logical_LRS, held_LRS, fleet, num_experts)
    return rows_of(naming.names(keep_places(dealt_LRS, held_LRS, num_experts)), fleet, num_experts)


def _held(expert_map: ExpertMap, slots_of_rank: Sequence[int]) -> list[list[int]]:
    """The map's rows, each rank's cut or filled to its new number of slots."""
    rows = np.full((expert_map.num_layers, sum(slots_of_rank)), EMPTY_SLOT, dtype=np.int64)
    first = 0
    for rank, count in enumerate(slots_of_rank):
        old = expert_map.slot_range(rank)
        both = min(count, len(old))
        rows[:, first : first + both] = expert_map.table_LS[:, old.start : old.start + both]
        first += count
    found: list[list[int]] = rows.tolist()
    return found
