"""Which domains a gang takes, and how many ranks in each: rules 2 and 3 of fit.py, stage by stage."""

import numpy as np

from moe_core.topology.board import Board
from moe_core.topology.deal import pour
from moe_core.topology.fewest import fewest_parents, largest_first
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

    Of several as narrow: the one that needs the fewest domains, then with the least traffic between the levels above
    them, then the tightest, then the first path.
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
        if depth == stage:
            tightest = roomy[np.argmin(board.caps[depth][roomy])]
            return np.array([tightest])
        options = [_Option(board, depth, int(domain), wanted, stage) for domain in roomy]
        fewest = min(option.num_new for option in options)
        options = [option for option in options if option.num_new == fewest]
        if len(options) > 1 and stage - depth > 1:
            return min(options, key=_Option.by_traffic).choice()
        return min(options, key=lambda option: option.cap).choice()
    return None


class _Option:
    """Domains of `stage` inside one broader domain."""

    def __init__(self, board: Board, depth: int, domain: int, wanted: int, stage: int) -> None:
        self._board, self._depth, self._wanted, self._stage = board, depth, wanted, stage
        inside = np.arange(*board.tree.domains_in(stage, board.tree.span(depth, domain)))
        kept = board.kept_in[stage][inside] > 0
        caps = board.caps[stage]
        self.cap = int(board.caps[depth][domain])
        self._homes = inside[kept]
        """Kept ranks make their domains free of charge: they are in use anyway."""
        self._missing = max(0, wanted - int(caps[self._homes].sum()))
        self._others = largest_first(inside[~kept], caps)
        grown = np.cumsum(caps[self._others])
        self.num_new = int(np.searchsorted(grown, self._missing)) + 1 if self._missing else 0

    def choice(self) -> IntArray:
        """The fewest domains, of them in the fewest domains of every level above: largest first, the last tightest."""
        tree, caps = self._board.tree, self._board.caps[self._stage]
        others = self._others
        if self.num_new:
            for level in range(self._depth + 1, self._stage):
                parents = tree.parents(self._stage, others, level)
                at_home = set(tree.parents(self._stage, self._homes, level).tolist())
                others = fewest_parents(others, caps, parents, at_home, num=self.num_new, missing=self._missing)
            full = others[: self.num_new - 1]
            rest = self._missing - int(caps[full].sum())
            enough = others[self.num_new - 1 :][caps[others[self.num_new - 1 :]] >= rest]
            others = np.append(full, enough[np.lexsort((enough, caps[enough]))[0]])
        else:
            others = others[:0]
        return np.sort(np.append(self._homes, others))

    def by_traffic(self) -> tuple[list[int], list[int], int]:
        """Sorts by domains of the levels above, broad to narrow, then by pairs of ranks across them, then by room."""
        found = self.choice()
        share_of = _share_out(self._board, found, self._wanted, self._stage)
        levels = range(self._depth + 1, self._stage)
        by_level = [np.bincount(self._board.tree.parents(self._stage, found, d), weights=share_of) for d in levels]
        num_domains = [int(np.count_nonzero(ranks)) for ranks in by_level]
        return num_domains, [pairs_apart(ranks) for ranks in by_level], self.cap


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
