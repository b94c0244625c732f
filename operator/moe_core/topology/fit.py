"""Gang fit: all ranks at once or none, near each other, and if not, why not, in numbers.

Rules, in this order:
1. required level: all ranks lie in one domain of it. Ranks that are kept (a replacement, a resize) fix which one.
   Subgroups: each lies in one domain of its own level, and ranks that are lost return to the rest of their subgroup.
2. preferred level: as few domains of it as possible, found from the narrowest domain that holds all, kept ranks too:
   one rack, else one block with the fewest racks, else one zone with the fewest blocks and in them the fewest racks.
   Domains with kept ranks are in use anyway and come first.
3. inside the chosen domains: evenly over domains, then evenly over nodes; of equal choices the tightest fit, then the
   first path, so that big domains stay whole for big gangs. Beside kept ranks, their domains are filled before others.
4. ranks are numbered along the tree, so neighbours by number are neighbours by wire; a rank that is replaced goes where
   the kept ranks next to it by number are.

With ranks_per_node, nodes are filled whole instead of evenly. spares_per_domain keeps places free in every domain (of
the narrowest level that was named) that takes a rank, and names their nodes; a node that is full is none of them.

    shape   what is asked, in levels     choose    which domains       relax   what would help
    tree    the domains                  deal      which nodes         least   how much of it
    room    places per node              attempt   all of it, once     score   what it costs an all-to-all
    board   places per domain
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_core.facts import NodeFact
from moe_core.outcome import InvalidInput, NoFit
from moe_core.topology.attempt import Ask, Placed, attempt
from moe_core.topology.relax import no_fit
from moe_core.topology.room import Needs, Use
from moe_core.topology.shape import Pack, Subgroups, shape_of
from moe_core.topology.tree import Tree, build_tree


@dataclass(frozen=True, slots=True)
class Fit:
    """node_of_rank for the ranks that were asked for, sorted by rank."""

    node_of_rank: Mapping[int, str]
    spare_nodes: tuple[str, ...] = ()
    """A node for every spare place, along the tree."""


def fit(
    nodes: Sequence[NodeFact] | Tree,
    ranks: Sequence[int],
    *,
    needs: Needs,
    pack: Pack = Pack(),  # noqa: B008
    kept: Mapping[int, str] | None = None,
    own: Use | None = None,
    subgroups: Subgroups | None = None,
    ranks_per_node: int = 0,
    spares_per_domain: int = 0,
    explain: bool = True,
) -> Fit | NoFit:
    """Nodes for `ranks`, all or none.

    nodes: or their tree (`tree_of`), where several fits share one. kept: node of each rank that stays where it is.
    own: base units that this owner's pods use per node (kept ranks included). explain: False leaves the relaxations out
    of a NoFit. Raises InvalidInput for a level that `pack.levels` does not name, and for ranks that are no whole
    subgroups or nodes.
    """
    shape = shape_of(pack, subgroups=subgroups, ranks_per_node=ranks_per_node, spares_per_domain=spares_per_domain)
    tree = nodes if isinstance(nodes, Tree) else build_tree(nodes, pack.levels, needed=shape.narrowest)
    if tree.levels != pack.levels or tree.needed < shape.narrowest:
        raise InvalidInput(f"the tree has {tree.needed} levels of {tree.levels}, the gang asks for {pack}")
    if not ranks:
        return Fit({})
    kept = kept or {}
    kept_idx = {rank: tree.index_of[node] for rank, node in sorted(kept.items()) if node in tree.index_of}
    outside = sorted(kept.keys() - kept_idx.keys())
    shape = replace(shape, is_new=not kept)
    again = sorted(set(ranks) & kept.keys())
    if again:
        raise InvalidInput(f"rank {again[0]} is both kept and to be placed ({len(again)} such ranks)")
    ask = Ask(tree=tree, shape=shape, needs=needs, ranks=sorted(ranks), kept=kept_idx, own=own or {}, outside=outside)
    rooms = ask.rooms()
    found = attempt(ask, rooms.ranks)
    if not isinstance(found, Placed):
        return no_fit(ask, found, rooms, pack=pack, subgroups=subgroups, explain=explain)
    names = tree.nodes
    return Fit(
        node_of_rank={rank: names[index].name for rank, index in sorted(found.node_of_rank.items())},
        spare_nodes=tuple(names[index].name for index in found.spare_nodes),
    )


def tree_of(nodes: Sequence[NodeFact], pack: Pack, *, subgroups: Subgroups | None = None) -> Tree:
    """The tree that `fit` would build: for several fits of the same gang over the same nodes."""
    return build_tree(nodes, pack.levels, needed=shape_of(pack, subgroups=subgroups).narrowest)
