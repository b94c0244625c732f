"""Which live copy of an expert a source rank sends its tokens to.

A source spreads its tokens over WAYS: token t goes the way t mod WAYS, and each way names one copy of every expert. A
way of one source is a lane, and an expert's lanes are dealt to its copies:

    how many    each copy gets its part of all lanes (parts.py), within one lane
    to whom     its own rank first: no bytes on the wire; then sources in its failure domain; then the rest

What cannot all be near is dealt in turn, so that no source and no copy always comes last. All of it follows from the
map, the live ranks and their domains: every rank can compute every other rank's choice, and nobody has to ask.

On paper the sources stand in one line, domain by domain; each copy takes the lanes of its own rank, the lanes left in
its domain and then in the whole line are met, in order, with the room that copies there have left. So a source finds
its lanes by counting, without walking through the others'.

U kinds of layers (layers often share one assignment), M experts of a kind with several live copies, C their copies,
W ways, R live ranks, G domains.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import IntArray
from moe_core.experts.parts import live_slots, sums_so_far, weights_of_slots
from moe_core.outcome import InvalidInput

NO_SLOT = -1
WAYS = 16
"""A lane of an expert with a sixth of all picks (the hottest of 256 by Zipf) is 1 % of what a rank carries; 8 ways make
it 2 %. 16 take 40 ms of a new epoch for 320 ranks of 61 layers, 32 take 65."""
_ORDER_W = np.asarray([0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15], dtype=np.int64)
"""Of a source's lanes, by way (van der Corput's sequence): a step of few tokens meets the parts as well as it can."""
_GOLDEN = 0.618
"""Turns by this part of a circle spread over it evenly, however few they are."""


def choose_slots(
    expert_map: ExpertMap,
    live_ranks: Collection[int],
    *,
    source_rank: int,
    domain_of_rank: Sequence[str] | None = None,
) -> IntArray:
    """[W, L, E] global slot id that `source_rank` uses for each logical expert, NO_SLOT where no copy lives.

    W is WAYS, or 1 while no expert has a second live copy. domain_of_rank: a name for each rank of the map; without it
    no two ranks are near each other. Raises InvalidInput unless `source_rank` is one of `live_ranks` and the map knows
    them all.
    """
    return deal_lanes(expert_map, live_ranks, domain_of_rank=domain_of_rank).of_source(source_rank)


@dataclass(frozen=True, slots=True)
class Lanes:
    """What all sources have in common; `of_source` tells them apart.

    Copies stand in the order of their expert, domain and slot. lanes_3C: how many each takes from its own rank, from
    others in its domain, from elsewhere. All of them in one line, first the own ones of all copies, then the near, then
    the far: ends_3C says where each copy's end, first_3M where each expert's begin.
    """

    ranks: tuple[int, ...]
    domain_R: IntArray
    place_R: IntArray
    """Among the sources of the same domain."""
    size_G: IntArray
    kind_L: IntArray
    only_UE: IntArray
    """The slot of the only live copy, NO_SLOT where there is none, anything where there are several."""
    expert_M: IntArray
    """Index into only_UE, flat."""
    turn_M: IntArray
    unit_C: IntArray
    source_C: IntArray
    slot_C: IntArray
    lanes_3C: IntArray
    ends_3C: IntArray
    first_3M: IntArray

    def of_source(self, source_rank: int) -> IntArray:
        """[W, L, E], see `choose_slots`. Raises InvalidInput unless `source_rank` lives."""
        if source_rank not in self.ranks:
            raise InvalidInput(f"source_rank must be one of live_ranks {list(self.ranks)}, got {source_rank}")
        num_ways = WAYS if len(self.expert_M) else 1
        chosen_WX = np.tile(self.only_UE.reshape(1, -1), (num_ways, 1))
        if len(self.expert_M):
            chosen_WX[:, self.expert_M] = self._of_shared(self.ranks.index(source_rank))
        return chosen_WX.reshape(num_ways, *self.only_UE.shape)[:, self.kind_L]

    def _of_shared(self, source: int) -> IntArray:
        """[W, M] slot for each expert with several copies."""
        domain = int(self.domain_R[source])
        domain_C = self.domain_R[self.source_C]
        is_earlier_C, is_here_C = domain_C < domain, domain_C == domain
        is_before_C = is_here_C & (self.source_C < source)
        own_C, near_C, _ = self.lanes_3C
        mine_M = self._sum(own_C, self.source_C == source)
        near_M = self._sum(near_C, is_here_C)
        # the lanes of this domain that are not their own rank's: near_M of them stay in it, evenly spread
        open_M = np.maximum(1, WAYS * int(self.size_G[domain]) - self._sum(own_C, is_here_C))
        lane_WM = _ORDER_W[(np.arange(WAYS)[:, None] + self.turn_M) % WAYS]
        at_WM = WAYS * int(self.place_R[source]) - self._sum(own_C, is_before_C) + lane_WM - mine_M
        shift_M = self.turn_M * np.maximum(1, (open_M * _GOLDEN).astype(np.int64)) % open_M
        nears_before_WM = (at_WM * near_M + shift_M) // open_M
        is_near_WM = ((at_WM + 1) * near_M + shift_M) // open_M > nears_before_WM
        fars_before_M = WAYS * int(self.size_G[:domain].sum()) - self._sum(own_C + near_C, is_earlier_C)
        own_first_M, near_first_M, far_first_M = self.first_3M
        own_WM = own_first_M + self._sum(own_C, is_earlier_C | is_before_C) + lane_WM
        near_WM = near_first_M + self._sum(near_C, is_earlier_C) + nears_before_WM
        far_WM = far_first_M + fars_before_M + at_WM - nears_before_WM
        place_WM = np.where(lane_WM < mine_M, own_WM, np.where(is_near_WM, near_WM, far_WM))
        slot_WM: IntArray = self.slot_C[np.searchsorted(self.ends_3C, place_WM, side="right") % len(self.slot_C)]
        return slot_WM

    def _sum(self, lanes_C: IntArray, where_C: NDArray[np.bool_]) -> IntArray:
        """[M] over each expert's copies."""
        return np.bincount(self.unit_C, np.where(where_C, lanes_C, 0), minlength=len(self.expert_M)).astype(np.int64)


