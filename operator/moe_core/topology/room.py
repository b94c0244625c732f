"""How many ranks each node has room for, and why the others have none: the counted exclusions of a NoFit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_core.facts import NodeFact, Taint

PREFER_NO_SCHEDULE = "PreferNoSchedule"


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


@dataclass(frozen=True, slots=True)
class Room:
    """`ranks` more ranks fit; `excluded` counts per cause the ranks that would fit otherwise.

    On a node where none ever could, there is no such number: a cause that begins with `nodes` counts nodes.
    """

    ranks: int
    excluded: Mapping[str, int] = field(default_factory=dict)


def room_on(node: NodeFact, needs: Needs, *, own: Mapping[str, int], most: int) -> Room:
    """Room on one node for up to `most` ranks. `own` is what this owner's own pods use there already, in base units."""
    empty = _times(node.allocatable, {}, needs.request, most=most)
    if empty == 0:
        short = [r for r in needs.request if node.allocatable.get(r, 0) < needs.request[r]]
        return Room(0, {f"nodes with too little {short[0]}" if short else "nodes that allow no pod": 1})
    for cause in _closed(node, needs):
        return Room(0, {cause: empty})
    used = {r: node.used.get(r, 0) + own.get(r, 0) for r in sorted({*node.used, *own})}
    free = _times(node.allocatable, used, needs.request, most=most)
    others = _times(node.allocatable, node.used, needs.request, most=most)
    return Room(free, {"in use": empty - others} if others < empty else {})


def _closed(node: NodeFact, needs: Needs) -> list[str]:
    """Why the node takes no rank at all; the first cause is the one that is told."""
    causes = []
    if not node.ready:
        causes.append("not ready")
    for key, value in sorted(needs.node_selector.items()):
        if node.labels.get(key) != value:
            causes.append(f"nodeSelector {key}={value}")
    if node.unschedulable:
        causes.append("cordoned")
    for taint in sorted(node.taints, key=lambda t: (t.key, t.value, t.effect)):
        if taint.effect != PREFER_NO_SCHEDULE and not any(t.covers(taint) for t in needs.tolerations):
            causes.append(f"taint {taint.key}={taint.value}" if taint.value else f"taint {taint.key}")
    return causes


def _times(allocatable: Mapping[str, int], used: Mapping[str, int], request: Mapping[str, int], *, most: int) -> int:
    """How often `request` (and one pod) fits into what is left, at most `most`; an unlisted resource is not offered."""
    times = most
    for resource, amount in request.items():
        times = min(times, max(0, allocatable.get(resource, 0) - used.get(resource, 0)) // amount)
    if "pods" in allocatable:
        times = min(times, max(0, allocatable["pods"] - used.get("pods", 0)))
    return times
