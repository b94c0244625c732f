"""Measured links as the planner weighs them: seconds per byte from rank to rank."""

from collections.abc import Sequence

import numpy as np

from moe_core.contract.links import Links
from moe_core.experts.checks import FloatArray


def seconds_per_byte(links: Links | None, node_of_rank: Sequence[str]) -> FloatArray | None:
    """[R, R], source first. A pair that nobody measured is as the mean of its scope; None where that is not known
    either, or nothing crosses between machines, so that no plan can be better for it.
    """
    if links is None or "network" not in links.scopes or len(set(node_of_rank)) < 2:
        return None
    of_scope = {scope: 1 / speed.bytes_per_s for scope, speed in links.scopes.items()}
    far = of_scope["network"]
    near = of_scope.get("host", 0.0)
    nodes = np.asarray(node_of_rank)
    found = np.where(nodes[:, None] == nodes[None, :], near, far)
    for row, source in zip(links.between, links.places, strict=True):
        for speed, target in zip(row, links.places, strict=True):
            if speed is not None:
                found[np.ix_(nodes == source, nodes == target)] = 1 / speed.bytes_per_s
    np.fill_diagonal(found, of_scope.get("self", 0.0))
    return found
