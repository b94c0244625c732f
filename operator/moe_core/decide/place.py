"""Placing: bind gated rank pods to nodes, all or none.

Until the group runs, every rank waits for all. Afterwards a lost rank is placed by itself, because each one brings
experts back; ranks that join in a resize come all or none again, and so does a group of which nothing is left.

Who joins leaves the spare places free, a rank that replaces one may take them: they are in the domains of the others,
and those are filled first. So may the rest of a gang of which a part stands, once no other room is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY
from moe_core.decide.crew import Seat
from moe_core.facts import BindPod, DeletePod, Facts, NodeFact, PodFact
from moe_core.manifests.plan import Plan
from moe_core.manifests.pods import HELPER_REQUEST
from moe_core.outcome import NoFit
from moe_core.topology.fit import Fit, fit, tree_of
from moe_core.topology.quantity import listed, request_of
from moe_core.topology.room import rooms
from moe_core.topology.tree import Tree, build_tree

Use = dict[str, dict[str, int]]
"""Base units that our own pods take, by node."""


@dataclass(slots=True)
class Bound:
    actions: list[BindPod] = field(default_factory=list)
    no_fit: NoFit | None = None
    undo: list[DeletePod] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ground:
    """What does not change while one cycle places, and all that whoever asks beforehand has."""

    plan: Plan
    tree: Tree
    all_nodes: Tree
    """Without levels: a coordinator or gateway may go where no rank may."""
    gated: Mapping[int, PodFact] = field(default_factory=dict)
    ranks: Mapping[int, Seat] = field(default_factory=dict)
    helpers: Sequence[Seat] = ()
    taken: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Base units by node that are not to be had, beside what the nodes say: for whoever asks what would be if."""

    @classmethod
    def of(cls, plan: Plan, nodes: Sequence[NodeFact]) -> "Ground":
        return cls(plan, tree_of(nodes, plan.pack), build_tree(nodes))


def bind(plan: Plan, facts: Facts, *, ranks: Mapping[int, Seat], helpers: Sequence[Seat], formed: int) -> Bound:
    """`formed` is the size of the group that has already run, 0 for none; helpers are coordinator and gateways."""
    bound = Bound()
    gated = {r: seat.live for r, seat in ranks.items() if r < plan.num_ranks and seat.live and seat.live.gated}
    if not gated:
        return bound
    ground = replace(Ground.of(plan, facts.nodes), gated=gated, ranks=ranks, helpers=helpers)
    placed = {r: seat.live.node for r, seat in ranks.items() if seat.live and seat.is_placed and seat.live.node}
    ran = formed if placed else 0
    lost = [r for r in sorted(gated) if r < ran]
    joiners = range(ran, plan.num_ranks)
    waiting = [r for r in joiners if r in gated]
    if lost:
        _bind_group(bound, ground, lost, placed, spares=(0,), one_by_one=True)
    if waiting and all(r in gated or r in placed for r in joiners):
        is_half_started = not ran and bool(placed)
        spares = (plan.spares_per_domain, 0) if is_half_started else (plan.spares_per_domain,)
        _bind_group(bound, ground, waiting, placed, spares=spares, one_by_one=False)
    return bound


def place_new(ground: Ground, *, explain: bool = True) -> Fit | NoFit:
    """All ranks of a gang of which nothing stands, as `bind` would place them."""
    plan = ground.plan
    return _find(ground, range(plan.num_ranks), {}, spares=(plan.spares_per_domain,), explain=explain)


def place_lost(ground: Ground, lost: Sequence[int], kept: Mapping[int, str]) -> Fit | NoFit:
    """Ranks that are lost at once, as `bind` would replace them beside those that are kept."""
    if not kept:
        return place_new(ground, explain=False)
    return _find(ground, lost, kept, spares=(0,), explain=False)


