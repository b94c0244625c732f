"""MoEService: serve, degrade, restore, resize."""

from collections.abc import Sequence

from moe_core.contract.exchange import RuntimeState
from moe_core.decide.accept import Accepted
from moe_core.decide.assignment import balanced_condition
from moe_core.decide.crew import active_uids
from moe_core.decide.cycle import Cycle, run_cycle, soonest
from moe_core.decide.follow import is_leaving_done
from moe_core.decide.memory import Memory
from moe_core.decide.report import events_of, status_of
from moe_core.decide.rest import suspended
from moe_core.decide.shared import is_forming, losses, not_ready_yet, placed_condition, progressing, used_up
from moe_core.facts import Condition, Decision, Facts, Wish
from moe_core.outcome import Reason


def decide_service(
    wish: Wish, accepted: Accepted, facts: Facts, now: float, *, refused: Condition | None = None
) -> Decision:
    """`refused` is the Accepted condition of an edit that cannot be; `accepted` is then what ran before it."""
    memory = Memory.of(wish.status)
    if accepted.spec.suspend:
        return suspended(wish, accepted, memory, facts, now)
    cycle = run_cycle(accepted.plan, memory, facts, now)
    ready = _ready(wish, cycle, accepted, facts)
    coverage = _coverage(cycle, facts)
    conditions = (
        refused or Condition("Accepted", "True", Reason.ACCEPTED, accepted.note),
        placed_condition(accepted.plan, cycle),
        ready,
        coverage,
        balanced_condition(wish, cycle.assignment),
        _degraded(wish, cycle, facts, coverage),
        progressing(cycle, ready),
    )
    return Decision(
        actions=cycle.actions,
        conditions=conditions,
        status=status_of(
            wish, cycle.memory, cycle.counts, restarts=cycle.restarts, runtime=facts.runtime, message=ready.message
        ),
        events=(*cycle.events, *events_of(wish.status, conditions)),
        wake_in=soonest(cycle.waking),
    )


def _ready(wish: Wish, cycle: Cycle, accepted: Accepted, facts: Facts) -> Condition:  # noqa: PLR0911 - a list of causes, first wins
    counts, runtime = cycle.counts, facts.runtime
    told = f"{counts.active} of {counts.desired} ranks active"
    if runtime is not None and runtime.failure:
        return Condition("Ready", "False", Reason.RUNTIME_FAILED, runtime.failure)
    if cycle.filled.exhausted:
        return Condition("Ready", "False", Reason.BUDGET_EXHAUSTED, used_up(cycle, accepted.plan))
    early = not_ready_yet(cycle, facts)
    if early is not None:
        return early
    if cycle.following.num_ranks != counts.desired or not is_leaving_done(accepted.plan, cycle.ranks):
        told = f"{told}; resizing from {cycle.following.num_ranks} to {counts.desired} ranks"
        return Condition("Ready", "False", Reason.RESIZING, told)
    if counts.active < counts.desired:
        told = f"{told}; not active: {_listed(_inactive(cycle, facts, counts.desired))}{losses(cycle)}"
        return Condition("Ready", "False", Reason.FORMING if is_forming(wish, cycle) else Reason.RANK_LOST, told)
    gateways = [seat.live for seat in cycle.gateways.values() if seat.live is not None and seat.live.ready]
    told = f"{told}; {len(gateways)} of {accepted.plan.num_gateways} gateways ready"
    if len(gateways) < accepted.plan.num_gateways:
        return Condition("Ready", "False", Reason.STARTING, told + _trouble_of_gateways(cycle))
    return Condition("Ready", "True", Reason.ALL_ACTIVE, told + _packing_told(runtime))


def _packing_told(runtime: RuntimeState | None) -> str:
    """What ranks say they hold, wherever it came from."""
    if runtime is None or not runtime.expert_packing:
        return ""
    return f"; experts are kept as {runtime.expert_packing}, {runtime.expert_bytes} bytes each"


def _inactive(cycle: Cycle, facts: Facts, num_ranks: int) -> list[int]:
    """Ranks below `num_ranks` whose present pod takes no part in steps."""
    active = active_uids(facts.runtime)
    pods = {rank: seat.live for rank, seat in cycle.ranks.items()}
    return [r for r in range(num_ranks) if (pod := pods.get(r)) is None or pod.uid not in active]


def _trouble_of_gateways(cycle: Cycle) -> str:
    pods = [seat.live for _, seat in sorted(cycle.gateways.items()) if seat.live is not None and not seat.live.ready]
    return next((f"; {pod.name}: {pod.message}" for pod in pods if pod.message), "")


def _listed(ranks: Sequence[int], most: int = 16) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(str(rank) for rank in ranks[:most]) + more


def _coverage(cycle: Cycle, facts: Facts) -> Condition:
    if facts.runtime is None:
        reason = Reason.COORDINATOR_AWAY if cycle.formed else Reason.STARTING
        return Condition("ExpertCoverage", "Unknown", reason, "no coordinator answers")
    seen = facts.runtime.coverage
    if seen is None or not cycle.formed:
        return Condition("ExpertCoverage", "Unknown", Reason.FORMING, "the group has not formed yet")
    told = f"{seen.covered} of {seen.total} experts (over all layers) have a live copy"
    if seen.is_full:
        return Condition("ExpertCoverage", "True", Reason.FULL_COVERAGE, told)
    return Condition("ExpertCoverage", "False", Reason.EXPERTS_LOST, told)


def _degraded(wish: Wish, cycle: Cycle, facts: Facts, coverage: Condition) -> Condition:
    if cycle.filled.exhausted:
        told = f"{len(cycle.filled.lost)} ranks are lost and the restart budget is used up"
        return Condition("Degraded", "True", Reason.BUDGET_EXHAUSTED, told)
    if not cycle.formed or is_forming(wish, cycle):
        return Condition("Degraded", "False", Reason.STARTING, "not serving yet")
    if facts.runtime is None:
        return Condition("Degraded", "Unknown", Reason.COORDINATOR_AWAY, "no coordinator answers")
    if coverage.status == "False":
        return Condition("Degraded", "True", Reason.EXPERTS_LOST, coverage.message)
    missing = _inactive(cycle, facts, min(cycle.following.num_ranks, cycle.counts.desired))
    if missing:
        told = f"serving without rank {_listed(missing)}; every expert has a live copy"
        return Condition("Degraded", "True", Reason.RANK_LOST, told)
    return Condition("Degraded", "False", Reason.STABLE, "every member is active, every expert has a live copy")
