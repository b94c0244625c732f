"""The plain readings that the planner of moe_core.topology must equal: room of one node, and all ways to place a gang.

Every way is a tuple of ranks per node, in the order of `nodes`. Only for a handful of nodes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from moe_core.facts import NodeFact
from moe_core.topology.room import PREFER_NO_SCHEDULE, Needs
from moe_core.topology.tree import Levels, Path

Way = tuple[int, ...]


def room_on(node: NodeFact, needs: Needs, *, own: Mapping[str, int], most: int) -> tuple[int, dict[str, int]]:
    """Ranks that one node takes, and what it excludes by cause."""
    empty = _times(node.allocatable, {}, needs.request, most=most)
    if empty == 0:
        short = [r for r in needs.request if node.allocatable.get(r, 0) < needs.request[r]]
        return 0, {f"nodes with too little {short[0]}" if short else "nodes that allow no pod": 1}
    for cause in _closed(node, needs):
        return 0, {cause: empty}
    used = {r: node.used.get(r, 0) + own.get(r, 0) for r in {*node.used, *own}}
    others = _times(node.allocatable, node.used, needs.request, most=most)
    free = _times(node.allocatable, used, needs.request, most=most)
    return free, {"in use": empty - others} if others < empty else {}


def _closed(node: NodeFact, needs: Needs) -> Iterator[str]:
    if not node.ready:
        yield "not ready"
    for key, value in sorted(needs.node_selector.items()):
        if node.labels.get(key) != value:
            yield f"nodeSelector {key}={value}"
    if node.unschedulable:
        yield "cordoned"
    for taint in sorted(node.taints, key=lambda t: (t.key, t.value, t.effect)):
        if taint.effect != PREFER_NO_SCHEDULE and not any(t.covers(taint) for t in needs.tolerations):
            yield f"taint {taint.key}={taint.value}" if taint.value else f"taint {taint.key}"


def _times(allocatable: Mapping[str, int], used: Mapping[str, int], request: Mapping[str, int], *, most: int) -> int:
    for resource, amount in request.items():
        most = min(most, max(0, allocatable.get(resource, 0) - used.get(resource, 0)) // amount)
    if "pods" in allocatable:
        most = min(most, max(0, allocatable["pods"] - used.get("pods", 0)))
    return most


@dataclass(frozen=True)
class Case:
    """A gang of which `kept` ranks per node stay and `wanted` come; levels as depths, 0 for none."""

    levels: Levels
    nodes: Sequence[NodeFact]
    free: Way
    wanted: int
    required: int = 0
    preferred: int = 0
    kept: Way = ()
    spares: int = 0
    ranks_per_node: int = 0
    subgroup: tuple[int, int] = (1, 0)
    """Size and depth."""
    returning: Mapping[Path, int] = field(default_factory=dict)
    """Ranks that must go back to a domain of the subgroups' depth."""

    @property
    def dealt_over(self) -> int:
        """Depth of the domains that the gang takes as few as possible of."""
        return max(self.required, self.preferred, self.subgroup[1])

    def path(self, index: int, depth: int) -> Path:
        return tuple(self.nodes[index].labels[label] for _, label in self.levels[:depth])

    def by_domain(self, way: Sequence[int], depth: int) -> Counter[Path]:
        counts: Counter[Path] = Counter()
        for index, count in enumerate(way):
            counts[self.path(index, depth)] += count
        return counts

    def loads(self, way: Way) -> Way:
        return tuple(a + b for a, b in zip(way, self.kept or (0,) * len(way), strict=True))

    def domains_used(self, way: Way, depth: int) -> set[Path]:
        return {path for path, count in self.by_domain(self.loads(way), depth).items() if count}

    def ways(self) -> list[Way]:
        """All that the hard rules allow."""
        steps = [range(room + 1) for room in self.free]
        return [way for way in product(*steps) if sum(way) == self.wanted and self._is_allowed(way)]

    def _is_allowed(self, way: Way) -> bool:
        block, loads = self.ranks_per_node, self.loads(way)
        is_new = not any(self.kept)
        if block and any(load > block or (is_new and load not in (0, block)) for load, n in zip(loads, way) if n):  # noqa: B905
            return False
        size, depth = self.subgroup
        per_group_domain = self.by_domain(way, depth)
        if any((per_group_domain[p] - self.returning.get(p, 0)) % size for p in per_group_domain):
            return False
        if any(per_group_domain[p] < count for p, count in self.returning.items()):
            return False
        left_on = [free - taken for free, taken in zip(self.free, way, strict=True)]
        if block:  # a node that is full for this gang is no spare
            left_on = [min(left, max(0, block - load)) for left, load in zip(left_on, loads, strict=True)]
        left = self.by_domain(left_on, self.dealt_over)
        taken = self.by_domain(way, self.dealt_over)
        if any(taken[p] and left[p] < self.spares for p in taken):
            return False
        return len(self.domains_used(way, self.required)) == 1

    def narrowest(self, way: Way) -> int:
        """Depth of the narrowest domain, no narrower than needed, that holds the whole gang."""
        return max(d for d in range(self.dealt_over + 1) if len(self.domains_used(way, d)) == 1)

    def even_key(self, way: Way) -> tuple[int, int]:
        """Rule 3 over domains: at home first, then even."""
        homes = {p for p, count in self.by_domain(self.kept or (0,), self.dealt_over).items() if count}
        away = sum(count for p, count in self.by_domain(way, self.dealt_over).items() if p not in homes)
        return away if homes else 0, squares(self.by_domain(self.loads(way), self.dealt_over).values())


def squares(counts: Iterable[int]) -> int:
    """The smaller, the more even."""
    return sum(count * count for count in counts)
