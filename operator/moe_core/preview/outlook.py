"""One resource at one number of ranks: where they would be, which experts they would hold, what a step would cost.

What is shown is what `decide` would do with the same facts. Beside it, where a load is given, what an assignment made
for that load would win over it and what its moves would cost (experts.replan): the number by which to judge whether
the load is worth acting on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from moe_core.contract.dispatch import SMALL_STEP_TOKENS, goes_by_node, row_bytes
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import DispatchConfig
from moe_core.decide.accept import Accepted, Refusal, accept
from moe_core.decide.assignment import limits, next_assignment
from moe_core.decide.measured import Measured
from moe_core.decide.place import Ground, place_new
from moe_core.experts.affinity import pack_together
from moe_core.experts.bounds import bound_of_slots
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.links import seconds_per_byte
from moe_core.experts.measure import Balance, balance, balancedness_of, copies_of_logical, load_of_ranks, load_of_slots
from moe_core.experts.pack import pack
from moe_core.experts.relayed import traffic_by_node
from moe_core.experts.replan import Prices, Replan, Rows
from moe_core.experts.survival import Survival, survival
from moe_core.experts.trace import Trace
from moe_core.experts.traffic import StepShape, Traffic, domains_per_token, traffic_by_pick, traffic_by_token
from moe_core.facts import Facts, Wish
from moe_core.manifests.plan import Plan
from moe_core.outcome import InvalidInput, NoFit
from moe_core.preview.size import ModelSize
from moe_core.spec.job import MoEJobSpec
from moe_core.topology.fit import Fit

MOST_FAILURES = 4


@dataclass(frozen=True, slots=True)
class Crossing:
    """Nodes other than its own that a token of the trace is sent to, on average, and how even the ranks are then."""

    nodes: float
    balancedness: float


@dataclass(frozen=True, slots=True)
class Crossings:
    """As assigned; the same copies packed by load alone; and packed so that experts chosen together are together."""

    assigned: Crossing
    by_load: Crossing
    together: Crossing


@dataclass(frozen=True, slots=True)
class Step:
    """The step whose bytes are shown: one of training, or one that decodes as many sequences as a rank may."""

    tokens_per_rank: int
    trains: bool
    dispatch: DispatchConfig
    relayed: bool = False
    """Tokens of large steps cross to a node once, where it is known which rank is on which."""
    each_rank_its_own_load: bool = False
    """The trace is of as many ranks: each sends what the rank of its number chose, not what all chose together."""

    @property
    def way(self) -> Literal["ByNode", "ByToken", "ByPick"]:
        """As the data plane chooses (moe_runtime.dispatch.mixture)."""
        is_small = not self.trains and self.tokens_per_rank <= SMALL_STEP_TOKENS
        if self.relayed and not (is_small and self.dispatch.hierarchy == "Auto"):
            return "ByNode"
        return "ByToken" if is_small else "ByPick"


@dataclass(frozen=True, slots=True)
class Outlook:
    """placement is None where no nodes were given; size and traffic None where the model cannot be read.

    load_of_rank, balance and bound are of the given load, else of an even one.
    """

    num_ranks: int
    note: str
    expert_map: ExpertMap
    placement: Fit | NoFit | None
    least_copies: int
    most_copies: int
    survival: tuple[Survival, ...]
    survival_of_nodes: tuple[Survival, ...]
    balance: Balance
    bound: float
    load_of_rank: tuple[float, ...]
    load_of_slot: FloatArray
    """[L, S]"""
    step: Step
    size: ModelSize | None = None
    traffic: Traffic | None = None
    bytes_by_scope: Mapping[str, float] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    """Of the group that the wish's status tells of, if it has one."""
    links_s: float | None = None
    """What the rank that sends most waits for its links in a step; None where no link between these nodes is known."""
    planned: Replan | None = None
    planned_balance: float = 0.0
    crossings: Crossings | None = None


