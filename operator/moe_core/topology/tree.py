"""The immutable tree of domains. A domain is known by its path from the top, so two racks that share a name stay two.

    (root)  ()
      block b1          ("b1",)
        rack r1         ("b1", "r1")
          node n1, n2   leaves: indices into `nodes`

A node that lacks the label of some level is outside the tree; it is counted, never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_core.facts import NodeFact
from moe_core.outcome import InvalidInput

Path = tuple[str, ...]
Levels = tuple[tuple[str, str], ...]
"""(name, node label), broad to narrow."""


@dataclass(frozen=True, slots=True)
class Tree:
    """`nodes` are sorted by path, then name: neighbours in this order are near each other."""

    levels: Levels
    nodes: tuple[NodeFact, ...]
    path_of_node: tuple[Path, ...]
    unlabelled: tuple[tuple[NodeFact, str], ...] = ()
    """Nodes outside the tree with the first label they lack."""

    def domains(self, depth: int) -> dict[Path, list[int]]:
        """Node indices per domain at this depth, in path order."""
        found: dict[Path, list[int]] = {}
        for index, path in enumerate(self.path_of_node):
            found.setdefault(path[:depth], []).append(index)
        return found


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
    must = levels if needed is None else levels[:needed]
    placed: list[tuple[Path, str, NodeFact]] = []
    unlabelled: list[tuple[NodeFact, str]] = []
    for node in sorted(nodes, key=lambda n: n.name):
        lacking = next((label for _, label in must if label not in node.labels), None)
        if lacking is None:
            placed.append((tuple(node.labels.get(label, "") for _, label in levels), node.name, node))
        else:
            unlabelled.append((node, lacking))
    placed.sort(key=lambda entry: entry[:2])
    return Tree(
        levels=tuple(levels),
        nodes=tuple(node for _, _, node in placed),
        path_of_node=tuple(path for path, _, _ in placed),
        unlabelled=tuple(unlabelled),
    )
