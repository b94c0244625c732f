"""The least of a change that lets a gang fit: nodes to open, places to free. Found by halving over the same fit."""

from dataclasses import replace

import numpy as np

from moe_core.topology.attempt import Ask, Placed, Stuck, attempt, count_kept
from moe_core.topology.board import board_of
from moe_core.topology.deal import fill
from moe_core.topology.tree import IntArray, Span

MOST_DOMAINS = 8
"""Domains that are tried, those with the most room first: as a rule they need the least."""


def fits(ask: Ask, free: IntArray) -> bool:
    return isinstance(attempt(ask, free), Placed)


def fewest_nodes(ask: Ask, stuck: Stuck, free: IntArray, gain: IntArray) -> list[int] | None:
    """Nodes of one domain to open, those that gain the most first; None if all together are too few."""
    if not fits(ask, free + gain):
        return None
    best = np.flatnonzero(gain)
    for low, high in _roomiest(ask, stuck, free + gain):
        closed = low + np.flatnonzero(gain[low:high])
        closed = closed[np.lexsort((closed, -gain[closed]))]
        count = _least_that_fits(ask, free, closed, gain[closed], by_node=True)
        if count is not None and count < len(best):
            best = closed[:count]
    return sorted(best.tolist())


def fewest_places(ask: Ask, stuck: Stuck, free: IntArray, used: IntArray | None) -> int | None:
    """Places that must come free in one domain: of those `used` per node, or (None) on new nodes of that domain.

    None if that does not help. Where whole subgroups are wanted, domains that lack the least for one more come first.
    """
    tree, shape = ask.tree, ask.shape
    leaf = shape.group_depth if shape.group_size > 1 else shape.narrowest
    if used is None:
        free = board_of(tree, shape, free=free, kept=count_kept(ask)).room
        ask = replace(ask, shape=replace(shape, ranks_per_node=0))
        used = np.zeros_like(free)
        used[tree.starts[leaf]] = (1 + shape.spares) * len(ask.ranks)
    lacking = shape.group_size - (tree.sums(free, leaf) - shape.spares) % shape.group_size
    lacking += np.maximum(0, shape.spares - tree.sums(free, leaf)) // shape.group_size * shape.group_size
    first = fill(used, np.zeros_like(used), lacking, tree.starts[leaf])
    least: int | None = None
    for low, high in _roomiest(ask, stuck, free + used):
        nodes = np.arange(low, high)
        domain = tree.domain_of(leaf, nodes)
        nodes = nodes[np.lexsort((nodes, domain, lacking[domain]))]
        nodes, places = np.tile(nodes, 2), np.concatenate([first[nodes], (used - first)[nodes]])
        count = _least_that_fits(ask, free, nodes, places, by_node=False)
        least = count if least is None or (count is not None and count < least) else least
    return least


def _roomiest(ask: Ask, stuck: Stuck, free: IntArray) -> list[Span]:
    first, after = ask.tree.domains_in(stuck.depth, stuck.span)
    room = ask.tree.sums(free, stuck.depth)[first:after]
    return [ask.tree.span(stuck.depth, first + int(at)) for at in np.argsort(-room, kind="stable")[:MOST_DOMAINS]]


def _least_that_fits(ask: Ask, free: IntArray, nodes: IntArray, places: IntArray, *, by_node: bool) -> int | None:
    """How many of `places` on `nodes`, from the first, must be added: whole nodes, or single places."""
    before = np.cumsum(places) - places

    def fits_with(count: int) -> bool:
        added = np.where(np.arange(len(nodes)) < count, places, 0) if by_node else (count - before).clip(0, places)
        room = free.copy()
        np.add.at(room, nodes, added)
        return fits(ask, room)

    low, high = 0, len(nodes) if by_node else int(places.sum())
    if not fits_with(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits_with(middle) else (middle, high)
    return high