def deal_lanes(
    expert_map: ExpertMap, live_ranks: Collection[int], *, domain_of_rank: Sequence[str] | None = None
) -> Lanes:
    """All lanes of all experts with several live copies; see `choose_slots`."""
    ranks = sorted(set(live_ranks))
    if domain_of_rank is not None and len(domain_of_rank) < expert_map.num_ranks:
        raise InvalidInput(f"domain_of_rank must name {expert_map.num_ranks} ranks, got {len(domain_of_rank)}")
    slots = live_slots(expert_map, ranks)
    weight_LX = weights_of_slots(expert_map, slots)
    names = [domain_of_rank[rank] if domain_of_rank is not None else str(rank) for rank in ranks]
    domains = {name: index for index, name in enumerate(dict.fromkeys(names))}
    domain_R = np.asarray([domains[name] for name in names], dtype=np.int64)
    size_G = np.bincount(domain_R)
    by_domain_R = np.argsort(domain_R, kind="stable")
    place_R = np.empty_like(domain_R)
    place_R[by_domain_R] = np.arange(len(ranks)) - (np.cumsum(size_G) - size_G)[domain_R[by_domain_R]]

    first_L, kind_L = _kinds(np.concatenate([expert_map.table_LS[:, slots], weight_LX], axis=1))
    logical_UX, num_experts = expert_map.table_LS[:, slots][first_L], expert_map.num_logical_experts
    kind_N, x_N = np.nonzero(logical_UX != EMPTY_SLOT)
    expert_N = kind_N * num_experts + logical_UX[kind_N, x_N]
    copies_X = np.bincount(expert_N, minlength=len(first_L) * num_experts)
    only_X = np.full(len(copies_X), NO_SLOT, dtype=np.int64)
    only_X[expert_N] = slots[x_N]
    expert_M = np.flatnonzero(copies_X > 1)
    is_shared_N = copies_X[expert_N] > 1
    kind_C, x_C = kind_N[is_shared_N], x_N[is_shared_N]
    unit_C = np.searchsorted(expert_M, expert_N[is_shared_N])
    source_C = np.searchsorted(ranks, np.asarray(expert_map.rank_of_slot, dtype=np.int64)[slots[x_C]])
    order_C = np.lexsort((x_C, domain_R[source_C], unit_C))
    unit_C, source_C, kind_C, x_C = unit_C[order_C], source_C[order_C], kind_C[order_C], x_C[order_C]
    turn_M = expert_M % num_experts
    lanes_C = _rounded(unit_C, weight_LX[first_L][kind_C, x_C], turn_M, WAYS * len(ranks))
    lanes_3C = _by_nearness(unit_C, source_C, domain_R, size_G, lanes_C)
    total_3M = np.stack([np.bincount(unit_C, row, minlength=len(expert_M)) for row in lanes_3C]).astype(np.int64)
    return Lanes(
        ranks=tuple(ranks),
        domain_R=domain_R,
        place_R=place_R,
        size_G=size_G,
        kind_L=kind_L,
        only_UE=only_X.reshape(-1, num_experts),
        expert_M=expert_M,
        turn_M=turn_M,
        unit_C=unit_C,
        source_C=source_C,
        slot_C=slots[x_C],
        lanes_3C=lanes_3C,
        ends_3C=np.cumsum(lanes_3C),
        first_3M=(np.cumsum(total_3M) - total_3M.ravel()).reshape(total_3M.shape),
    )


