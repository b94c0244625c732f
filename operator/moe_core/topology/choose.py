"""Which domains a gang takes, and how many ranks in each: rules 2 and 3 of fit.py, stage by stage."""

import numpy as np

from moe_core.topology.board import Board
from moe_core.topology.deal import pour
from moe_core.topology.score import pairs_apart
from moe_core.topology.tree import IntArray, Span


def spread(board: Board, span: Span, wanted: int) -> IntArray | None:
    """Ranks per domain of the narrowest stage. None if no domain of the required level in `span` holds them all."""
    shares = np.zeros(len(board.tree.starts[board.shape.narrowest]), np.int64)
    done = _spread(board, span, board.shape.required, board.shape.stages, wanted=wanted, shares=shares)
    return shares if done else None


def _spread(board: Board, span: Span, floor: int, stages: tuple[int, ...], *, wanted: int, shares: IntArray) -> bool:
    stage, *deeper = stages
    found = _narrowest(board, span, floor, wanted, stage)
    if found is None:
        return False
    share_of = _share_out(board, found, wanted, stage)
    if not deeper:
        shares[found] += share_of
        return True
    return all(
        _spread(board, board.tree.span(stage, int(domain)), stage, tuple(deeper), wanted=int(share), shares=shares)
        for domain, share in zip(found, share_of, strict=True)
        if share
    )


def _narrowest(board: Board, span: Span, floor: int, wanted: int, stage: int) -> IntArray | None:
    """Domains of `stage` in the narrowest domain, no broader than `floor`, that holds `wanted` and all kept ranks.

    Of several as narrow: the one that needs the fewest domains, then with the least traffic between them, then the
    tightest, then the first path.
    """
    for depth in range(stage, floor - 1, -1):
        first, after = board.tree.domains_in(depth, span)
        caps = board.caps[depth][first:after]
        roomy = first + np.flatnonzero(caps >= wanted)
        holders = first + np.flatnonzero(board.kept_in[depth][first:after])
        if len(holders):
            roomy = roomy[roomy == holders[0]] if len(holders) == 1 else roomy[:0]
        if not len(roomy):
            continue
        if depth == stage < board.shape.narrowest:
            return np.array([_best_inside(board, roomy, wanted, stage)])
        if depth == stage:
            tightest = roomy[np.argmin(board.caps[depth][roomy])]
            return np.array([tightest])
        options = (_fewest(board, depth, int(domain), wanted, stage) for domain in roomy)
        return min(options, key=lambda option: _traffic(board, option, wanted, depth, stage))
    return None


def _best_inside(board: Board, domains: IntArray, wanted: int, stage: int) -> int:
    """The one that needs the fewest domains of the narrowest stage: the next stage can only choose inside of it."""
    narrowest = board.shape.narrowest
    options = {int(domain): _fewest(board, stage, int(domain), wanted, narrowest) for domain in domains}
    return min(options, key=lambda domain: _traffic(board, options[domain], wanted, stage, narrowest))


def _fewest(board: Board, depth: int, domain: int, wanted: int, stage: int) -> IntArray:
    """Domains of `stage` in one broader domain: the fewest of the level below it, in them the fewest of the next.

    Broad levels first, because their links are the narrow ones: one rack more costs less than one block more. Domains
    with kept ranks are in use anyway; of the others the largest first, and the tightest that will do comes last.
    """
    tree = board.tree
    chosen = np.array([domain])
    for level in range(depth + 1, stage + 1):
        inside = np.concatenate([np.arange(*tree.domains_in(level, tree.span(level - 1, int(of)))) for of in chosen])
        is_home = board.kept_in[level][inside] > 0
        homes, caps = inside[is_home], board.caps[level]
        chosen = np.sort(np.append(homes, _largest(inside[~is_home], caps, wanted - int(caps[homes].sum()))))
    return chosen


def _largest(domains: IntArray, caps: IntArray, missing: int) -> IntArray:
    """The fewest that hold `missing`; ties go to the first path."""
    if missing <= 0:
        return domains[:0]
    order = domains[np.lexsort((domains, -caps[domains]))]
    num_full = int(np.searchsorted(np.cumsum(caps[order]), missing))
    full, rest = order[:num_full], order[num_full:]
    enough = rest[caps[rest] >= missing - int(caps[full].sum())]
    return np.append(full, enough[np.lexsort((enough, caps[enough]))[0]])


def _traffic(board: Board, domains: IntArray, wanted: int, depth: int, stage: int) -> tuple[list[int], list[int], int]:
    """Sorts by domains of each level, broad to narrow, then by pairs of ranks across them, then by room."""
    share_of = _share_out(board, domains, wanted, stage)
    parents = [board.tree.parents(stage, domains, level) for level in range(depth + 1, stage)]
    by_level = [np.bincount(of, weights=share_of) for of in parents]
    num_domains = [int(np.count_nonzero(ranks)) for ranks in by_level] + [len(domains)]
    room = int(board.caps[depth][board.tree.parents(stage, domains[:1], depth)[0]])
    return num_domains, [pairs_apart(ranks) for ranks in by_level], room


def _share_out(board: Board, domains: IntArray, wanted: int, stage: int) -> IntArray:
    """Evenly; what comes back to kept ranks fills their domains before it opens others."""
    unit = board.shape.group_size if stage <= board.shape.group_depth else board.unit
    room, kept = board.caps[stage][domains] // unit, board.kept_in[stage][domains]
    home_room = np.where(kept > 0, room, 0)
    at_home = min(wanted // unit, int(home_room.sum()))
    share_of = _pour(home_room, kept // unit, at_home)
    return (share_of + _pour(room - home_room, kept // unit, wanted // unit - at_home)) * unit


def _pour(room: IntArray, load: IntArray, wanted: int) -> IntArray:
    return pour(room, load, np.array([wanted]), np.array([0]))
