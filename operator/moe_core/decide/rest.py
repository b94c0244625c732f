"""A job or a service that is suspended: nothing of it runs."""

from dataclasses import replace

from moe_core.contract.names import ROLE_RANK
from moe_core.decide.accept import Accepted
from moe_core.decide.crew import proven_dead, seats
from moe_core.decide.cycle import everything_goes
from moe_core.decide.gang import remember
from moe_core.decide.memory import Memory
from moe_core.decide.report import count, events_of, status_of
from moe_core.facts import Condition, Decision, Facts, Wish
from moe_core.outcome import Reason


def at_rest(memory: Memory, facts: Facts, now: float) -> Memory:
    """What is remembered while nothing shall run: the next start begins a new group, and no pod's end was a failure."""
    seen, base = remember(0, memory, seats(facts, now, ROLE_RANK), planned=True)
    known = memory.dead_pod_uids
    return replace(
        memory,
        incarnations=tuple(seen),
        baselines=tuple(base),
        epoch=0,
        wish_ranks=0,
        started_at=None,
        dead_pod_uids=(*known, *(uid for uid in proven_dead(facts) if uid not in known)),
    )


def suspended(wish: Wish, accepted: Accepted, memory: Memory, facts: Facts, now: float) -> Decision:
    """No pod stays; nothing that happens now counts as a failure."""
    plan = accepted.plan
    ranks = seats(facts, now, ROLE_RANK)
    memory = at_rest(memory, facts, now)
    left = len(facts.pods)
    told = f"suspended; {left} pods are going" if left else "suspended; no pod is left"
    conditions = [
        Condition("Accepted", "True", Reason.ACCEPTED, accepted.note),
        Condition("Placed", "False", Reason.SUSPENDED, told),
        Condition("Ready", "False", Reason.SUSPENDED, told),
    ]
    if wish.kind == "MoEJob":
        conditions.append(Condition("Suspended", "True", Reason.SUSPENDED, told))
    else:
        conditions += [
            Condition("ExpertCoverage", "False", Reason.SUSPENDED, told),
            Condition("Balanced", "Unknown", Reason.SUSPENDED, told),
            Condition("Degraded", "False", Reason.SUSPENDED, told),
        ]
    conditions.append(Condition("Progressing", "True" if left else "False", Reason.SUSPENDED, told))
    return Decision(
        actions=tuple(everything_goes(facts)),
        conditions=tuple(conditions),
        status=status_of(wish, memory, count(plan.num_ranks, ranks, None), message=told),
        events=events_of(wish.status, conditions),
    )
