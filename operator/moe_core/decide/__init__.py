"""decide(wish, facts, now) -> Decision: the one place where anything is decided.

Pure and level-triggered: the same wish, facts and moment give the same decision, whatever happened before; what must be
remembered lies in the resource's own status (memory.py). Read in this order: accept (is it possible), crew (who
lives), gang, place and helpers (pods), follow (what the group is told), maps, cycle (all of it once), job and service.
"""

from dataclasses import replace

from moe_core.decide.accept import Accepted, Refusal, accept
from moe_core.decide.cycle import everything_goes
from moe_core.decide.drill import decide_drill
from moe_core.decide.job import after_the_end, decide_job
from moe_core.decide.memory import Memory, condition_in, is_true
from moe_core.decide.refusals import with_refusals
from moe_core.decide.report import events_of
from moe_core.decide.service import at_rest, decide_service
from moe_core.facts import Action, Condition, Decision, Facts, Wish
from moe_core.outcome import Reason

MANAGER = "moerator.dev/operator"

__all__ = ["MANAGER", "decide"]


def decide(wish: Wish, facts: Facts, now: float) -> Decision:
    """What to do now. Never raises for anything a user wrote: a bad wish is refused by a condition."""
    if wish.kind == "MoEDrill" and not wish.deleting:
        return decide_drill(wish, facts, now)
    return with_refusals(wish, facts, _decide(wish, facts, now))


def _decide(wish: Wish, facts: Facts, now: float) -> Decision:
    if wish.deleting:  # in a cluster the garbage collector follows the owner references
        return Decision(actions=tuple(everything_goes(facts)) if facts.local else (), status=_kept(wish))
    manager = wish.spec.get("managedBy")
    if isinstance(manager, str) and manager != MANAGER:
        return _left_alone(wish, manager)
    if wish.kind == "MoEJob" and (is_true(wish.status, "Complete") or is_true(wish.status, "Failed")):
        return after_the_end(wish, facts, now)
    accepted = accept(wish, facts)
    if isinstance(accepted, Refusal):
        return _refused(wish, accepted, facts, now)
    if wish.kind == "MoEJob":
        return decide_job(wish, accepted, facts, now)
    return decide_service(wish, accepted, facts, now)


def _kept(wish: Wish) -> dict[str, object]:
    return {key: value for key, value in wish.status.items() if key != "conditions"}


def _left_alone(wish: Wish, manager: str) -> Decision:
    """Another controller's object. Said once, and never again where that controller writes the condition itself."""
    before = condition_in(wish.status, "Accepted")
    if before is not None and before.get("reason") != Reason.MANAGED_ELSEWHERE:
        return Decision(status=_kept(wish))
    told = f"spec.managedBy leaves this object to {manager}"
    return Decision(conditions=(Condition("Accepted", "False", Reason.MANAGED_ELSEWHERE, told),), status=_kept(wish))


def _refused(wish: Wish, refusal: Refusal, facts: Facts, now: float) -> Decision:
    """Nothing is created. What already runs is left as it is: an edit that is refused must not hurt."""
    told = Condition("Accepted", "False", refusal.reason, refusal.message)
    memory = Memory.of(wish.status)
    if wish.kind == "MoEService" and refusal.reason == Reason.COVERAGE_IMPOSSIBLE and memory.wish_ranks:
        before = replace(wish, spec={**wish.spec, "parallelism": {"expert": memory.wish_ranks}})
        accepted = accept(before, facts)
        if isinstance(accepted, Accepted):  # the size that runs is kept, and kept healthy
            return decide_service(wish, accepted, facts, now, refused=told)
    conditions = [told]
    if condition_in(wish.status, "Ready") is None:
        conditions.append(Condition("Ready", "False", refusal.reason, refusal.message))
    status = {**_kept(wish), "observedGeneration": wish.generation, "message": refusal.message}
    actions: list[Action] = []
    if wish.spec.get("suspend") is True:  # stopping needs no acceptance
        actions = everything_goes(facts)
        status = {**status, "epoch": 0, "memory": at_rest(memory, facts, now).as_status()}
    return Decision(
        actions=tuple(actions), conditions=tuple(conditions), status=status, events=events_of(wish.status, [told])
    )
