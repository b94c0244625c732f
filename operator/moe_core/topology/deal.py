"""How many ranks go to each domain and node, and which: evenly, then numbered along the tree."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from moe_core.topology.tree import IntArray, Tree


def pour(room: IntArray, load: IntArray, wanted: IntArray, starts: IntArray) -> IntArray:
    """Ranks per place, as if dealt one at a time to the place with the least load, the first of equals.

    Places are runs that begin at `starts`; `wanted[i]` ranks are poured over run i and must have room there. All runs
    rise at once: the water level of each is found by halving.
    """
    if not len(starts):
        return np.zeros(0, np.int64)
    run_of_place = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(room)))
    low, high = np.zeros(len(starts), np.int64), np.full(len(starts), int((room + load).max(initial=0)) + 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        below = np.add.reduceat(np.clip(middle[run_of_place] - load, 0, room), starts) <= wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    taken: IntArray = np.clip(low[run_of_place] - load, 0, room)
    left = wanted - np.add.reduceat(taken, starts)
    takes_more = (taken < room) & (load <= low[run_of_place])
    before: IntArray = np.cumsum(takes_more) - takes_more
    place_in_run: IntArray = before - before[starts][run_of_place]
    return np.where(takes_more & (place_in_run < left[run_of_place]), taken + 1, taken)


def fill(room: IntArray, load: IntArray, wanted: IntArray, starts: IntArray) -> IntArray:
    """Like pour, but node after node: those that hold ranks already, then those with the most room."""
    run_of_place = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(room)))
    order = np.lexsort((-room, -load, run_of_place))
    in_order = room[order]
    before = np.cumsum(in_order) - in_order
    before -= before[starts][run_of_place]
    taken = np.zeros_like(room)
    taken[order] = np.clip(wanted[run_of_place] - before, 0, in_order)
    return taken


def number_ranks(tree: Tree, ranks: Sequence[int], taken: IntArray, kept: Mapping[int, int]) -> dict[int, int]:
    """Node of each rank, so that neighbours by number are neighbours by wire.

    A new gang is numbered along the tree. Beside kept ranks (rank to node) each rank goes to the node, else the
    narrowest domain, of the kept rank nearest to it by number, as far as there are places; the others along the tree.
    """
    places = np.repeat(np.arange(len(taken)), taken)
    left = sorted(ranks)
    if not kept:
        return dict(zip(left, places.tolist(), strict=True))
    known = sorted(kept)
    neighbours = {rank: [kept[near] for near in _nearest(known, rank)] for rank in left}
    node_of_rank: dict[int, int] = {}
    for depth in range(len(tree.levels) + 1, 0, -1):
        domains = [places, np.fromiter(kept.values(), np.int64)]
        if depth <= len(tree.levels):
            domains = [tree.domain_of(depth, nodes) for nodes in domains]
        domain_of_kept = dict(zip(kept.values(), domains[1].tolist(), strict=True))
        open_in: dict[int, list[int]] = {}
        for place, domain in reversed(list(enumerate(domains[0].tolist()))):
            open_in.setdefault(domain, []).append(place)
        used: list[int] = []
        for rank in left:
            home = next((d for n in neighbours[rank] if open_in.get(d := domain_of_kept[n])), None)
            if home is not None:
                used.append(open_in[home].pop())
                node_of_rank[rank] = int(places[used[-1]])
        left = [rank for rank in left if rank not in node_of_rank]
        places = np.delete(places, used)
    return {**node_of_rank, **dict(zip(left, places.tolist(), strict=True))}


def _nearest(known: Sequence[int], rank: int) -> list[int]:
    """The kept ranks below and above, the nearer one first, the lower one of equals."""
    at = bisect_left(known, rank)
    return sorted(known[max(0, at - 1) : at + 1], key=lambda near: (abs(near - rank), near))
