"""Whether a resource fits, and in numbers why not; and if it does, what is left for itself and for others like it.

Asked of the same functions that the operator places with. What would happen to a rank that is lost is asked of them
too, right after the start: later, others may have taken the room.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moe_core.decide.accept import Refusal, accept
from moe_core.decide.measured import Measured
from moe_core.decide.place import Ground, Use, add_use, helper_places, place_lost, place_new
from moe_core.facts import Facts, Wish
from moe_core.manifests.pods import HELPER_REQUEST
from moe_core.outcome import NoFit
from moe_core.preview.outlook import resized
from moe_core.topology.fit import Fit
from moe_core.topology.quantity import request_of
from moe_core.topology.room import rooms
from moe_core.topology.survey import DomainRoom, survey
from moe_core.topology.tree import NO_LIMIT, Path

MOST_MORE = 16
"""Further gangs that are counted; a cluster that holds so many has no want of room."""
MOST_PLACES = 1024
"""Of one node: more than any gang has ranks."""
MOST_HOMES = 16
"""Domains in use of which losses are tried: two fits each."""


@dataclass(frozen=True, slots=True)
class Home:
    """One domain in use, of the narrowest level that the resource names."""

    path: Path
    num_ranks: int
    num_nodes: int
    room: int
    """Places for further ranks of this gang, spares among them."""
    rank_lost: tuple[Path, ...] | None = None
    """Domains that would take one rank whose place is lost as well; None if none would."""
    node_lost: tuple[Path, ...] | None = None
    """The same for all ranks of the node that holds the most of them here."""


@dataclass(frozen=True, slots=True)
class Explained:
    """`homes` and `more` where it fits; `domains` in any case. Levels are empty for the cluster."""

    num_ranks: int
    placement: Fit | NoFit
    level: str
    domains: tuple[DomainRoom, ...]
    outside: Mapping[str, int]
    """Nodes without a label that counts, by the first such label."""
    home_level: str = ""
    homes: tuple[Home, ...] = ()
    measured: Measured = field(default_factory=Measured)
    """Of the group that the wish's status tells of, if it has one: links, and ranks that are slow where they are."""
    more: int = 0
    """Gangs of this very kind that fit beside it, each with its spares; MOST_MORE stands for that many or more."""


def explain(wish: Wish, facts: Facts, *, num_ranks: int | None = None) -> Explained | Refusal:
    """Of a gang of which nothing stands yet, over `facts.nodes`; with its own number of ranks or another one.

    Raises InvalidInput for another one that it cannot have, and for a status that nobody of us wrote.
    """
    accepted = accept(resized(wish, num_ranks), facts)
    if isinstance(accepted, Refusal):
        return accepted
    plan = accepted.plan
    ground = Ground.of(plan, facts.nodes)
    placement = place_new(ground)
    found = Explained(
        num_ranks=plan.num_ranks,
        placement=placement,
        level=plan.pack.required,
        domains=survey(
            ground.tree,
            plan.num_ranks,
            needs=plan.needs,
            pack=plan.pack,
            ranks_per_node=plan.ranks_per_node,
            spares_per_domain=plan.spares_per_domain,
        ),
        measured=Measured.of_status(wish.status),
        outside=dict(sorted(Counter(label for _, label in ground.tree.unlabelled).items())),
    )
    if isinstance(placement, NoFit):
        return found
    return replace(
        found,
        home_level=plan.pack.preferred or plan.pack.required,
        homes=_homes(ground, placement.node_of_rank),
        more=_more(ground, placement),
    )


def _homes(ground: Ground, node_of_rank: Mapping[int, str]) -> tuple[Home, ...]:
    """By path."""
    tree, depth = ground.tree, ground.tree.needed
    ranks_of: dict[Path, list[int]] = {}
    for rank, node in node_of_rank.items():
        ranks_of.setdefault(_path(ground, node), []).append(rank)
    use: Use = {}
    for node in node_of_rank.values():
        add_use(use, node, ground.plan.needs.request)
    free_on = rooms(tree, ground.plan.needs, own=use, most=MOST_PLACES).ranks
    if block := ground.plan.ranks_per_node:
        ranks_on = Counter(node_of_rank.values())
        free_on = np.minimum(free_on, [block - ranks_on[node.name] for node in tree.nodes])
    free = tree.sums(free_on, depth)
    room_of = {tree.path(depth, domain): int(room) for domain, room in enumerate(free)}
    found: list[Home] = []
    for path, ranks in sorted(ranks_of.items()):
        nodes = Counter(node_of_rank[rank] for rank in ranks)
        home = Home(path, len(ranks), len(nodes), room_of[path])
        if len(found) < MOST_HOMES:
            fullest = min(nodes, key=lambda node: (-nodes[node], node))
            lost = [rank for rank in ranks if node_of_rank[rank] == fullest]
            place: Use = {}
            add_use(place, fullest, ground.plan.needs.request)
            home = replace(
                home,
                rank_lost=_regained(ground, node_of_rank, lost[:1], place),
                node_lost=_regained(ground, node_of_rank, lost, {fullest: {"pods": NO_LIMIT}}),
            )
        found.append(home)
    return tuple(found)


def _regained(ground: Ground, node_of_rank: Mapping[int, str], lost: list[int], taken: Use) -> tuple[Path, ...] | None:
    kept = {rank: node for rank, node in node_of_rank.items() if rank not in lost}
    found = place_lost(replace(ground, taken=taken), lost, kept)
    if isinstance(found, NoFit):
        return None
    return tuple(sorted({_path(ground, node) for node in found.node_of_rank.values()}))


def _path(ground: Ground, node: str) -> Path:
    """Of the domain of the narrowest level that the resource names."""
    labels = ground.tree.nodes[ground.tree.index_of[node]].labels
    return tuple(labels[label] for _, label in ground.tree.levels[: ground.tree.needed])


def _more(ground: Ground, first: Fit) -> int:
    taken: Use = {}
    last = first
    for count in range(MOST_MORE):
        for node in (*last.node_of_rank.values(), *last.spare_nodes):
            add_use(taken, node, ground.plan.needs.request)
        for node in helper_places(ground, taken, 1 + ground.plan.num_gateways):
            add_use(taken, node, request_of(HELPER_REQUEST, {}))
        found = place_new(replace(ground, taken=taken), explain=False)
        if isinstance(found, NoFit):
            return count
        last = found
    return MOST_MORE