def look_ahead(
    wish: Wish,
    facts: Facts,
    *,
    num_ranks: int | None = None,
    trace: Trace | None = None,
    size: ModelSize | None = None,
) -> Outlook | Refusal:
    """What would come of `wish`, with its own number of ranks or another one. The load is that of the whole trace.

    Raises InvalidInput for a trace of another model.
    """
    accepted = accept(resized(wish, num_ranks), facts)
    if isinstance(accepted, Refusal):
        return accepted
    plan = accepted.plan
    expert_map = plan.expert_map(plan.num_ranks)
    copies = copies_of_logical(expert_map)
    placement = place_new(Ground.of(plan, facts.nodes)) if facts.nodes else None
    load_LE = np.ones((plan.num_layers, plan.num_experts)) if trace is None else _load_of(trace, expert_map)
    nodes = _nodes_of(placement, plan.num_ranks)
    load_RLE = None if trace is None else _load_of_each(trace, expert_map)
    step = replace(_step(accepted, nodes, size), each_rank_its_own_load=load_RLE is not None)
    sent = load_LE if load_RLE is None else load_RLE
    traffic = None if size is None else _traffic(step, expert_map, sent, size, nodes)
    fleet = Fleet(expert_map.slots_of_rank, domain_of_rank=tuple(nodes or ()))
    measured = Measured.of_status(wish.status)
    links_RR = None if nodes is None else seconds_per_byte(measured.between(), nodes)
    planned = None
    if trace is not None:
        ranks = replace(fleet, speed_of_rank=measured.speeds(plan.num_ranks))
        planned = _planned(plan, expert_map, ranks, load_LE, load_RLE, size, measured, links_RR)
    return Outlook(
        num_ranks=plan.num_ranks,
        note=accepted.note,
        expert_map=expert_map,
        placement=placement,
        least_copies=int(copies.min()),
        most_copies=int(copies.max()),
        survival=_survivals(expert_map, None),
        survival_of_nodes=() if nodes is None else _survivals(expert_map, nodes),
        balance=balance(expert_map, load_LE),
        bound=balancedness_of(
            load_LE.sum(1) / fleet.ranks_with_slots,
            bound_of_slots(load_LE, fleet, group_ranks=step.dispatch.group_ranks),
        ),
        load_of_rank=tuple(load_of_ranks(expert_map, load_LE).sum(0).tolist()),
        load_of_slot=load_of_slots(expert_map, load_LE),
        step=step,
        size=size,
        traffic=traffic,
        bytes_by_scope={} if traffic is None else _by_scope(traffic, plan, facts, nodes),
        measured=measured,
        links_s=None if traffic is None or links_RR is None else float((traffic.total_RR * links_RR).sum(1).max()),
        planned=planned,
        planned_balance=_balance_of(planned, load_LE, fleet),
        crossings=None if trace is None or nodes is None else _crossings(expert_map, trace, load_LE, nodes),
    )


def resized(wish: Wish, num_ranks: int | None) -> Wish:
    """The same wish with another number of ranks; None leaves it its own."""
    if num_ranks is None:
        return wish
    parallelism = dict(wish.spec.get("parallelism") or {})
    groups = parallelism.get("data", 1)
    if not isinstance(groups, int) or groups < 1 or num_ranks % groups:
        raise InvalidInput(f"--ranks: {num_ranks} ranks are not {groups} EP groups of equally many")
    parallelism["expert"] = num_ranks // groups
    return replace(wish, spec={**wish.spec, "parallelism": parallelism})


def _nodes_of(placement: Fit | NoFit | None, num_ranks: int) -> tuple[str, ...] | None:
    if not isinstance(placement, Fit):
        return None
    return tuple(placement.node_of_rank[rank] for rank in range(num_ranks))


def _survivals(expert_map: ExpertMap, unit_of_rank: Sequence[str] | None) -> tuple[Survival, ...]:
    names = [str(rank) for rank in range(expert_map.num_ranks)] if unit_of_rank is None else list(unit_of_rank)
    ids = {name: index for index, name in enumerate(dict.fromkeys(names))}
    units = [ids[name] for name in names]
    failures = range(1, min(MOST_FAILURES, len(ids) - 1) + 1)
    return tuple(survival(expert_map, failures=count, unit_of_rank=units) for count in failures)


def _traffic(
    step: Step,
    expert_map: ExpertMap,
    load: FloatArray,
    size: ModelSize,
    nodes: Sequence[str] | None,
) -> Traffic:
    shape = StepShape(
        tokens_per_rank=step.tokens_per_rank,
        hidden_size=size.hidden_size,
        top_k=size.top_k,
        group_ranks=step.dispatch.group_ranks,
        wire=step.dispatch.wire,
        combine_wire=step.dispatch.combine_wire,
    )
    if step.way == "ByToken":
        return traffic_by_token(expert_map, shape)
    if step.way == "ByNode" and nodes is not None:
        return traffic_by_node(expert_map, load, shape, node_of_rank=nodes, trains=step.trains)
    return traffic_by_pick(expert_map, load, shape, trains=step.trains, domain_of_rank=nodes)


def _by_scope(traffic: Traffic, plan: Plan, facts: Facts, nodes: Sequence[str] | None) -> Mapping[str, float]:
    """Without a placement only what stays on a rank is told apart."""
    if nodes is None:
        return traffic.by_scope([()] * plan.num_ranks, ())
    labels_of_node = {node.name: node.labels for node in facts.nodes}
    levels = plan.pack.levels
    paths = [(*(labels_of_node[name].get(label, "") for _, label in levels), name) for name in nodes]
    return traffic.by_scope(paths, (*(name for name, _ in levels), "node"))


