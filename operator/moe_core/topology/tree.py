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

from moe_core.facts import NodeFact
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
    placed: list[tuple[Path, str, NodeFact]] = []
    unlabelled: list[tuple[NodeFact, str]] = []
    for node in nodes:
        lacking = next((label for label in must if label not in node.labels), None)
        if lacking is None:
            placed.append((tuple([node.labels.get(label, "") for label in labels]), node.name, node))
        else:
            unlabelled.append((node, lacking))
    placed.sort(key=lambda entry: entry[:2])
    inside = tuple(node for _, _, node in placed)
    return Tree(
        levels=tuple(levels),
        needed=needed,
        nodes=inside,
        index_of={node.name: index for index, node in enumerate(inside)},
        starts=_starts([path for path, _, _ in placed], len(levels)),
        allocatable=_columns([node.allocatable for node in inside], absent={"pods": NO_LIMIT}),
        used=_columns([node.used for node in inside]),
        unlabelled=tuple(sorted(unlabelled, key=lambda entry: entry[0].name)),
    )


def _starts(paths: Sequence[Path], num_levels: int) -> tuple[IntArray, ...]:
    starts: list[list[int]] = [[] for _ in range(num_levels + 1)]
    previous: Path | None = None
    for index, path in enumerate(paths):
        if path == previous:
            continue
        shared = -1 if previous is None else next(d for d in range(num_levels) if path[d] != previous[d])
        for depth in range(shared + 1, num_levels + 1):
            starts[depth].append(index)
        previous = path
    return tuple(_frozen(found) for found in starts)


def _columns(rows: Sequence[Mapping[str, int]], absent: Mapping[str, int] | None = None) -> dict[str, IntArray]:
    resources = sorted({resource for row in rows for resource in row})
    return {r: _frozen([row.get(r, (absent or {}).get(r, 0)) for row in rows]) for r in resources}


def _frozen(values: Sequence[int]) -> IntArray:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array