def _kinds(rows_LX: IntArray) -> tuple[IntArray, IntArray]:
    """([U] the first layer of each kind, [L] the kind of each layer)."""
    kinds: dict[bytes, tuple[int, int]] = {}
    kind_L = [kinds.setdefault(row.tobytes(), (len(kinds), layer_idx))[0] for layer_idx, row in enumerate(rows_LX)]
    return np.asarray([layer_idx for _, layer_idx in kinds.values()], dtype=np.int64), np.asarray(
        kind_L, dtype=np.int64
    )


def _rounded(unit_C: IntArray, weight_C: IntArray, turn_M: IntArray, num_lanes: int) -> IntArray:
    """[C] whole lanes in proportion to the weights, `num_lanes` for each expert. The turn says who is rounded up."""
    copies_M = np.bincount(unit_C, minlength=len(turn_M))
    total_M = np.bincount(unit_C, weight_C, minlength=len(turn_M)).astype(np.int64)
    shift_M = turn_M % copies_M * total_M // copies_M
    ends_C = (sums_so_far(unit_C, weight_C) * num_lanes + shift_M[unit_C]) // total_M[unit_C]
    starts_C = np.zeros_like(ends_C)
    starts_C[1:] = np.where(unit_C[1:] == unit_C[:-1], ends_C[:-1], 0)
    return ends_C - starts_C


def _by_nearness(
    unit_C: IntArray, source_C: IntArray, domain_R: IntArray, size_G: IntArray, lanes_C: IntArray
) -> IntArray:
    """[3, C] of each copy's lanes those of its own rank, of others in its domain, of others elsewhere."""
    num_sources = len(domain_R)
    held_C = sums_so_far(unit_C * num_sources + source_C, lanes_C)  # copies may share a rank
    own_C = np.clip(WAYS - (held_C - lanes_C), 0, lanes_C)
    room_C = lanes_C - own_C
    group_C = unit_C * len(size_G) + domain_R[source_C]
    _, first_C, group_C = np.unique(group_C, return_index=True, return_inverse=True)
    size_of_group = size_G[domain_R[source_C[first_C]]]
    open_of_group = WAYS * size_of_group - np.bincount(group_C, own_C).astype(np.int64)
    near_C = np.clip(open_of_group[group_C] - (sums_so_far(group_C, room_C) - room_C), 0, room_C)
    return np.stack([own_C, near_C, room_C - near_C])