def _load_of(trace: Trace, expert_map: ExpertMap) -> FloatArray:
    """[L, E] picks. Raises InvalidInput."""
    if len(trace.layers) != expert_map.num_layers or trace.num_experts > expert_map.num_logical_experts:
        raise InvalidInput(
            f"the trace has {len(trace.layers)} layers and experts up to {trace.num_experts - 1}, "
            f"the model has {expert_map.num_layers} layers and experts 0..{expert_map.num_logical_experts - 1}"
        )
    return np.asarray(_of_this_model(trace, expert_map).load_of_steps().sum(0), dtype=np.float64)


def _load_of_each(trace: Trace, expert_map: ExpertMap) -> FloatArray | None:
    """[R, L, E] picks; None for a trace of other ranks than the map has."""
    if {record.rank for record in trace.records} != set(range(expert_map.num_ranks)):
        return None
    return _of_this_model(trace, expert_map).load_of_sources(expert_map.num_ranks).astype(np.float64)


def _of_this_model(trace: Trace, expert_map: ExpertMap) -> Trace:
    """A trace names no expert that nobody chose; the model has it all the same."""
    return replace(trace, num_experts=expert_map.num_logical_experts)


def _crossings(expert_map: ExpertMap, trace: Trace, load_LE: FloatArray, nodes: Sequence[str]) -> Crossings | None:
    """None where all ranks share one node. The trace's own ranks may be others: its tokens are dealt over these."""
    fleet = Fleet(expert_map.slots_of_rank, domain_of_rank=tuple(nodes))
    if fleet.num_domains < 2:
        return None
    copies_LE = copies_of_logical(expert_map)
    chosen_LEE = _of_this_model(trace, expert_map).chosen_together()
    by_load = pack(load_LE, copies_LE.copy(), fleet).rows()
    together = pack_together(load_LE, copies_LE.copy(), fleet, chosen_LEE).rows()
    return Crossings(
        *(
            _crossing(rows, expert_map, trace, load_LE, nodes)
            for rows in (expert_map.logical_of_slot, by_load, together)
        )
    )


def _crossing(rows: Rows, expert_map: ExpertMap, trace: Trace, load_LE: FloatArray, nodes: Sequence[str]) -> Crossing:
    layout = ExpertMap(
        generation=expert_map.generation,
        num_logical_experts=expert_map.num_logical_experts,
        slots_of_rank=expert_map.slots_of_rank,
        logical_of_slot=rows,
    )
    picks = [trace.picks(layer) for layer in trace.layers]
    nodes_met = domains_per_token(layout, picks, domain_of_rank=nodes)
    return Crossing(nodes_met, balance(layout, load_LE).balancedness)


def _balance_of(planned: Replan | None, load_LE: FloatArray, fleet: Fleet) -> float:
    if planned is None:
        return 0.0
    return balancedness_of(load_LE.sum(1) / fleet.ranks_with_slots, np.asarray(planned.worst_after))


def _step(accepted: Accepted, nodes: Sequence[str] | None, size: ModelSize | None) -> Step:
    spec, dispatch = accepted.spec, accepted.plan.config.dispatch
    relayed = size is not None and goes_by_node(
        dispatch.hierarchy, nodes, top_k=size.top_k, group_ranks=dispatch.group_ranks
    )
    if isinstance(spec, MoEJobSpec):
        tokens = spec.training.sequences_per_rank * spec.training.sequence_length
        return Step(tokens, trains=True, dispatch=dispatch, relayed=relayed)
    return Step(spec.serving.max_sequences, trains=False, dispatch=dispatch, relayed=relayed)


def _planned(  # noqa: PLR0917
    plan: Plan,
    expert_map: ExpertMap,
    fleet: Fleet,
    load_LE: FloatArray,
    load_RLE: FloatArray | None,
    size: ModelSize | None,
    measured: Measured,
    links_RR: FloatArray | None,
) -> Replan:
    """Within what the resource promises and allows. What only a running group knows, and has not told, is as Prices has
    it.
    """
    prices = Prices() if plan.rebalance is None else limits(plan.rebalance, expert_map)
    if size is not None:
        way = plan.config.dispatch
        there_and_back = row_bytes(way.wire, size.hidden_size) + row_bytes(way.combine_wire, size.hidden_size)
        prices = replace(prices, bytes_per_expert=size.expert_bytes, bytes_per_pick=there_and_back)
    if measured.seconds_per_pick is not None:
        prices = replace(prices, seconds_per_pick=measured.seconds_per_pick)
    return next_assignment(
        plan,
        load_LE,
        fleet,
        expert_map,
        prices=prices,
        links_RR=links_RR,
        from_LEG=None if load_RLE is None else _by_domain(load_RLE, fleet),
    )


def _by_domain(load_RLE: FloatArray, fleet: Fleet) -> FloatArray:
    """[L, E, G] who asks for whom."""
    found = np.zeros((fleet.num_domains, *load_RLE.shape[1:]))
    np.add.at(found, fleet.domain_R, load_RLE)
    return found.transpose(1, 2, 0)
