"""Prometheus metrics, every name in one place. Registries of their own: nothing global, nothing twice.

Each name has one source, the coordinator or the gateways, so that sums over all pods of a service are true.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_core.contract.exchange import RuntimeState, TrainingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.measure import Balance, balance

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True)
class RankCounts:
    """What the ranks have counted, over all pods that they ever had. expert_tokens_LE: routed picks, [L][E] or []."""

    tokens_of_rank: Mapping[int, int] = field(default_factory=dict)
    dispatch_bytes: Mapping[str, int] = field(default_factory=dict)
    moved_bytes: int = 0
    digest_mismatches: int = 0
    step_us: Mapping[str, int] = field(default_factory=dict)
    waited_us: Mapping[int, int] = field(default_factory=dict)
    expert_tokens_LE: Sequence[Sequence[int]] = ()


class CoordinatorMetrics:
    """The state and the ranks' counts as metrics."""

    def render(
        self, state: RuntimeState, expert_map: ExpertMap | None, *, counts: RankCounts, with_experts: bool = False
    ) -> bytes:
        """`with_experts` is for who asks: one series per layer and expert may be thousands."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_StateCollector(state, expert_map, counts, with_experts=with_experts))
        return generate_latest(registry)


class _StateCollector(Collector):
    def __init__(
        self, state: RuntimeState, expert_map: ExpertMap | None, counts: RankCounts, *, with_experts: bool
    ) -> None:
        self._state, self._expert_map, self._counts, self._with_experts = state, expert_map, counts, with_experts

    def collect(self) -> list[Metric]:
        state = self._state
        active = [rank for rank in state.ranks if rank.phase == "Active"]
        tokens = CounterMetricFamily("moe_rank_tokens", "Tokens a rank has put through the model.", labels=["rank"])
        for rank_id, count in self._counts.tokens_of_rank.items():
            tokens.add_metric([str(rank_id)], count)
        fallback = CounterMetricFamily(
            "moe_fallback_tokens", "Routed picks not answered by a live copy.", labels=["reason"]
        )
        if state.serving is not None:
            for reason, count in sorted(state.serving.degraded_tokens.items()):
                fallback.add_metric([reason], count)
        info = GaugeMetricFamily("moe_map_info", "The expert map in force.", labels=["digest"])
        info.add_metric([state.map_digest], 1)
        gauges: list[Metric] = [
            GaugeMetricFamily("moe_active_ranks", "Ranks that take part in steps.", value=len(active)),
            GaugeMetricFamily("moe_epoch", "Committed epoch of the membership.", value=state.epoch),
        ]
        if state.wire_error:
            lost = GaugeMetricFamily(
                "moe_dispatch_wire_error", "Relative error of rows sent in fewer bits, by leg.", labels=["leg"]
            )
            for leg, error in sorted(state.wire_error.items()):
                lost.add_metric([leg], error)
            gauges.append(lost)
        if state.links is not None:
            latency = GaugeMetricFamily(
                "moe_link_latency_seconds", "Between ranks, one way, by scope.", labels=["scope"]
            )
            speed = GaugeMetricFamily("moe_link_bytes_per_second", "Between ranks, by scope.", labels=["scope"])
            for scope, link in sorted(state.links.scopes.items()):
                latency.add_metric([scope], link.latency_us / 1e6)
                speed.add_metric([scope], link.bytes_per_s)
            gauges += [latency, speed]
        if state.coverage is not None:
            gauges += [
                GaugeMetricFamily("moe_experts_covered", "(layer, expert) pairs alive.", value=state.coverage.covered),
                GaugeMetricFamily("moe_experts_total", "(layer, expert) pairs.", value=state.coverage.total),
            ]
        even = _balance_in_force(
            self._expert_map, state.load, map_digest=state.map_digest, live_ranks=[rank.rank for rank in active]
        )
        if even is not None:
            gauges += [
                GaugeMetricFamily("moe_balancedness", "Mean over max of rank load.", value=even.balancedness),
                GaugeMetricFamily("moe_balancedness_min", "The same of the worst layer.", value=even.balancedness_min),
            ]
        if state.training is not None:
            gauges += _of_routers(state.training)
        return [tokens, fallback, info, *gauges, *self._counters()]

    def _counters(self) -> list[Metric]:
        counts = self._counts
        sent = CounterMetricFamily(
            "moe_dispatch_bytes", "Bytes that dispatch and combine have sent, by scope.", labels=["scope"]
        )
        for scope, count in sorted(counts.dispatch_bytes.items()):
            sent.add_metric([scope], count)
        spent = CounterMetricFamily(
            "moe_step_seconds", "Time of all ranks' steps: compute, exchange, wait for another rank.", labels=["part"]
        )
        for part, micros in sorted(counts.step_us.items()):
            spent.add_metric([part], micros / 1e6)
        waited = CounterMetricFamily(
            "moe_waited_seconds", "Time that the other ranks waited for a rank inside steps.", labels=["rank"]
        )
        for rank, micros in sorted(counts.waited_us.items()):
            waited.add_metric([str(rank)], micros / 1e6)
        families: list[Metric] = [
            sent,
            spent,
            waited,
            CounterMetricFamily(
                "moe_rebalance_moved_bytes", "Bytes of experts that new maps brought to ranks.", counts.moved_bytes
            ),
            CounterMetricFamily(
                "moe_digest_mismatches", "Copies of experts found damaged after a move.", counts.digest_mismatches
            ),
        ]
        if self._with_experts:
            picks = CounterMetricFamily(
                "moe_expert_tokens", "Picks routed to each expert (asked for by experts=1).", labels=["layer", "expert"]
            )
            for layer_idx, row in enumerate(counts.expert_tokens_LE):
                for logical_id, count in enumerate(row):
                    picks.add_metric([str(layer_idx), str(logical_id)], count)
            families.append(picks)
        return families


def _of_routers(training: TrainingProgress) -> list[Metric]:
    losses = GaugeMetricFamily(
        "moe_router_loss", "What the routers add to the text's loss in a training step.", labels=["loss"]
    )
    for name, loss in sorted(training.router_losses.items()):
        losses.add_metric([name], loss)
    picks = CounterMetricFamily(
        "moe_router_picks", "Training picks that found no room, by what became of them.", labels=["outcome"]
    )
    for name, count in sorted(training.router_counts.items()):
        picks.add_metric([name], count)
    return [losses, picks]


def _balance_in_force(
    expert_map: ExpertMap | None, load_LE: Sequence[Sequence[int]], *, map_digest: str, live_ranks: Collection[int]
) -> Balance | None:
    """How evenly the load falls on the active ranks; None without load, or when the map known here is not in force."""
    if expert_map is None or expert_map.digest != map_digest or not load_LE or not live_ranks:
        return None
    if len(load_LE) != expert_map.num_layers or len(load_LE[0]) != expert_map.num_logical_experts:
        return None
    return balance(expert_map, load_LE, [rank for rank in live_ranks if rank < expert_map.num_ranks])


class GatewayMetrics:
    """What one gateway counts itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("moe_requests", "Requests by outcome.", ["outcome"], registry=self.registry)
        self.replays = Counter("moe_replays", "Replays on another rank, by cause.", ["cause"], registry=self.registry)
        self.tokens_out = Counter("moe_tokens_out", "Tokens sent to clients.", registry=self.registry)
        self.in_flight = Gauge("moe_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.epoch = Gauge("moe_gateway_epoch", "Newest epoch a rank has told.", registry=self.registry)
        self.ranks = Gauge("moe_gateway_ranks", "Ranks this gateway would send to.", registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)
