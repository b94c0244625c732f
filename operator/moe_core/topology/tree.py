"""The immutable tree of domains. A domain is known by its path from the top, so two racks that share a name stay two.

    depth 0  the cluster          ()
    depth 1    block b1           ("b1",)
    depth 2      rack r1          ("b1", "r1")
                   node n1, n2    leaves: indices into `nodes`

Nodes are sorted by path, then name. So a domain of any depth is a run of neighbours, known by where it starts, and
whatever is counted per node is counted per domain by adding up runs. A node that lacks the label of some level is
outside the tree; it is counted, never guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_core.facts import NodeFact, Taint
from moe_core.outcome import InvalidInput

Path = tuple[str, ...]
Levels = tuple[tuple[str, str], ...]
"""(name, node label), broad to narrow."""
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Span = tuple[int, int]
"""First node and the one after the last."""


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Built once per set of node facts; every decision works on arrays of its own beside it."""

    levels: Levels
    needed: int
    """Every node inside has the labels of the first `needed` levels."""
    nodes: tuple[NodeFact, ...]
    index_of: Mapping[str, int]
    starts: tuple[IntArray, ...]
    """[depth][domain]: its first node. Domains are numbered in path order."""
    allocatable: Mapping[str, IntArray]
    """[resource][node], base units; so is `used`. Nodes that do not limit pods offer NO_LIMIT of them."""
    used: Mapping[str, IntArray]
    not_ready: BoolArray
    cordoned: BoolArray
    tainted: Mapping[Taint, IntArray]
    """Nodes by taint."""
    unlabelled: tuple[tuple[NodeFact, str], ...] = ()
    """Nodes outside the tree with the first label they lack."""

    def path(self, depth: int, domain: int) -> Path:
        labels = self.nodes[self.starts[depth][domain]].labels
        return tuple(labels.get(label, "") for _, label in self.levels[:depth])

    def span(self, depth: int, domain: int) -> Span:
        starts = self.starts[depth]
        return int(starts[domain]), int(starts[domain + 1]) if domain + 1 < len(starts) else len(self.nodes)

    def domains_in(self, depth: int, span: Span) -> Span:
        """First domain of this depth in the span of a broader one, and the one after the last."""
        first, after = np.searchsorted(self.starts[depth], span)
        return int(first), int(after)

    def domain_of(self, depth: int, node_idx: IntArray) -> IntArray:
        return np.searchsorted(self.starts[depth], node_idx, side="right") - 1

    def parents(self, depth: int, domains: IntArray, at: int) -> IntArray:
        """The domain of the broader depth `at` that holds each of `domains`."""
        return self.domain_of(at, self.starts[depth][domains])

    def sums(self, per_node: IntArray, depth: int) -> IntArray:
        return np.add.reduceat(per_node, self.starts[depth]) if len(self.nodes) else np.zeros(0, np.int64)

    def sums_above(self, per_domain: IntArray, depth: int) -> IntArray:
        """From domains of `depth` to those one level above."""
        if not len(self.nodes):
            return np.zeros(0, np.int64)
        return np.add.reduceat(per_domain, np.searchsorted(self.starts[depth], self.starts[depth - 1]))


NO_LIMIT = 1 << 40


def depth_of(level: str, levels: Levels) -> int:
    """How many path elements name a domain of this level; 0 for the whole cluster. Raises InvalidInput if unknown."""
    if not level:
        return 0
    names = [name for name, _ in levels]
    if level not in names:
        raise InvalidInput(f"level {level!r} is not in the topology; its levels are {', '.join(names) or 'none'}")
    return names.index(level) + 1


def build_tree(nodes: Sequence[NodeFact], levels: Levels = (), *, needed: int | None = None) -> Tree:
    """Nodes must carry the labels of the first `needed` levels (all by default); narrower ones only sort them."""
    needed = len(levels) if needed is None else needed
    labels = [label for _, label in levels]
    must = labels[:needed]
    by_path: dict[Path, list[NodeFact]] = {}
    unlabelled: list[tuple[NodeFact, str]] = []
    for node in nodes:
        known = node.labels
        lacking = next((label for label in must if label not in known), None)
        if lacking is None:
            by_path.setdefault(tuple([known.get(label, "") for label in labels]), []).append(node)
        else:
            unlabelled.append((node, lacking))
    paths = sorted(by_path)
    inside = tuple(node for path in paths for node in sorted(by_path[path], key=lambda n: n.name))
    return Tree(
        levels=tuple(levels),
        needed=needed,
        nodes=inside,
        index_of={node.name: index for index, node in enumerate(inside)},
        starts=_starts(paths, [len(by_path[path]) for path in paths], len(levels)),
        allocatable=_columns([node.allocatable for node in inside], absent={"pods": NO_LIMIT}),
        used=_columns([node.used for node in inside], absent={}),
        not_ready=np.array([not node.ready for node in inside], bool),
        cordoned=np.array([node.unschedulable for node in inside], bool),
        tainted=_by_taint(inside),
        unlabelled=tuple(sorted(unlabelled, key=lambda entry: entry[0].name)),
    )


def _starts(paths: Sequence[Path], sizes: Sequence[int], num_levels: int) -> tuple[IntArray, ...]:
    """From the distinct paths, sorted, and how many nodes each has."""
    starts: list[list[int]] = [[] for _ in range(num_levels + 1)]
    previous: Path | None = None
    first = 0
    for path, size in zip(paths, sizes, strict=True):
        shared = -1 if previous is None else next(d for d in range(num_levels) if path[d] != previous[d])
        for depth in range(shared + 1, num_levels + 1):
            starts[depth].append(first)
        previous = path
        first += size
    return tuple(_frozen(np.array(found, np.int64)) for found in starts)


def _columns(rows: Sequence[Mapping[str, int]], absent: Mapping[str, int]) -> dict[str, IntArray]:
    """By resource. Row after row, since with many nodes it is looking at a row that costs."""
    resources = sorted(set().union(*rows))
    values = [row.get(r, absent.get(r, 0)) for row in rows for r in resources]
    columns = np.array(values, np.int64).reshape(len(rows), len(resources)).T
    return {r: _frozen(np.ascontiguousarray(column)) for r, column in zip(resources, columns, strict=True)}


def _by_taint(nodes: Sequence[NodeFact]) -> dict[Taint, IntArray]:
    found: dict[Taint, list[int]] = {}
    for index, node in enumerate(nodes):
        for taint in node.taints:
            found.setdefault(taint, []).append(index)
    in_order = sorted(found, key=lambda taint: (taint.key, taint.value, taint.effect))
    return {taint: _frozen(np.array(found[taint], np.int64)) for taint in in_order}


def _frozen(array: IntArray) -> IntArray:
    array.setflags(write=False)
    return array
