"""What a placement costs an all-to-all: who talks across which level.

In an all-to-all every rank sends an equal part to every rank of its subgroup, itself included; so counting pairs is
counting bytes. Experts that are chosen unevenly shift bytes between ranks, which is the assignment's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_core.outcome import InvalidInput
from moe_core.topology.tree import Tree

RANK, NODE, CLUSTER = "rank", "node", "cluster"


@dataclass(frozen=True, slots=True)
class Score:
    """Smaller `crossing` is better: pairs that cross the broadest level decide first."""

    scopes: tuple[str, ...]
    """rank (itself), node, then the levels from narrow to broad, cluster: the narrowest that holds both ends."""
    pairs: tuple[int, ...]
    """Ordered pairs by scope."""
    busiest: tuple[float, ...]
    """By scope but the last: the largest part of all bytes that leaves one such domain. It bounds the step's time."""

    @property
    def crossing(self) -> tuple[int, ...]:
        return tuple(reversed(self.pairs[1:]))

    @property
    def share(self) -> Mapping[str, float]:
        """Part of all bytes that goes as far as each scope and no further."""
        total = sum(self.pairs)
        return {scope: count / total if total else 0.0 for scope, count in zip(self.scopes, self.pairs, strict=True)}

    def __str__(self) -> str:
        return ", ".join(f"{scope} {part:.1%}" for scope, part in self.share.items())


def score(tree: Tree, node_of_rank: Mapping[int, str], *, subgroup_size: int = 0) -> Score:
    """subgroup_size: ranks 0 to size-1 exchange among themselves, and so on; 0 for all with all.

    Raises InvalidInput for a node outside the tree.
    """
    unknown = sorted({name for name in node_of_rank.values() if name not in tree.index_of})
    if unknown:
        raise InvalidInput(f"node {unknown[0]!r} is not in the tree ({len(unknown)} such nodes)")
    ranks = sorted(node_of_rank)
    nodes = np.array([tree.index_of[node_of_rank[rank]] for rank in ranks], np.int64)
    group = np.array(ranks, np.int64) // subgroup_size if subgroup_size else np.zeros(len(ranks), np.int64)
    size_of = np.bincount(group, minlength=1) if ranks else np.zeros(1, np.int64)
    total = int((size_of**2).sum())
    units = [np.arange(len(ranks)), nodes]
    units += [tree.domain_of(depth, nodes) for depth in range(len(tree.levels), -1, -1)]
    inside, busiest = [], []
    for unit in units:
        _, domain_group = np.unique(np.stack([unit, group]), axis=1, return_inverse=True)
        count = np.bincount(domain_group.ravel())
        first = np.unique(domain_group.ravel(), return_index=True)[1]
        inside.append(int((count**2).sum()))
        leaving = count * (size_of[group[first]] - count)
        by_unit = np.bincount(np.unique(unit[first], return_inverse=True)[1], weights=leaving)
        busiest.append(float(by_unit.max(initial=0)) / total if total else 0.0)
    names = (RANK, NODE, *(name for name, _ in reversed(tree.levels)), CLUSTER)
    return Score(names, tuple(np.diff(inside, prepend=0).tolist()), tuple(busiest[:-1]))


def pairs_apart(counts: npt.NDArray[Any]) -> int:
    """Ordered pairs of ranks that lie in two different domains, from the ranks per domain."""
    return int(counts.sum() ** 2 - (counts**2).sum())
