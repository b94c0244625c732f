"""Which live copy of an expert a source rank sends its tokens to.

Its own copy first: no bytes on the wire. Then a copy in its own failure domain, as long as that one does not get more
than its even part of the sources; the rest is dealt to the copies that have the least. So the copies of a hot expert
share its tokens evenly, and as near to where they come from as that allows. Every rank can compute every other rank's
choice, and nobody has to ask.
"""

from collections.abc import Collection, Sequence

import numpy as np

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import IntArray
from moe_core.experts.measure import live_slots
from moe_core.outcome import InvalidInput

NO_SLOT = -1


def choose_slots(
    expert_map: ExpertMap,
    live_ranks: Collection[int],
    *,
    source_rank: int,
    domain_of_rank: Sequence[str] | None = None,
) -> IntArray:
    """[L, E] global slot id that `source_rank` uses for each logical expert, NO_SLOT where no copy lives.

    domain_of_rank: a name for each rank of the map; without it no two ranks are near each other. Raises InvalidInput
    unless `source_rank` is one of `live_ranks` and the map knows them all.
    """
    ranks = sorted(set(live_ranks))
    if source_rank not in ranks:
        raise InvalidInput(f"source_rank must be one of live_ranks {ranks}, got {source_rank}")
    return np.asarray(choose_slots_of_all(expert_map, ranks, domain_of_rank=domain_of_rank)[ranks.index(source_rank)])


def choose_slots_of_all(
    expert_map: ExpertMap, live_ranks: Collection[int], *, domain_of_rank: Sequence[str] | None = None
) -> IntArray:
    """[live ranks, L, E] the choice of every source rank, ranks ascending; see `choose_slots`."""
    ranks = sorted(set(live_ranks))
    if domain_of_rank is not None and len(domain_of_rank) < expert_map.num_ranks:
        raise InvalidInput(f"domain_of_rank must name {expert_map.num_ranks} ranks, got {len(domain_of_rank)}")
    slots = live_slots(expert_map, ranks)
    rank_of_slot = expert_map.rank_of_slot
    domains = [domain_of_rank[rank] if domain_of_rank is not None else str(rank) for rank in ranks]
    chosen = np.full((len(ranks), expert_map.num_layers, expert_map.num_logical_experts), NO_SLOT, dtype=np.int64)
    choice_of_row: dict[tuple[int, ...], IntArray] = {}
    for layer_idx, row in enumerate(expert_map.logical_of_slot):
        if row not in choice_of_row:  # layers often share one assignment
            copies_of: list[list[int]] = [[] for _ in range(expert_map.num_logical_experts)]
            for slot in slots.tolist():
                if row[slot] != EMPTY_SLOT:
                    copies_of[row[slot]].append(slot)
            choice = np.full((len(ranks), expert_map.num_logical_experts), NO_SLOT, dtype=np.int64)
            for logical, copies in enumerate(copies_of):
                if len(copies) == 1:
                    choice[:, logical] = copies[0]
                elif copies:
                    choice[:, logical] = _deal(copies, [rank_of_slot[slot] for slot in copies], ranks, domains, logical)
            choice_of_row[row] = choice
        chosen[:, layer_idx] = choice_of_row[row]
    return chosen


def _deal(
    copies: Sequence[int], holders: Sequence[int], ranks: Sequence[int], domains: Sequence[str], first: int
) -> list[int]:
    """One expert's copy for each source. `first` turns the order of the copies: not always the same ones get more."""
    num_copies = len(copies)
    part, rest = divmod(len(ranks), num_copies)
    room = [part + ((place - first) % num_copies < rest) for place in range(num_copies)]
    chosen: list[int | None] = [None] * len(ranks)
    place_of_holder = {rank: place for place, rank in enumerate(holders)}
    for index, rank in enumerate(ranks):
        if rank in place_of_holder:
            chosen[index] = place_of_holder[rank]
            room[place_of_holder[rank]] -= 1
    domain_of = dict(zip(ranks, domains, strict=True))
    for index, domain in enumerate(domains):
        near = [place for place, holder in enumerate(holders) if domain_of[holder] == domain and room[place] > 0]
        if chosen[index] is None and near:
            chosen[index] = max(near, key=lambda place: (room[place], -((place - first) % num_copies)))
            room[chosen[index] or 0] -= 1
    for index, place in enumerate(chosen):
        if place is None:
            chosen[index] = max(range(num_copies), key=lambda p: (room[p], -((p - first) % num_copies)))
            room[chosen[index] or 0] -= 1
    return [copies[place or 0] for place in chosen]
