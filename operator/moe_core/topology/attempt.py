"""One try at a gang fit: the rules of fit.py over the rooms that it is given. relax.py tries changed asks with it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_core.outcome import InvalidInput
from moe_core.topology.board import Board, board_of, for_one_subgroup
from moe_core.topology.choose import spread
from moe_core.topology.deal import fill, number_ranks, pour
from moe_core.topology.room import Needs, Rooms, Use, rooms
from moe_core.topology.shape import Shape
from moe_core.topology.tree import BoolArray, IntArray, Span, Tree


@dataclass(frozen=True, slots=True)
class Ask:
    tree: Tree
    shape: Shape
    needs: Needs
    ranks: Sequence[int]
    """To be placed, sorted."""
    kept: Mapping[int, int]
    """Rank to node index, for those that stay."""
    own: Use
    outside: Collection[int] = ()
    """Ranks that stay on nodes outside the tree: deleted, or without a label that counts."""

    def rooms(self, *, ignoring: Sequence[str] = ()) -> Rooms:
        most = len(self.ranks) + self.shape.spares
        return rooms(self.tree, self.needs, own=self.own, most=most, ignoring=ignoring)


@dataclass(frozen=True, slots=True)
class Placed:
    node_of_rank: Mapping[int, int]
    spare_nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stuck:
    """No domain of `depth` in `span` holds `wanted` ranks; `board` has the numbers."""

    wanted: int
    depth: int
    span: Span
    board: Board
    is_return: bool
    """They would have to return to the rest of their subgroup."""


def attempt(ask: Ask, free: IntArray) -> Placed | Stuck:
    """`free` places per node. Ranks that go back to a living subgroup come first: they have no choice of domain."""
    board = board_of(ask.tree, ask.shape, free=free, kept=count_kept(ask))
    kept, node_of_rank = dict(ask.kept), {}
    asked = np.zeros(len(ask.tree.nodes), bool)
    for home, ranks in _by_home(ask, board):
        if home is None:
            _check_whole(ask, len(ranks))
            part, span = board, board.fixed_span(ask.shape.required) or (0, len(ask.tree.nodes))
        else:
            part, span = for_one_subgroup(board), home
        taken = _place(part, span, len(ranks))
        if taken is None:
            return Stuck(len(ranks), part.shape.required, span, part, is_return=home is not None)
        new = number_ranks(ask.tree, ranks, taken, _near(kept, ask.shape, ranks))
        node_of_rank.update(new)
        kept.update(new)
        board = board.after(taken)
        asked |= taken > 0
    return Placed(node_of_rank, _spare_nodes(board, asked))


def count_kept(ask: Ask) -> IntArray:
    return np.bincount(np.fromiter(ask.kept.values(), np.int64, len(ask.kept)), minlength=len(ask.tree.nodes))


def _by_home(ask: Ask, board: Board) -> list[tuple[Span | None, list[int]]]:
    """Ranks by the domain that they must return to; None, and last, for those that are free to choose.

    Where the rest of a subgroup is outside the tree, nobody knows its domain: any one that holds them will do.
    """
    size, depth = ask.shape.group_size, ask.shape.group_depth
    if size == 1:
        return [(None, list(ask.ranks))]
    astray: dict[int, list[int]] = {rank // size: [] for rank in ask.outside}
    kept_by_group: dict[int, list[int]] = {}
    for rank, node in ask.kept.items():
        kept_by_group.setdefault(rank // size, []).append(node)
    found: dict[int, list[int]] = {}
    for rank in ask.ranks:
        nodes = kept_by_group.get(rank // size)
        if not nodes and rank // size in astray:
            astray[rank // size].append(rank)
            continue
        home = int(np.argmax(np.bincount(ask.tree.domain_of(depth, np.array(nodes))))) if nodes else -1
        found.setdefault(home, []).append(rank)
    free = found.pop(-1, [])
    homes: list[tuple[Span | None, list[int]]] = [(board.tree.span(depth, home), found[home]) for home in sorted(found)]
    anywhere = board.fixed_span(ask.shape.required) or (0, len(ask.tree.nodes))
    homes += [(anywhere, ranks) for ranks in astray.values() if ranks]
    return [*homes, (None, free)] if free else homes


def _check_whole(ask: Ask, wanted: int) -> None:
    """A gang of which nothing lives comes in whole subgroups, and a new one in whole nodes."""
    size, block = ask.shape.group_size, ask.shape.ranks_per_node
    if wanted % size:
        raise InvalidInput(f"{wanted} ranks must be whole subgroups of {size}")
    if block and ask.shape.is_new and wanted % block:
        raise InvalidInput(f"{wanted} ranks must be whole nodes of {block}")


def _near(kept: Mapping[int, int], shape: Shape, ranks: Sequence[int]) -> Mapping[int, int]:
    """Only kept ranks of the same subgroups say where a rank belongs."""
    if shape.group_size == 1:
        return kept
    groups = {rank // shape.group_size for rank in ranks}
    return {rank: node for rank, node in kept.items() if rank // shape.group_size in groups}


def _place(board: Board, span: Span, wanted: int) -> IntArray | None:
    """Ranks per node, or None."""
    shares = spread(board, span, wanted)
    if shares is None:
        return None
    starts = board.tree.starts[board.shape.narrowest]
    deal = fill if board.shape.ranks_per_node else pour
    return deal(board.room, board.kept, shares, starts)


def _spare_nodes(board: Board, asked: BoolArray) -> tuple[int, ...]:
    """Spares of every domain that took a rank, on the nodes with the fewest ranks: what ends those spares them."""
    if not board.shape.spares:
        return ()
    starts = board.tree.starts[board.shape.narrowest]
    wanted = np.where(np.add.reduceat(asked, starts), board.shape.spares, 0)
    taken = pour(board.spare, board.kept, wanted, starts)
    return tuple(np.repeat(np.arange(len(taken)), taken).tolist())
