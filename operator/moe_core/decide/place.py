"""Placing: bind gated rank pods to nodes, all or none.

Until the group runs, every rank waits for all. Afterwards a lost rank is placed by itself, because each one brings
experts back; ranks that join in a resize come all or none again, and so does a group of which nothing is left.

Who joins leaves the spare places free, a rank that replaces one may take them: they are in the domains of the others,
and those are filled first. So may the rest of a gang of which a part stands, once no other room is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY
from moe_core.decide.crew import Seat
from moe_core.facts import BindPod, DeletePod, Facts, NodeFact, PodFact
from moe_core.manifests.plan import Plan
from moe_core.manifests.pods import HELPER_REQUEST
from moe_core.outcome import NoFit
from moe_core.topology.fit import Fit, fit, tree_of
from moe_core.topology.quantity import request_of
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
class _Board:
    """What does not change while one cycle places."""

    plan: Plan
    gated: Mapping[int, PodFact]
    ranks: Mapping[int, Seat]
    helpers: Sequence[Seat]
    tree: Tree
    all_nodes: Tree
    """Without levels: a coordinator or gateway may go where no rank may."""


def bind(plan: Plan, facts: Facts, *, ranks: Mapping[int, Seat], helpers: Sequence[Seat], formed: int) -> Bound:
    """`formed` is the size of the group that has already run, 0 for none; helpers are coordinator and gateways."""
    bound = Bound()
    gated = {r: seat.live for r, seat in ranks.items() if r < plan.num_ranks and seat.live and seat.live.gated}
    if not gated:
        return bound
    tree, all_nodes = tree_of(facts.nodes, plan.pack), build_tree(facts.nodes)
    board = _Board(plan, gated, ranks, helpers, tree, all_nodes)
    placed = {r: seat.live.node for r, seat in ranks.items() if seat.live and seat.is_placed and seat.live.node}
    ran = formed if placed else 0
    lost = [r for r in sorted(gated) if r < ran]
    joiners = range(ran, plan.num_ranks)
    waiting = [r for r in joiners if r in gated]
    if lost:
        _bind_group(bound, board, lost, placed, spares=(0,), one_by_one=True)
    if waiting and all(r in gated or r in placed for r in joiners):
        is_half_started = not ran and bool(placed)
        spares = (plan.spares_per_domain, 0) if is_half_started else (plan.spares_per_domain,)
        _bind_group(bound, board, waiting, placed, spares=spares, one_by_one=False)
    return bound


def place_new(plan: Plan, nodes: Sequence[NodeFact]) -> Fit | NoFit:
    """All ranks of a gang of which nothing stands, as `bind` would place them: for whoever asks beforehand."""
    board = _Board(plan, {}, {}, (), tree_of(nodes, plan.pack), build_tree(nodes))
    return _find(board, range(plan.num_ranks), {}, spares=(plan.spares_per_domain,), explain=True)


def _bind_group(
    bound: Bound,
    board: _Board,
    group: Sequence[int],
    placed: dict[int, str],
    *,
    spares: Sequence[int],
    one_by_one: bool,
) -> None:
    is_first_try = one_by_one and len(group) > 1
    found = _find(board, group, placed, spares=spares, explain=bound.no_fit is None and not is_first_try)
    if isinstance(found, NoFit) and is_first_try:
        for rank in group:
            _bind_group(bound, board, [rank], placed, spares=spares, one_by_one=False)
        return
    if isinstance(found, NoFit):
        bound.no_fit = bound.no_fit or found
        return
    for rank, node in sorted(found.node_of_rank.items()):
        placed[rank] = node
        pod = board.gated[rank]
        bound.actions.append(BindPod(name=pod.name, uid=pod.uid, node=node))


def _find(
    board: _Board, group: Sequence[int], placed: Mapping[int, str], *, spares: Sequence[int], explain: bool
) -> Fit | NoFit:
    """Beside pods that are still Terminating; if that is too tight, in their place: the scheduler waits for them.

    `spares`: places to leave in each domain, first choice first.

    Only one NoFit is told per cycle, so only that one is explained: it takes forty fits where a fit takes one.
    """
    first: NoFit | None = None
    plan = board.plan
    for left, count_leaving in product(spares, (True, False)):
        own = _own_use(board, placed, count_leaving=count_leaving)
        found = fit(
            board.tree,
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
            found = _with_helpers(board, found, own)
        if isinstance(found, Fit):
            return found
        first = first or found
    assert first is not None
    return first


def _with_helpers(board: _Board, found: Fit, own: Use) -> Fit | NoFit:
    """The fit, unless it would take the last room for a coordinator or gateway that has no node yet."""
    wanted = 1 + board.plan.num_gateways
    homeless = wanted - sum(1 for seat in board.helpers if seat.live is not None and seat.live.node is not None)
    if homeless <= 0:
        return found
    for node in found.node_of_rank.values():
        _add(own, node, board.plan.needs.request)
    needs = replace(board.plan.needs, request=request_of(HELPER_REQUEST, {}))
    room = int(rooms(board.all_nodes, needs, own=own, most=homeless).ranks.sum())
    if room >= homeless:
        return found
    asks = ", ".join(f"{resource} {quantity}" for resource, quantity in sorted(HELPER_REQUEST.items()))
    return NoFit(
        wanted=len(found.node_of_rank),
        level=board.plan.pack.required,
        best=len(found.node_of_rank),
        best_domain="",
        excluded={},
        lever=f"beside them {homeless} pods of coordinator and gateways need {asks} each, and {room} have room",
    )


def _own_use(board: _Board, placed: Mapping[int, str], *, count_leaving: bool) -> Use:
    use: Use = {}
    for _, node in sorted(placed.items()):
        _add(use, node, board.plan.needs.request)
    if count_leaving:
        for _, seat in sorted(board.ranks.items()):
            for pod in seat.leaving:
                if pod.phase not in ("Failed", "Succeeded") and not pod.gated:
                    _add(use, pod.node, board.plan.needs.request)
    for seat in board.helpers:
        assert seat.role in (ROLE_COORDINATOR, ROLE_GATEWAY), seat.role
        if seat.live is not None:
            _add(use, seat.live.node, request_of(HELPER_REQUEST, {}))
    return use


def _add(use: Use, node: str | None, request: Mapping[str, int]) -> None:
    if node is None:
        return
    on_node = use.setdefault(node, {})
    for resource, amount in {"pods": 1, **request}.items():
        on_node[resource] = on_node.get(resource, 0) + amount
