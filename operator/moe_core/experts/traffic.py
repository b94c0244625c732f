"""The communication budget of expert parallelism: who sends how many bytes to whom in one step, before it runs.

Two ways to exchange, as the data plane has them (moe_runtime.dispatch.all_to_all; relayed.py has the third, by node):

    by pick    each pick of a token that is answered elsewhere travels there and back; the number of rows for each slot
               is told before
    by token   every token with its K addresses and weights goes to every other rank, and a sum comes back from each

A step that trains goes by pick, and its gradients once more the same ways back. A rank that is alone exchanges nothing.

Expected, not sampled: a pick goes to expert e with the share of the load that e has in its layer, and from each source
rank to the copies that choice.py names, as many of its tokens as go that way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_core.contract.dispatch import ADDRESS_BYTES, WEIGHT_BYTES, Wire, gradient_wire, row_bytes
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.checks import FloatArray, IntArray, as_load_LE
from moe_core.experts.choice import NO_SLOT
from moe_core.experts.tiers import Tiers
from moe_core.outcome import InvalidInput

COUNT_BYTES = 8
SAME_RANK = "rank"


@dataclass(frozen=True, slots=True)
class StepShape:
    """One step as every rank takes part in it: T tokens (or a mean) of D numbers, K picks each, in all MoE layers;
    what their rows travel as there and back, and how many ranks an EP group has (0: all are one).
    """

    tokens_per_rank: float
    hidden_size: int
    top_k: int
    group_ranks: int = 0
    wire: Wire = "Float32"
    combine_wire: Wire = "Float32"

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_rank < math.inf:
            raise InvalidInput(f"tokens_per_rank must be a positive number, got {self.tokens_per_rank}")
        for name in ("hidden_size", "top_k"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def row_there(self) -> int:
        """Bytes of one row that goes to an expert."""
        return row_bytes(self.wire, self.hidden_size)

    @property
    def row_back(self) -> int:
        return row_bytes(self.combine_wire, self.hidden_size)

    @property
    def gradient_there(self) -> int:
        """Of the gradient of a row that came back: it goes to the expert."""
        return row_bytes(gradient_wire(self.combine_wire), self.hidden_size)

    @property
    def gradient_back(self) -> int:
        return row_bytes(gradient_wire(self.wire), self.hidden_size)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one step over all layers. dispatch_RR[s, d] goes from rank s to rank d, combine_RR[d, s] back.

    What stays on a rank is on the diagonal: it is copied, not sent.
    """

    dispatch_RR: FloatArray
    combine_RR: FloatArray

    @property
    def total_RR(self) -> FloatArray:
        """Both ways; whoever sends stands first."""
        return self.dispatch_RR + self.combine_RR

    @property
    def sent_bytes(self) -> float:
        return float(self.total_RR.sum() - np.trace(self.total_RR))

    def by_scope(self, path_of_rank: Sequence[Sequence[str]], levels: Sequence[str]) -> Mapping[str, float]:
        """Bytes by the narrowest level whose domain holds both ends, narrow to broad, `across` for none.

        path_of_rank: each rank's domain at each level, broad to narrow (block, rack, host). Raises InvalidInput for a
        path of another length.
        """
        for rank, path in enumerate(path_of_rank):
            if len(path) != len(levels):
                raise InvalidInput(f"path_of_rank[{rank}] must name a domain of {list(levels)}, got {list(path)}")
        total_RR = self.total_RR
        num_ranks = len(total_RR)
        depth_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        for depth in range(1, len(levels) + 1):
            domains = [tuple(path[:depth]) for path in path_of_rank]
            ids = {domain: index for index, domain in enumerate(sorted(set(domains)))}
            domain_R = np.asarray([ids[domain] for domain in domains])
            depth_RR[domain_R[:, None] == domain_R[None, :]] = depth
        np.fill_diagonal(depth_RR, len(levels) + 1)
        names = ("across", *levels, SAME_RANK)
        return {names[depth]: float(total_RR[depth_RR == depth].sum()) for depth in range(len(names) - 1, -1, -1)}


def picks_between(
    expert_map: ExpertMap, load: ArrayLike, shape: StepShape, *, domain_of_rank: Sequence[str] | None = None
) -> FloatArray:
    """[L, R, R] expected picks of one step from source rank to answering rank; picks of lost experts go nowhere.

    load: [L, E] of all sources alike, or an array [R, L, E] of each. A layer without load counts as even. Raises
    InvalidInput for a bad load.
    """
    load_RLE = _load_of_sources(load, expert_map)
    ranks = [rank for rank, count in enumerate(expert_map.slots_of_rank) if count]
    rank_of_slot = np.asarray(expert_map.rank_of_slot, dtype=np.int64)
    num_layers, num_ranks = expert_map.num_layers, expert_map.num_ranks
    first_L1 = np.arange(num_layers)[:, None] * num_ranks
    found = np.zeros((num_layers, num_ranks, num_ranks))
    tiers = Tiers(expert_map, ranks, group_ranks=shape.group_ranks, domain_of_rank=domain_of_rank)
    for source in ranks:
        chosen_WLE = tiers.of_source(source)
        total_L1 = load_RLE[source].sum(1, keepdims=True)
        even = 1 / expert_map.num_logical_experts
        share_LE = np.where(total_L1 > 0, load_RLE[source] / np.maximum(total_L1, 1e-300), even)
        picks_LE = share_LE * shape.tokens_per_rank * shape.top_k
        picks_WLE = np.where(chosen_WLE != NO_SLOT, picks_LE / len(chosen_WLE), 0.0)
        cell_WLE = rank_of_slot[chosen_WLE] + first_L1
        counts = np.bincount(cell_WLE.ravel(), picks_WLE.ravel(), minlength=num_layers * num_ranks)
        found[:, source] = counts.reshape(num_layers, num_ranks)
    return found


