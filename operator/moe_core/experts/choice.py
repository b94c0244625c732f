"""Which live copy of an expert a source rank sends its tokens to.

Its own copy first: no bytes on the wire. The sources without one are dealt over the copies in turn, so that the copies
of a hot expert share its tokens. Every rank can compute every other rank's choice.
"""

from collections.abc import Collection

import numpy as np

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import IntArray
from moe_core.experts.measure import live_slots
from moe_core.outcome import InvalidInput

NO_SLOT = -1


def choose_slots(expert_map: ExpertMap, live_ranks: Collection[int], *, source_rank: int) -> IntArray:
    """[L, E] global slot id that `source_rank` uses for each logical expert, NO_SLOT where no copy lives.

    Raises InvalidInput unless `source_rank` is one of `live_ranks` and the map knows them all.
    """
    ranks = sorted(set(live_ranks))
    if source_rank not in ranks:
        raise InvalidInput(f"source_rank must be one of live_ranks {ranks}, got {source_rank}")
    slots = live_slots(expert_map, ranks)
    rank_of_slot = np.asarray(expert_map.rank_of_slot, dtype=np.int64)
    chosen = np.full((expert_map.num_layers, expert_map.num_logical_experts), NO_SLOT, dtype=np.int64)
    choice_of_row: dict[tuple[int, ...], IntArray] = {}
    for layer_idx, row in enumerate(expert_map.logical_of_slot):
        if row not in choice_of_row:  # layers often share one assignment
            choice_of_row[row] = _choose(
                np.asarray(row, dtype=np.int64), slots, rank_of_slot, ranks, source_rank, expert_map
            )
        chosen[layer_idx] = choice_of_row[row]
    return chosen


def _choose(  # noqa: PLR0917
    logical_of_slot: IntArray,
    slots: IntArray,
    rank_of_slot: IntArray,
    ranks: list[int],
    source_rank: int,
    expert_map: ExpertMap,
) -> IntArray:
    slots_of_logical: list[list[int]] = [[] for _ in range(expert_map.num_logical_experts)]
    for slot in slots.tolist():
        if logical_of_slot[slot] != EMPTY_SLOT:
            slots_of_logical[logical_of_slot[slot]].append(slot)
    chosen = np.full(expert_map.num_logical_experts, NO_SLOT, dtype=np.int64)
    for logical, copies in enumerate(slots_of_logical):
        if not copies:
            continue
        holders = {int(rank_of_slot[slot]) for slot in copies}
        if source_rank in holders:
            chosen[logical] = next(slot for slot in copies if rank_of_slot[slot] == source_rank)
        else:
            place = sum(1 for rank in ranks if rank < source_rank and rank not in holders)
            chosen[logical] = copies[(place + logical) % len(copies)]
    return chosen
