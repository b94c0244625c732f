"""Conditions that a job and a service have in common, from one cycle."""

from moe_core.decide.cycle import Cycle
from moe_core.decide.memory import condition_in
from moe_core.facts import Condition, Facts, Wish
from moe_core.manifests.plan import Plan
from moe_core.outcome import Reason


def placed_condition(plan: Plan, cycle: Cycle) -> Condition:
    counts = cycle.counts
    if cycle.no_fit is not None:
        return Condition("Placed", "False", Reason.NO_FIT, str(cycle.no_fit))
    if counts.allocated == counts.desired:
        nodes = {seat.live.node for r, seat in sorted(cycle.ranks.items()) if r < plan.num_ranks and seat.live}
        on = f"{len(nodes)} node" if len(nodes) == 1 else f"{len(nodes)} nodes"
        told = f"{counts.allocated} of {counts.desired} ranks placed on {on}"
        return Condition("Placed", "True", Reason.PLACED, told)
    told = f"{counts.allocated} of {counts.desired} ranks placed"
    return Condition("Placed", "False", Reason.PLACING, told)


def progressing(cycle: Cycle, ready: Condition) -> Condition:
    if ready.reason in (Reason.ALL_ACTIVE, Reason.RUNTIME_FAILED, Reason.BUDGET_EXHAUSTED, Reason.COORDINATOR_AWAY):
        return Condition("Progressing", "False", Reason.STABLE, "nothing to do")
    if cycle.no_fit is not None:
        return Condition("Progressing", "False", Reason.NO_FIT, "waiting for room")
    return Condition("Progressing", "True", ready.reason, ready.message)


def is_forming(wish: Wish, cycle: Cycle) -> bool:
    """The first epoch is there and its ranks report one after the other; nobody was lost since the start."""
    before = condition_in(wish.status, "Ready") or {}
    early = before.get("reason") in (None, Reason.STARTING, Reason.FORMING, Reason.NO_FIT, Reason.REFUSED)
    return early and not cycle.filled.lost and cycle.counts.allocated == cycle.counts.desired


def starting_note(cycle: Cycle, facts: Facts) -> str:
    """How far the start has come, and the first thing that holds it up."""
    counts = cycle.counts
    told = f"{counts.available} of {counts.desired} ranks running, none active yet"
    pods = sorted(facts.pods, key=lambda p: (p.role, p.index, p.incarnation, p.uid))
    held = [pod for pod in pods if not (pod.ready or pod.gated or pod.deleting) and pod.phase in ("Pending", "Running")]
    stuck = next((pod for pod in held if pod.message), None)
    if stuck is not None:
        return f"{told}; {stuck.name}: {stuck.message}"
    if counts.available == counts.desired and facts.runtime is None:
        told = f"{told}; waiting for the coordinator"
    return told + losses(cycle)


def losses(cycle: Cycle) -> str:
    """Why ranks had to be replaced: what keeps a group from ever becoming whole says so here."""
    if not cycle.restarts or not cycle.memory.last_loss:
        return ""
    times = "once" if cycle.restarts == 1 else f"{cycle.restarts} times"
    return f"; replaced {times}, last {cycle.memory.last_loss}"


def not_ready_yet(cycle: Cycle, facts: Facts) -> Condition | None:
    """Ready while there is no group, or nobody to ask about it; None once there is."""
    counts = cycle.counts
    if not cycle.formed and cycle.no_fit is not None:
        return Condition("Ready", "False", Reason.NO_FIT, str(cycle.no_fit))
    if not cycle.formed:
        reason = Reason.FORMING if counts.available == counts.desired else Reason.STARTING
        return Condition("Ready", "False", reason, starting_note(cycle, facts))
    if facts.runtime is None:
        told = f"no coordinator answers; {counts.available} of {counts.desired} ranks running go on without it"
        return Condition("Ready", "Unknown", Reason.COORDINATOR_AWAY, told)
    return None


def used_up(cycle: Cycle, plan: Plan) -> str:
    """Why nothing is replaced any more, and the lever."""
    lost = "; ".join(f"rank {rank}: {why}" for rank, why in sorted(cycle.filled.lost.items()))
    return f"{cycle.filled.restarts} of {plan.max_restarts} restarts used; {lost}; raise failurePolicy.maxRestarts"