def _load_of_sources(load: ArrayLike, expert_map: ExpertMap) -> FloatArray:
    """[R, L, E]."""
    shape = {"num_layers": expert_map.num_layers, "num_logical_experts": expert_map.num_logical_experts}
    if not isinstance(load, np.ndarray) or load.ndim != 3:
        load_LE = as_load_LE(load, **shape)
        return np.broadcast_to(load_LE, (expert_map.num_ranks, *load_LE.shape))
    if len(load) != expert_map.num_ranks:
        raise InvalidInput(f"load must be that of {expert_map.num_ranks} source ranks, got {len(load)}")
    return np.stack([as_load_LE(load_LE, **shape) for load_LE in load])


def traffic_by_pick(
    expert_map: ExpertMap,
    load: ArrayLike,
    shape: StepShape,
    *,
    trains: bool = False,
    domain_of_rank: Sequence[str] | None = None,
) -> Traffic:
    """One count for each slot of the widest rank, then rows there and back, and again if the step `trains`."""
    pairs_RR = exchanging_pairs(expert_map)
    rows_RR = picks_between(expert_map, load, shape, domain_of_rank=domain_of_rank).sum(0) * pairs_RR
    there = shape.row_there + (shape.gradient_there if trains else 0)
    back = shape.row_back + (shape.gradient_back if trains else 0)
    counts = expert_map.num_layers * max(1, *expert_map.slots_of_rank) * COUNT_BYTES
    return Traffic(dispatch_RR=rows_RR * there + pairs_RR * counts, combine_RR=rows_RR.T * back)


def traffic_by_token(expert_map: ExpertMap, shape: StepShape) -> Traffic:
    """The same to every rank, whatever the load."""
    pairs_RR = exchanging_pairs(expert_map).astype(np.float64)
    there = shape.row_there + shape.top_k * (ADDRESS_BYTES + WEIGHT_BYTES)
    tokens = expert_map.num_layers * shape.tokens_per_rank
    return Traffic(dispatch_RR=pairs_RR * tokens * there, combine_RR=pairs_RR * tokens * shape.row_back)


def exchanging_pairs(expert_map: ExpertMap) -> NDArray[np.bool_]:
    """[R, R] which ranks exchange with which."""
    takes_part_R = np.asarray(expert_map.slots_of_rank) > 0
    return np.outer(takes_part_R, takes_part_R & (takes_part_R.sum() > 1))


def domains_per_token(
    expert_map: ExpertMap, picks_of_layer: Sequence[IntArray], *, domain_of_rank: Sequence[str], group_ranks: int = 0
) -> float:
    """How many failure domains other than its own a token of a trace has to be sent to, on average over the layers.

    picks_of_layer: [T, K] for each layer of the map, its tokens dealt over the ranks in turn. A pick goes to the copy
    that its source chooses for it; lost experts, and picks of nobody (negative), count nowhere.
    """
    ranks = np.flatnonzero(expert_map.slots_of_rank)
    ids = {name: index for index, name in enumerate(dict.fromkeys(domain_of_rank))}
    domain_R = np.asarray([ids[name] for name in domain_of_rank])
    domain_of_slot = domain_R[np.asarray(expert_map.rank_of_slot)]
    tiers = Tiers(expert_map, ranks.tolist(), group_ranks=group_ranks, domain_of_rank=domain_of_rank)
    chosen_RWLE = np.stack([tiers.of_source(rank) for rank in ranks.tolist()])
    means = []
    for layer_idx, picks_TK in enumerate(picks_of_layer):
        token_of_rank_T, row_T = np.divmod(np.arange(len(picks_TK)), len(ranks))
        way_T = token_of_rank_T % chosen_RWLE.shape[1]
        home_T = domain_R[ranks[row_T]]
        chosen_TK = chosen_RWLE[row_T[:, None], way_T[:, None], layer_idx, picks_TK]
        slot_TK = np.where(picks_TK < 0, NO_SLOT, chosen_TK)
        meets_TG = np.zeros((len(picks_TK), len(ids)), dtype=bool)
        np.put_along_axis(
            meets_TG, np.where(slot_TK == NO_SLOT, home_T[:, None], domain_of_slot[slot_TK]), True, axis=1
        )
        meets_TG[np.arange(len(picks_TK)), home_T] = False
        means.append(float(meets_TG.sum(1).mean()))
    return float(np.mean(means))
