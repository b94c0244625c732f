"""Copies of an expert on one of few fixed groups of ranks: fewer distinct sets of hosts are fewer ways to lose one.

Two ranks that fail lose an expert if they are all its hosts. With copies scattered, soon every pair of ranks hosts some
expert of some layer, and any two failures lose one; with ranks in fixed pairs that hold the same experts, only the two
of a pair do. The idea is that of copysets (Cidon et al., USENIX ATC 2013), there for the blocks of a file system; here
the groups are the same in every layer.

A group acts as one wide rank: experts are packed onto groups as copies are packed onto ranks (pack.py), and each member
of a group gets a copy. An expert that is hot enough for more copies than a group has members gets a second group.
"""

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from moe_core.experts.align import copies_in
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.counts import count_copies
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import pack
from moe_core.experts.shelf import Shelf

Group = tuple[int, ...]


def mirror_groups(fleet: Fleet, size: int) -> tuple[Group, ...]:
    """Ranks in groups of `size`, or a few more where they do not divide; each in distinct domains as far as possible.

    The next group takes a rank from each of the domains with the most ranks left, which leaves none over that could be
    in a group, and makes groups of the same domains: few sets of domains, too. Widest and fastest ranks come first, so
    that members are alike. Where no domains are known, alike ranks far apart by number make a group: ranks are numbered
    along the tree (topology/fit.py), so neighbours share a node.
    """
    by_width = sorted(np.flatnonzero(fleet.slots_R).tolist(), key=lambda r: (-fleet.slots_R[r], -fleet.speed_R[r], r))
    are_alike = len({(fleet.slots_R[rank], fleet.speed_R[rank]) for rank in by_width}) == 1
    if are_alike and fleet.num_domains == fleet.num_ranks:
        stride = len(by_width) // size
        by_width = [by_width[g + m * stride] for g in range(stride) for m in range(size)] + by_width[stride * size :]
    ranks_of: dict[int, deque[int]] = {}
    for rank in by_width:
        ranks_of.setdefault(int(fleet.domain_R[rank]), deque()).append(rank)
    by_left = [(-len(ranks), place, domain) for place, (domain, ranks) in enumerate(ranks_of.items())]
    heapify(by_left)
    groups: list[list[int]] = []
    for _ in range(len(by_width) // size):
        group: list[int] = []
        while len(group) < size:
            chosen = [heappop(by_left) for _ in range(min(size - len(group), len(by_left)))]
            group += [ranks_of[domain].popleft() for _, _, domain in chosen]
            for left, place, domain in chosen:
                if left < -1:
                    heappush(by_left, (left + 1, place, domain))
        groups.append(group)
    for rank in (r for ranks in ranks_of.values() for r in ranks):
        met = [sum(fleet.domain_R[r] == fleet.domain_R[rank] for r in group) for group in groups]
        groups[min(range(len(groups)), key=lambda g: (len(groups[g]), met[g], g))].append(rank)
    return tuple(tuple(sorted(group)) for group in groups)


def pack_mirrored(load_LE: FloatArray, fleet: Fleet, size: int) -> Shelf | None:
    """A layout in which each expert is on all ranks of a group of `size`, or of several; None where it does not fit."""
    num_experts = load_LE.shape[1]
    groups = mirror_groups(fleet, size)
    if not groups:
        return None
    wide = _as_wide_ranks(fleet, groups, size)
    if wide.room_for(num_experts) < num_experts:
        return None
    copies_LE = count_copies(load_LE, wide.room_for(num_experts), most=len(groups))
    by_group = pack(load_LE, copies_LE, wide)
    logical_LRS = np.full((len(load_LE), fleet.num_ranks, int(fleet.slots_R.max())), num_experts, dtype=np.int64)
    for index, group in enumerate(groups):
        held_LS = by_group.logical_LRS[:, index, : wide.slots_of_rank[index]]
        mirrored = _mirrored(held_LS, by_group.per_copy_LX, _only(fleet, group), size)
        logical_LRS[:, list(group), : mirrored.shape[2]] = mirrored
    logical_LRS[:, ~fleet.exists_RS] = num_experts + 1
    return filled(load_LE, fleet, logical_LRS)


def _as_wide_ranks(fleet: Fleet, groups: Sequence[Group], size: int) -> Fleet:
    """One rank for each group; its members share an expert's load evenly, so the slowest sets the speed."""
    slots, speeds = [], []
    for group in groups:
        of_member = fleet.slots_R[list(group)]
        fits = [n for n in range(int(of_member.sum()) // size + 1) if np.minimum(of_member, n).sum() >= n * size]
        slots.append(fits[-1])
        speeds.append(len(group) * float(fleet.speed_R[list(group)].min()))
    domains = tuple(repr(sorted(fleet.domain_R[list(group)].tolist())) for group in groups)
    return Fleet(tuple(slots), tuple(speeds), domains)


def _only(fleet: Fleet, group: Group) -> Fleet:
    members = list(group)
    return Fleet(
        tuple(fleet.slots_R[members].tolist()),
        tuple(fleet.speed_R[members].tolist()),
        tuple(str(domain) for domain in fleet.domain_R[members]),
    )


def _mirrored(held_LS: IntArray, per_copy_LX: FloatArray, members: Fleet, size: int) -> IntArray:
    """[L, members, S] what the group holds, on each of them; where they are more than `size`, on so many of them."""
    if members.num_ranks == size:
        return np.repeat(held_LS[:, None], size, axis=1)
    num_experts = per_copy_LX.shape[1] - 2
    load_LS = np.take_along_axis(per_copy_LX, held_LS, axis=1)
    inner = pack(load_LS, np.where(held_LS < num_experts, size, 0), members).logical_LRS
    names_LX = np.concatenate([held_LS, np.full((len(held_LS), 2), num_experts)], axis=1)
    return np.take_along_axis(names_LX[:, None, :], inner, axis=2)


def filled(load_LE: FloatArray, fleet: Fleet, logical_LRS: IntArray) -> Shelf:
    """A shelf in which empty slots take one more copy each: of the hottest expert that does not make the rank the
    heaviest, else of the coldest. A further copy can only help an expert to survive.
    """
    num_experts = load_LE.shape[1]
    shelf = Shelf.of(load_LE, copies_in(logical_LRS, num_experts), fleet, logical_LRS)
    for rank, place in np.argwhere((logical_LRS == num_experts).any(0)):
        lacks_LE = ~(logical_LRS[:, rank, :, None] == np.arange(num_experts)).any(1)
        layer = np.flatnonzero((logical_LRS[:, rank, place] == num_experts) & lacks_LE.any(1))
        more_NE = load_LE[layer] / (shelf.copies_LE[layer] + 1) / fleet.speed_R[rank]
        is_light_NE = shelf.load_LR[layer, rank, None] + more_NE <= shelf.load_LR[layer].max(1, keepdims=True)
        wish_NE = np.where(is_light_NE, more_NE, -more_NE)
        chosen_N = np.where(lacks_LE[layer], wish_NE, -np.inf).argmax(1)
        logical_LRS[layer, rank, place] = chosen_N
        shelf.copies_LE[layer, chosen_N] += 1
        shelf.take(layer, Shelf.of(load_LE[layer], shelf.copies_LE[layer], fleet, logical_LRS[layer]))
    return shelf
