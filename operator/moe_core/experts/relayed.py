"""Bytes of a step whose tokens cross to a node once and are passed on there (moe_runtime.dispatch.by_node), before it
runs: traffic.py's picks, with those that go the same way taken together.

A token of K picks misses a place that each pick goes to with probability q, of E experts of which it picks none twice,
with about

    (1 - q) (1 - q E / (E - 1)) ... (1 - q E / (E - K + 1))

which is exact where all experts are as popular as each other. L layers, R ranks, G nodes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moe_core.contract.dispatch import ADDRESS_BYTES, WEIGHT_BYTES, gate_of
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.checks import FloatArray
from moe_core.experts.traffic import COUNT_BYTES, StepShape, Traffic, exchanging_pairs, picks_between


def traffic_by_node(
    expert_map: ExpertMap,
    load: ArrayLike,
    shape: StepShape,
    *,
    node_of_rank: Sequence[str],
    trains: bool = False,
) -> Traffic:
    """load as in `picks_between`. Raises InvalidInput."""
    pairs_RR = exchanging_pairs(expert_map)
    ranks = np.flatnonzero(pairs_RR.any(axis=1))
    if not len(ranks):
        nothing = np.zeros(pairs_RR.shape)
        return Traffic(dispatch_RR=nothing, combine_RR=nothing.copy())
    picks_LRR = picks_between(expert_map, load, shape, domain_of_rank=node_of_rank)
    share_LRR = picks_LRR / (shape.tokens_per_rank * shape.top_k)
    names = [node_of_rank[rank] for rank in ranks.tolist()]
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    node_R = np.full(len(pairs_RR), -1)
    node_R[ranks] = [number_of[name] for name in names]
    gates = gate_of(names)

    num_experts = expert_map.num_logical_experts
    meets_RR = _meets(share_LRR, shape.top_k, num_experts).sum(0) * shape.tokens_per_rank
    share_LRG = np.stack([share_LRR[:, :, node_R == node].sum(2) for node in range(len(number_of))], axis=2)
    meets_RG = _meets(share_LRG, shape.top_k, num_experts).sum(0) * shape.tokens_per_rank

    crossing_RR, fanned_RR = np.zeros(pairs_RR.shape), np.zeros(pairs_RR.shape)
    for place, source in enumerate(ranks.tolist()):
        for node in range(len(number_of)):
            gate = int(ranks[gates[place][node]])
            if node != node_R[source]:
                crossing_RR[source, gate] += meets_RG[source, node]
            fanned_RR[gate] += np.where(node_R == node, meets_RR[source], 0.0)
    rows_RR = crossing_RR + fanned_RR
    beside = shape.top_k * (ADDRESS_BYTES + WEIGHT_BYTES)
    there, back = shape.row_there + beside, shape.row_back
    if trains:
        there, back = there + shape.gradient_there, back + shape.gradient_back + shape.top_k * WEIGHT_BYTES
    counts = expert_map.num_layers * 2 * COUNT_BYTES
    return Traffic(dispatch_RR=rows_RR * there + pairs_RR * counts, combine_RR=rows_RR.T * back)


def _meets(share: FloatArray, top_k: int, num_experts: int) -> FloatArray:
    """The chance that a token has a pick at each place, in the shape of `share`."""
    misses = np.ones_like(share)
    for before in range(min(top_k, num_experts)):
        misses *= np.clip(1 - share * num_experts / (num_experts - before), 0.0, 1.0)
    return 1 - misses
