"""What each domain of the required level has for a new gang, and what takes the rest: the long form of a NoFit."""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_core.topology.attempt import Ask, count_kept
from moe_core.topology.board import board_of
from moe_core.topology.room import Needs
from moe_core.topology.shape import Pack, shape_of
from moe_core.topology.tree import Path, Tree


@dataclass(frozen=True, slots=True)
class DomainRoom:
    """`excluded` counts as in a NoFit: ranks by cause, and nodes where a cause begins with `nodes`."""

    path: Path
    """Empty for the whole cluster."""
    num_nodes: int
    room: int
    """Ranks of this gang that it takes, whatever number is wanted."""
    excluded: Mapping[str, int]


def survey(
    tree: Tree, num_ranks: int, *, needs: Needs, pack: Pack, ranks_per_node: int = 0, spares_per_domain: int = 0
) -> tuple[DomainRoom, ...]:
    """Every domain that could hold all of a new gang if it had the room; the roomiest first, then by path.

    `tree` as `tree_of` builds it for `pack`. Raises InvalidInput as `fit` does.
    """
    shape = shape_of(pack, ranks_per_node=ranks_per_node, spares_per_domain=spares_per_domain)
    ask = Ask(tree=tree, shape=shape, needs=needs, ranks=range(num_ranks), kept={}, own={})
    rooms = ask.rooms()
    board = board_of(tree, shape, free=rooms.ranks, kept=count_kept(ask))
    found = []
    for domain, room in enumerate(board.caps[shape.required].tolist()):
        span = tree.span(shape.required, domain)
        excluded = rooms.excluded(span) | board.set_aside(shape.required, span)
        found.append(
            DomainRoom(tree.path(shape.required, domain), span[1] - span[0], room, dict(sorted(excluded.items())))
        )
    return tuple(sorted(found, key=lambda one: (-one.room, one.path)))
