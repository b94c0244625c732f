"""The scratch copy of one decision: places left per node, and added up for every domain that counts."""

from dataclasses import dataclass, replace

import numpy as np

from moe_core.topology.shape import Shape
from moe_core.topology.tree import IntArray, Span, Tree


@dataclass(frozen=True, slots=True, eq=False)
class Board:
    tree: Tree
    shape: Shape
    free: IntArray
    """Places left per node, for ranks and spares."""
    kept: IntArray
    """Ranks of this gang per node that stay."""
    room: IntArray
    """Ranks that may go to each node: `free` in blocks of ranks_per_node."""
    spare: IntArray
    """Places per node that would do for single ranks later: those that ranks_per_node leaves open."""
    unit: int
    """Ranks come to a node in multiples of this."""
    kept_in: tuple[IntArray, ...]
    """[depth][domain], down to the narrowest stage; so is `caps`."""
    caps: tuple[IntArray, ...]
    """Ranks that a domain takes, once spares and whole subgroups are set aside."""

    def fixed_span(self, depth: int) -> Span | None:
        """The domain that holds the kept ranks (most of them, if a label moved); None if nothing is kept."""
        if not self.kept.any():
            return None
        return self.tree.span(depth, int(np.argmax(self.kept_in[depth])))

    def set_aside(self, depth: int, span: Span) -> dict[str, int]:
        """Places in the domains of `depth` in `span` that are free and still of no use, by cause: too few on a node,
        too few for a subgroup, or for spares."""
        low, high = span
        shape, found = self.shape, {}
        if self.unit > 1:
            found[f"fewer than {self.unit} free on a node"] = int((self.free - self.room)[low:high].clip(0).sum())
        first, after = self.tree.domains_in(depth, span)
        whole = shape.group_size > 1
        cause = "for spares" if shape.spares else "too few for a subgroup"
        cause = "for spares and too few for a subgroup" if shape.spares and whole else cause
        found[cause] = int(self.room[low:high].sum() - self.caps[depth][first:after].sum())
        return {cause: count for cause, count in found.items() if count > 0}

    def after(self, taken: IntArray) -> "Board":
        return board_of(self.tree, self.shape, free=self.free - taken, kept=self.kept + taken)


def board_of(tree: Tree, shape: Shape, *, free: IntArray, kept: IntArray) -> Board:
    """Adds up from the nodes to the cluster."""
    block, unit = shape.ranks_per_node, 1
    spare = np.minimum(free, np.maximum(0, block - kept)) if block else free
    room = spare
    if block and shape.is_new:
        room, unit = np.where(free >= block, block, 0), block
    beside_spares = tree.sums(spare, shape.narrowest) - shape.spares
    cap = np.minimum(tree.sums(room, shape.narrowest), np.maximum(0, beside_spares) // unit * unit)
    kept_in, caps = [tree.sums(kept, shape.narrowest)], []
    for depth in range(shape.narrowest, -1, -1):
        if depth < shape.narrowest:
            kept_in.append(tree.sums_above(kept_in[-1], depth + 1))
            cap = tree.sums_above(cap, depth + 1)
        if depth == shape.group_depth:
            cap = _in_whole_subgroups(cap, shape, kept_in[-1])
        caps.append(cap)
    return Board(tree, shape, free, kept, room, spare, unit, tuple(reversed(kept_in)), tuple(reversed(caps)))


def _in_whole_subgroups(cap: IntArray, shape: Shape, kept: IntArray) -> IntArray:
    if shape.apart:
        cap = np.where(kept > 0, 0, np.minimum(cap, shape.group_size))
    return cap // shape.group_size * shape.group_size


def for_one_subgroup(board: Board) -> Board:
    """The same places for ranks that go back to the rest of their subgroup: single ranks, in its domain."""
    shape = board.shape
    stages = tuple(depth for depth in shape.stages if depth > shape.group_depth) or (shape.group_depth,)
    alone = replace(shape, required=shape.group_depth, stages=stages, group_depth=0, group_size=1, apart=False)
    return board_of(board.tree, alone, free=board.free, kept=board.kept)
