"""Hierarchical dispatch: a token crosses to another node once, whoever holds its experts there, and one sum comes back.

    cross    each token once to every node where it has picks, with all its addresses and weights: to the gate, the rank
             of that node that takes this source's tokens. Sources are dealt over a node's ranks in turn.
    fan out  the gate, and the source in its own node, sends each token once to every rank there that holds one of its
             picks
    experts  each rank runs its picks, weighted, and sums them per token
    home     sums back to gate and source, summed there, and one row for each token and node back across

Two exchanges more than by pick, for fewer rows between nodes; where all ranks share a node only the inner two
are made, and a token goes once to each rank instead of once for each pick. How many rows will come is told beforehand
in one exchange of counts. After DeepEP (normal kernels: across nodes to the rank of equal index, then inside).

T own tokens, D model, K picks per token, R ranks, G nodes, C rows that a rank passes on (own tokens with a pick in its
node, then what came across), Q rows fanned out to it, P picks on its own slots.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from moe_core.contract.dispatch import gate_of
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.group_face import Group
from moe_runtime.dispatch.plan import LOST, DispatchPlan
from moe_runtime.dispatch.reference import RunSlots
from moe_runtime.dispatch.travel import Trip, post
from moe_runtime.dispatch.wire import Legs


@dataclass(frozen=True, slots=True)
class Relay:
    """Who passes whose tokens on, by position; every rank computes the same.

    node_R: number of each rank's node; gate_RG: who takes a source's tokens for a node (the source itself at home).
    others: the other nodes as this rank sends to them, in order of their gates.
    """

    position: int
    node_R: torch.Tensor
    gate_RG: torch.Tensor
    others: tuple[int, ...]

    @classmethod
    def of(cls, nodes: Sequence[str], *, position: int, device: str = "cpu") -> "Relay":
        """nodes: each position's. Raises InvalidInput."""
        if not 0 <= position < len(nodes):
            raise InvalidInput(f"position {position} is none of {len(nodes)} ranks")
        number_of = {name: number for number, name in enumerate(dict.fromkeys(nodes))}
        node_of, gates = [number_of[name] for name in nodes], gate_of(nodes)
        others = sorted(set(number_of.values()) - {node_of[position]}, key=lambda node: gates[position][node])
        return cls(position, torch.tensor(node_of, device=device), torch.tensor(gates, device=device), tuple(others))

    @property
    def home(self) -> int:
        return int(self.node_R[self.position])

    @property
    def num_nodes(self) -> int:
        return self.gate_RG.shape[1]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Rows by position: own tokens that cross to its gate, or come from a source; rows fanned out to this rank."""

    crossing: list[int]
    arriving: list[int]
    fanned_in: list[int]


def run_by_node(
    x_TD: torch.Tensor,
    address_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    *,
    plan: DispatchPlan,
    group: Group,
    relay: Relay,
    run_slots: RunSlots,
    legs: Legs,
    overlaps: bool = False,
) -> Generator[None, None, torch.Tensor]:
    """[T, D] like `reference.run_local`, over the group, differentiable. Raises GroupFault.

    A generator that stops wherever rows are on their way; its return value is the result. LOST picks stay at home.
    """
    rank_TK = _ranks(address_TK, plan)
    reach_TR = _met(rank_TK, plan.size)
    meets_TG = _met(torch.where(rank_TK == LOST, LOST, relay.node_R[rank_TK]), relay.num_nodes)
    told_R2 = _to_tell(reach_TR, meets_TG, relay)
    telling = post(group, told_R2, (1,) * group.size, (1,) * group.size, overlaps=overlaps)
    yield
    counts = _counts(told_R2, telling.wait(), relay)
    home_C = torch.nonzero(meets_TG[:, relay.home]).squeeze(-1)  # device sync: own tokens with a pick at home
    parts = [(x_TD[home_C], weight_TK[home_C], address_TK[home_C])]

    cross_T: torch.Tensor | None = None
    if relay.others:
        order = torch.tensor(relay.others, device=x_TD.device)
        cross_T = torch.nonzero(meets_TG[:, order].T)[:, 1]  # device sync: by gate, then token
        crossing = Trip(group, legs.there, counts.crossing, counts.arriving, overlaps)
        crossing.depart(x_TD[cross_T], weight_TK[cross_T], address_TK[cross_T])
        yield
        parts.append(crossing.arrive())
    x_CD, weight_CK, address_CK = (torch.cat(part) for part in zip(*parts, strict=True))

    at_home_CR = _met(_ranks(address_CK, plan), plan.size) & (relay.node_R == relay.home)
    fanned_Q = torch.nonzero(at_home_CR.T)[:, 1]  # device sync: by rank, then row
    fanned_out = at_home_CR.sum(dim=0).tolist()
    fanning = Trip(group, legs.there, fanned_out, counts.fanned_in, overlaps)
    fanning.depart(x_CD[fanned_Q], weight_CK[fanned_Q], address_CK[fanned_Q])
    yield
    sum_QD = _run(*fanning.arrive(), plan=plan, run_slots=run_slots)

    homing = Trip(group, legs.back, counts.fanned_in, fanned_out, overlaps)
    homing.depart(sum_QD)
    yield
    back_QD = homing.arrive()[0]
    sum_CD = back_QD.new_zeros(len(x_CD), back_QD.shape[1]).index_add(0, fanned_Q, back_QD)
    sum_TD = back_QD.new_zeros(len(x_TD), back_QD.shape[1]).index_add(0, home_C, sum_CD[: len(home_C)])
    if cross_T is not None:
        recrossing = Trip(group, legs.back, counts.arriving, counts.crossing, overlaps)
        recrossing.depart(sum_CD[len(home_C) :])
        yield
        sum_TD = sum_TD.index_add(0, cross_T, recrossing.arrive()[0])
    return sum_TD.to(x_TD.dtype)


def _ranks(address_NK: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """[N, K] positions; LOST stays LOST."""
    return torch.div(address_NK, plan.slots_stride, rounding_mode="floor")


def _met(place_NK: torch.Tensor, num_places: int) -> torch.Tensor:
    """[N, places] which ranks, or nodes, each row has a pick at; LOST is none."""
    met = torch.zeros(len(place_NK), num_places + 1, dtype=torch.bool, device=place_NK.device)
    return met.scatter(1, place_NK + 1, value=True)[:, 1:]


def _to_tell(reach_TR: torch.Tensor, meets_TG: torch.Tensor, relay: Relay) -> torch.Tensor:
    """[R, 2] for every rank how many rows cross to it as a gate, and how many tokens of this rank end there."""
    crosses_G = meets_TG.sum(dim=0)
    crosses_G[relay.home] = 0
    told_R2 = torch.zeros(reach_TR.shape[1], 2, dtype=torch.int64, device=reach_TR.device)
    told_R2[:, 0].index_add_(0, relay.gate_RG[relay.position], crosses_G)
    told_R2[:, 1] = reach_TR.sum(dim=0)
    return told_R2


def _counts(told_R2: torch.Tensor, heard_R2: torch.Tensor, relay: Relay) -> _Counts:
    # what ends here comes from the source itself, or by the gate of this node that takes that source's tokens
    fanned_in_R = torch.zeros(len(told_R2), dtype=torch.int64, device=told_R2.device)
    fanned_in_R.index_add_(0, relay.gate_RG[:, relay.home], heard_R2[:, 1])
    # device sync: sizes the exchanges
    crossing, arriving, fanned_in = torch.stack([told_R2[:, 0], heard_R2[:, 0], fanned_in_R]).tolist()
    return _Counts(crossing, arriving, fanned_in)


def _run(
    x_QD: torch.Tensor, weight_QK: torch.Tensor, address_QK: torch.Tensor, *, plan: DispatchPlan, run_slots: RunSlots
) -> torch.Tensor:
    """[Q, D] the weighted sum over the picks of each row that lie in this rank's slots."""
    if not len(x_QD):
        return x_QD  # rows of no one stay part of the graph, so that this rank runs the exchanges of backward too
    slot_QK = address_QK - plan.position * plan.slots_stride
    row_P, pick_P = torch.nonzero((slot_QK >= 0) & (slot_QK < plan.slots_stride), as_tuple=True)  # device sync
    outputs_PD = run_slots(x_QD[row_P], slot_QK[row_P, pick_P])
    weighted_PD = outputs_PD * weight_QK[row_P, pick_P].unsqueeze(-1)
    return torch.zeros_like(x_QD).index_add(0, row_P, weighted_PD.to(x_QD.dtype))
