"""Why a gang does not fit, in numbers, and what would help: every change is tried with the same fit, one at a time.

In order of cost: what only the spec's author gives up and nobody misses today (spares, whole nodes, a narrow level),
what takes one command (uncordon, tolerate, select fewer), what takes work (a node that is not ready, room that is in
use), a few ranks less, new nodes, and far fewer ranks.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moe_core.outcome import NoFit, Relaxation
from moe_core.topology.attempt import Ask, Stuck
from moe_core.topology.least import fewest_nodes, fewest_places, fits
from moe_core.topology.quantity import listed
from moe_core.topology.room import CORDONED, IN_USE, NOT_READY, Rooms
from moe_core.topology.shape import Pack, Subgroups
from moe_core.topology.tree import IntArray

FEW = 4
"""A gang that gives up at most one rank in FEW would rather do that than wait for new nodes."""


def no_fit(ask: Ask, stuck: Stuck, rooms: Rooms, *, pack: Pack, subgroups: Subgroups | None, explain: bool) -> NoFit:
    excluded = rooms.excluded(stuck.span) | stuck.board.set_aside(stuck.depth, stuck.span)
    for _, label in ask.tree.unlabelled:
        told = f"nodes without label {label}"
        excluded[told] = excluded.get(told, 0) + 1
    best = int(_caps(stuck).max(initial=0))
    changes = _relaxations(ask, stuck, rooms, pack=pack, subgroups=subgroups, best=best)
    relaxations = tuple(changes) if explain else ()
    return NoFit(
        wanted=stuck.wanted,
        level=pack.levels[stuck.depth - 1][0] if stuck.depth else "",
        best=best,
        best_domain=_domain_name(ask, stuck, best),
        excluded=dict(sorted(excluded.items())),
        lever=relaxations[0].text if relaxations else "",
        relaxations=relaxations,
        terms=_terms(ask, stuck, pack, subgroups),
    )


def _relaxations(
    ask: Ask, stuck: Stuck, rooms: Rooms, *, pack: Pack, subgroups: Subgroups | None, best: int
) -> Iterator[Relaxation]:
    free = rooms.ranks
    yield from _fewer_spares(ask, free)
    if ask.shape.ranks_per_node and fits(replace(ask, shape=replace(ask.shape, ranks_per_node=0)), free):
        yield Relaxation(
            "ranks_per_node",
            1,
            f"drop pack.ranksPerNode {ask.shape.ranks_per_node}: nodes may then hold any number of ranks",
        )
    yield from _broader(ask, free, pack, subgroups)
    yield from _some_nodes(ask, stuck, rooms, CORDONED)
    for cause in dict.fromkeys(rooms.causes):
        if cause.startswith(("taint ", "nodeSelector ")):
            opened = ask.rooms(ignoring=[cause])
            if fits(ask, opened.ranks):
                gained = int((opened.ranks - free).sum())
                what, _, named = cause.partition(" ")
                drop = f"drop {named} from template.spec.nodeSelector"
                yield Relaxation(
                    what, gained, f"tolerate {cause} in template.spec.tolerations" if what == "taint" else drop
                )
    yield from _some_nodes(ask, stuck, rooms, NOT_READY)
    used = np.maximum(ask.rooms(ignoring=[IN_USE]).ranks - free, 0)
    needed = fewest_places(ask, stuck, free, used)
    if needed is not None:
        yield Relaxation(IN_USE, needed, f"free room for {needed} more")
    fewer = Relaxation("fewer ranks", stuck.wanted - best, f"ask for {best} ranks instead of {stuck.wanted}")
    can_shrink = best > 0 and not ask.kept
    if can_shrink and best * FEW >= stuck.wanted * (FEW - 1):
        yield fewer
    asks = listed(ask.needs.request)
    missing = fewest_places(ask, stuck, free, None) or stuck.wanted - best
    text = f"add nodes with room for {missing} more" + (f" (each asks for {asks})" if asks else "")
    yield Relaxation("add nodes", missing, text)
    if can_shrink and best * FEW < stuck.wanted * (FEW - 1):
        yield fewer


def _fewer_spares(ask: Ask, free: IntArray) -> Iterator[Relaxation]:
    wanted = ask.shape.spares
    for spares in range(wanted - 1, -1, -1):
        if fits(replace(ask, shape=replace(ask.shape, spares=spares)), free):
            yield Relaxation("spares", wanted - spares, f"set spares.perDomain to {spares} instead of {wanted}")
            return


def _broader(ask: Ask, free: IntArray, pack: Pack, subgroups: Subgroups | None) -> Iterator[Relaxation]:
    """The narrowest broader level that will do, of the gang and of its subgroups."""
    shape, levels = ask.shape, pack.levels
    for depth in range(shape.required - 1, -1, -1):
        if fits(replace(ask, shape=replace(shape, required=depth)), free):
            count, prefer = len(ask.ranks), pack.preferred or pack.required
            change = f"set pack.required to {levels[depth - 1][0]}" if depth else "drop pack.required"
            where = f"one {levels[depth - 1][0]}" if depth else "the cluster"
            text = f"{where} has room for {count} outside one {pack.required}: {change}, pack.preferred to {prefer}"
            yield Relaxation("required", shape.required - depth, text)
            break
    for depth in range(shape.group_depth - 1, shape.required - 1, -1) if subgroups else ():
        stages = tuple(sorted({depth, *(s for s in shape.stages if s != shape.group_depth), shape.group_depth}))
        if fits(replace(ask, shape=replace(shape, group_depth=depth, stages=stages)), free):
            where = f"one {levels[depth - 1][0]}" if depth else "the cluster"
            yield Relaxation("subgroups", shape.group_depth - depth, f"let a subgroup spread over {where}")
            return


def _some_nodes(ask: Ask, stuck: Stuck, rooms: Rooms, cause: str) -> Iterator[Relaxation]:
    if cause not in rooms.causes:
        return
    opened = ask.rooms(ignoring=[cause]).ranks
    gain = np.where(rooms.cause_of_node == rooms.causes.index(cause), opened, 0)
    nodes = fewest_nodes(ask, stuck, rooms.ranks, gain)
    if nodes is None:
        return
    names = [ask.tree.nodes[index].name for index in nodes]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    which = f"node {shown}" if len(names) == 1 else f"{len(names)} nodes ({shown})"
    yield Relaxation(
        cause, len(names), f"uncordon {which}" if cause == CORDONED else f"bring back {which}, {cause} now"
    )


def _domain_name(ask: Ask, stuck: Stuck, best: int) -> str:
    caps = _caps(stuck)
    if not stuck.depth or not len(caps):
        return ""
    first, _ = ask.tree.domains_in(stuck.depth, stuck.span)
    path = ask.tree.path(stuck.depth, first + int(np.argmax(caps == best)))
    return f"{ask.tree.levels[stuck.depth - 1][0]} {'/'.join(path)}"


def _caps(stuck: Stuck) -> IntArray:
    first, after = stuck.board.tree.domains_in(stuck.depth, stuck.span)
    return stuck.board.caps[stuck.depth][first:after]


def _terms(ask: Ask, stuck: Stuck, pack: Pack, subgroups: Subgroups | None) -> str:
    terms = []
    if stuck.is_return:
        terms.append("beside the rest of their subgroup")
    elif subgroups is not None:
        apart = "each in another" if subgroups.apart else "each in one"
        terms.append(f"in {stuck.wanted // subgroups.size} subgroups of {subgroups.size}, {apart} {subgroups.level}")
    if ask.shape.ranks_per_node:
        terms.append(f"{ask.shape.ranks_per_node} per node")
    if ask.shape.spares:
        depth = ask.shape.narrowest
        what = "1 spare" if ask.shape.spares == 1 else f"{ask.shape.spares} spares"
        terms.append(f"with {what} per {pack.levels[depth - 1][0] if depth else 'cluster'}")
    return ", ".join(terms)
