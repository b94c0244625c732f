"""decide(wish, facts, now) -> Decision: the one place where anything is decided.

Pure and level-triggered: the same wish, facts and moment give the same decision, whatever happened before; what must be
remembered lies in the resource's own status (memory.py). Read in this order: accept (is it possible), crew (who
lives, who is silent), gang, place and helpers (pods), follow (what the group is told), maps, cycle (all of it once),
shared (what is said of it), rest (suspended), job and service.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from moe_core.contract.names import MANAGER
from moe_core.decide.accept import Accepted, Refusal, accept
from moe_core.decide.cycle import everything_goes
from moe_core.decide.drill import decide_drill
from moe_core.decide.job import after_the_end, decide_job
from moe_core.decide.memory import Memory, condition_in, is_true
from moe_core.decide.refusals import with_refusals
from moe_core.decide.report import events_of
from moe_core.decide.rest import at_rest
from moe_core.decide.service import decide_service
from moe_core.facts import Action, Condition, Decision, Facts, Wish
from moe_core.outcome import Reason

__all__ = ["decide"]


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
    """Nothing new is created. A group that has formed is kept as it was accepted, and kept healthy."""
    told = Condition("Accepted", "False", refusal.reason, refusal.message)
    memory = Memory.of(wish.status)
    if wish.spec.get("suspend") is True:  # stopping needs no acceptance
        status = {"epoch": 0, "memory": at_rest(memory, facts, now).as_status()}
        return _put_off(wish, told, status, actions=everything_goes(facts))
    for before in _as_it_was(wish, memory) if memory.epoch else ():
        accepted = accept(before, _as_they_were(before, facts, memory))
        if isinstance(accepted, Accepted):
            go_on = decide_job if wish.kind == "MoEJob" else decide_service
            return go_on(wish, accepted, facts, now, refused=told)
    return _put_off(wish, told, {})


def _as_it_was(wish: Wish, memory: Memory) -> Iterator[Wish]:
    """The wish with the model that was accepted, then also with the size and the copies that run."""
    spec = dict(wish.spec)
    if isinstance(spec.get("model"), Mapping) and wish.kind == "MoEService" and memory.num_experts:
        spec["model"] = {**spec["model"], "numExperts": memory.num_experts, "numMoeLayers": memory.num_layers}
    yield replace(wish, spec=spec)
    if memory.wish_ranks:
        spec["parallelism"] = _size_that_runs(spec.get("parallelism"), memory.wish_ranks)
    if wish.kind == "MoEService":
        experts = spec.get("experts")
        ran = {"redundantPerRank": memory.redundant_per_rank, "minCopies": 1}
        spec["experts"] = {**experts, **ran} if isinstance(experts, Mapping) else ran
    yield replace(wish, spec=spec)


def _size_that_runs(asked: object, num_ranks: int) -> dict[str, int]:
    """Several EP groups keep their size and not their number, one group has no number to keep."""
    expert, data = (asked.get("expert"), asked.get("data", 1)) if isinstance(asked, Mapping) else (None, 1)
    if isinstance(expert, int) and isinstance(data, int) and data > 1 and expert > 0 and num_ranks % expert == 0:
        return {"expert": expert, "data": num_ranks // expert}
    return {"expert": num_ranks, "data": 1}


def _as_they_were(wish: Wish, facts: Facts, memory: Memory) -> Facts:
    """The facts with what was accepted before in place of what has changed without anybody's edit."""
    constraint = wish.spec.get("topologyConstraint")
    if isinstance(constraint, Mapping) and memory.levels:
        facts = replace(facts, topologies={**facts.topologies, str(constraint.get("topologyName")): memory.levels})
    if wish.kind == "MoEService":
        facts = replace(facts, model=None)
    return replace(facts, foreign=(), refused=tuple(one for one in facts.refused if not one.is_foreign))


def _put_off(wish: Wish, told: Condition, status: Mapping[str, object], *, actions: Sequence[Action] = ()) -> Decision:
    """What is there stays as it is, and nobody says that it is well."""
    before = condition_in(wish.status, "Ready")
    unknown = before is not None and before.get("status") != "False"
    ready = Condition("Ready", "Unknown" if unknown else "False", told.reason, told.message)
    return Decision(
        actions=tuple(actions),
        conditions=(told, ready),
        status={**_kept(wish), "observedGeneration": wish.generation, "message": told.message, **status},
        events=events_of(wish.status, [told]),
    )
