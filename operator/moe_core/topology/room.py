"""How many ranks each node has room for, and why the others have none: the counted exclusions of a NoFit.

All nodes at once: numbers are arrays of the tree, and rules (selector, tolerations) are read once per label or taint.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_core.facts import Taint
from moe_core.topology.tree import NO_LIMIT, BoolArray, IntArray, Span, Tree

PREFER_NO_SCHEDULE = "PreferNoSchedule"
NOT_READY, CORDONED, IN_USE = "not ready", "cordoned", "in use"
Use = Mapping[str, Mapping[str, int]]
"""Base units by node, then by resource."""


@dataclass(frozen=True, slots=True)
class Tolerated:
    """A toleration as in a pod; an empty key with Exists tolerates everything."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""

    def covers(self, taint: Taint) -> bool:
        if self.effect and self.effect != taint.effect:
            return False
        if not self.key:
            return self.operator == "Exists"
        return self.key == taint.key and (self.operator == "Exists" or self.value == taint.value)


@dataclass(frozen=True, slots=True)
class Needs:
    """What every rank of the gang asks of its node; `request` in base units (see quantity.py)."""

    request: Mapping[str, int] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Tolerated] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Rooms:
    """Per node of the tree. A node is excluded whole by its first cause; what stands on an open node is `in use`."""

    ranks: IntArray
    in_use: IntArray
    cause_of_node: IntArray
    """Index into `causes`, OPEN for none."""
    causes: tuple[str, ...]
    lost: IntArray
    """Ranks that a closed node would hold if it were open and empty; 1 if it is too small for any."""

    def excluded(self, span: Span) -> dict[str, int]:
        part = slice(*span)
        counts = np.bincount(self.cause_of_node[part] - OPEN, weights=self.lost[part], minlength=len(self.causes) + 1)
        found: dict[str, int] = {}
        for cause, count in zip((IN_USE, *self.causes), (int(self.in_use[part].sum()), *counts[1:]), strict=True):
            if count:
                found[cause] = found.get(cause, 0) + int(count)
        return found


OPEN = -1


def rooms(tree: Tree, needs: Needs, *, own: Use, most: int, ignoring: Collection[str] = ()) -> Rooms:
    """Room for up to `most` ranks on every node.

    own: what this owner's own pods use there already. ignoring: causes that do not count, to try what a change brings.
    """
    empty = _times(tree, needs.request, {}, most=most)
    others = empty if IN_USE in ignoring else _times(tree, needs.request, tree.used, most=most)
    used = {} if IN_USE in ignoring else tree.used
    free = _times(tree, needs.request, _plus(tree, used, own), most=most)
    closed = [*_too_small(tree, needs.request, empty), *_closed(tree, needs)]
    cause_of_node = np.full(len(tree.nodes), OPEN)
    causes: list[str] = []
    for cause, mask in closed:
        if cause not in ignoring:
            cause_of_node[mask & (cause_of_node == OPEN)] = len(causes)
            causes.append(cause)
    is_open = cause_of_node == OPEN
    return Rooms(
        ranks=np.where(is_open, free, 0),
        in_use=np.where(is_open, empty - others, 0),
        cause_of_node=cause_of_node,
        causes=tuple(causes),
        lost=np.where(is_open, 0, np.maximum(empty, 1)),
    )


def _times(tree: Tree, request: Mapping[str, int], used: Mapping[str, IntArray], *, most: int) -> IntArray:
    """How often `request` (and one pod) fits into what is left, at most `most`; an unlisted resource is not offered."""
    times = np.full(len(tree.nodes), most)
    for resource, amount in {**request, "pods": 1}.items():
        offered = tree.allocatable.get(resource, NO_LIMIT if resource == "pods" else 0)
        left = np.maximum(offered - used[resource], 0) if resource in used else np.maximum(offered, 0)
        times = np.minimum(times, left // amount)
    return times


def _plus(tree: Tree, used: Mapping[str, IntArray], own: Use) -> dict[str, IntArray]:
    total = dict(used)
    fresh: set[str] = set()
    for name, by_resource in own.items():
        index = tree.index_of.get(name)
        if index is None:
            continue
        for resource, amount in by_resource.items():
            if resource not in fresh:
                fresh.add(resource)
                total[resource] = total[resource].copy() if resource in total else np.zeros(len(tree.nodes), np.int64)
            total[resource][index] += amount
    return total


def _too_small(tree: Tree, request: Mapping[str, int], empty: IntArray) -> list[tuple[str, BoolArray]]:
    """Nodes that hold no rank even when empty, by the first resource that is short."""
    small = empty == 0
    lacking = {r: small & (tree.allocatable.get(r, 0) < amount) for r, amount in request.items()}
    return [
        *((f"nodes with too little {r}", nodes) for r, nodes in lacking.items()),
        ("nodes that allow no pod", small),
    ]


def _closed(tree: Tree, needs: Needs) -> list[tuple[str, BoolArray]]:
    """Why nodes take no rank at all, in the order in which causes are told."""
    found = [(NOT_READY, tree.not_ready)]
    for key, value in sorted(needs.node_selector.items()):
        found.append((f"nodeSelector {key}={value}", np.array([n.labels.get(key) != value for n in tree.nodes], bool)))
    found.append((CORDONED, tree.cordoned))
    for taint, nodes in tree.tainted.items():
        if taint.effect != PREFER_NO_SCHEDULE and not any(t.covers(taint) for t in needs.tolerations):
            mask = np.zeros(len(tree.nodes), bool)
            mask[nodes] = True
            found.append((f"taint {taint.key}={taint.value}" if taint.value else f"taint {taint.key}", mask))
    return found