def _bind_group(
    bound: Bound,
    ground: Ground,
    group: Sequence[int],
    placed: dict[int, str],
    *,
    spares: Sequence[int],
    one_by_one: bool,
) -> None:
    is_first_try = one_by_one and len(group) > 1
    found = _find(ground, group, placed, spares=spares, explain=bound.no_fit is None and not is_first_try)
    if isinstance(found, NoFit) and is_first_try:
        for rank in group:
            _bind_group(bound, ground, [rank], placed, spares=spares, one_by_one=False)
        return
    if isinstance(found, NoFit):
        bound.no_fit = bound.no_fit or found
        return
    for rank, node in sorted(found.node_of_rank.items()):
        placed[rank] = node
        pod = ground.gated[rank]
        bound.actions.append(BindPod(name=pod.name, uid=pod.uid, node=node))


def _find(
    ground: Ground, group: Sequence[int], placed: Mapping[int, str], *, spares: Sequence[int], explain: bool
) -> Fit | NoFit:
    """Beside pods that are still Terminating; if that is too tight, in their place: the scheduler waits for them.

    `spares`: places to leave in each domain, first choice first.

    Only one NoFit is told per cycle, so only that one is explained: it takes forty fits where a fit takes one.
    """
    first: NoFit | None = None
    plan = ground.plan
    for left, count_leaving in product(spares, (True, False)):
        own = _own_use(ground, placed, count_leaving=count_leaving)
        found = fit(
            ground.tree,
            group,
            needs=plan.needs,
            pack=plan.pack,
            kept=placed,
            own=own,
            ranks_per_node=plan.ranks_per_node,
            spares_per_domain=left,
            explain=explain and first is None,
        )
        if isinstance(found, Fit):
            found = _with_helpers(ground, found, own)
        if isinstance(found, Fit):
            return found
        first = first or found
    assert first is not None
    return first


def _with_helpers(ground: Ground, found: Fit, own: Use) -> Fit | NoFit:
    """The fit, unless it would take the last room for a coordinator or gateway that has no node yet."""
    wanted = 1 + ground.plan.num_gateways
    homeless = wanted - sum(1 for seat in ground.helpers if seat.live is not None and seat.live.node is not None)
    if homeless <= 0:
        return found
    for node in found.node_of_rank.values():
        add_use(own, node, ground.plan.needs.request)
    room = len(helper_places(ground, own, homeless))
    if room >= homeless:
        return found
    asks = listed(request_of(HELPER_REQUEST, {}))
    need = f"1 pod of coordinator and gateways needs {asks}"
    if homeless > 1:
        need = f"{homeless} pods of coordinator and gateways need {asks} each"
    return NoFit(
        wanted=len(found.node_of_rank),
        level=ground.plan.pack.required,
        best=len(found.node_of_rank),
        best_domain="",
        excluded={},
        beside=f"beside them {need}, and there is room for {room}",
    )


def helper_places(ground: Ground, own: Use, most: int) -> list[str]:
    """The first nodes, at most so many, that have room for a pod of coordinator or gateway; one several times over."""
    needs = replace(ground.plan.needs, request=request_of(HELPER_REQUEST, {}))
    room = rooms(ground.all_nodes, needs, own=own, most=most).ranks
    first = np.repeat(np.arange(len(room)), room)[:most]
    return [ground.all_nodes.nodes[index].name for index in first.tolist()]


def _own_use(ground: Ground, placed: Mapping[int, str], *, count_leaving: bool) -> Use:
    use: Use = {node: dict(by_resource) for node, by_resource in ground.taken.items()}
    for _, node in sorted(placed.items()):
        add_use(use, node, ground.plan.needs.request)
    if count_leaving:
        for _, seat in sorted(ground.ranks.items()):
            for pod in seat.leaving:
                if pod.phase not in ("Failed", "Succeeded") and not pod.gated:
                    add_use(use, pod.node, ground.plan.needs.request)
    for seat in ground.helpers:
        assert seat.role in (ROLE_COORDINATOR, ROLE_GATEWAY), seat.role
        if seat.live is not None:
            add_use(use, seat.live.node, request_of(HELPER_REQUEST, {}))
    return use


def add_use(use: Use, node: str | None, request: Mapping[str, int]) -> None:
    if node is None:
        return
    on_node = use.setdefault(node, {})
    for resource, amount in {"pods": 1, **request}.items():
        on_node[resource] = on_node.get(resource, 0) + amount
