"""MoEJob: train to the end, or fail within a budget; then leave nothing running."""

from dataclasses import replace

from moe_core.contract.names import ROLE_RANK
from moe_core.decide.accept import Accepted
from moe_core.decide.crew import seats
from moe_core.decide.cycle import Cycle, everything_goes, run_cycle, soonest
from moe_core.decide.memory import Memory, condition_in, is_true
from moe_core.decide.report import count, events_of, status_of
from moe_core.decide.rest import suspended
from moe_core.decide.shared import is_forming, losses, not_ready_yet, placed_condition, progressing, used_up
from moe_core.facts import Condition, Decision, DeleteOwner, Facts, Wish
from moe_core.outcome import InvalidSpec, Reason
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.load import parse_spec

_TRAINING = Condition("Progressing", "True", Reason.RUNNING, "training")
_OVER = Condition("Progressing", "False", Reason.STABLE, "nothing to do")


def decide_job(
    wish: Wish, accepted: Accepted, facts: Facts, now: float, *, refused: Condition | None = None
) -> Decision:
    """`refused` is the Accepted condition of a job that runs and would not be accepted now."""
    spec = accepted.spec
    assert isinstance(spec, MoEJobSpec), type(spec)
    memory = Memory.of(wish.status)
    if spec.suspend:
        return suspended(wish, accepted, memory, facts, now)
    over = _outcome(spec, memory, facts, now)
    if over is not None:
        return _end(wish, accepted, memory, facts, now, over)
    cycle = run_cycle(accepted.plan, memory, facts, now)
    if cycle.filled.exhausted:
        over = Condition("Failed", "True", Reason.BUDGET_EXHAUSTED, used_up(cycle, accepted.plan))
        return _end(wish, accepted, memory, facts, now, over)
    ready = _ready(wish, cycle, facts)
    conditions = (
        refused or Condition("Accepted", "True", Reason.ACCEPTED, accepted.note),
        Condition("Suspended", "False", Reason.RUNNING, "not suspended"),
        placed_condition(accepted.plan, cycle),
        ready,
        Condition("Complete", "False", Reason.RUNNING, _progress(facts) or "not done yet"),
        Condition("Failed", "False", Reason.RUNNING, "has not failed"),
        _TRAINING if ready.status == "True" else progressing(cycle, ready),
    )
    waking = [*cycle.waking]
    if spec.active_deadline_seconds is not None and cycle.memory.started_at is not None:
        waking.append(cycle.memory.started_at + spec.active_deadline_seconds - now)
    return Decision(
        actions=cycle.actions,
        conditions=conditions,
        status=status_of(
            wish, cycle.memory, cycle.counts, restarts=cycle.restarts, runtime=facts.runtime, message=ready.message
        ),
        events=(*cycle.events, *events_of(wish.status, conditions)),
        wake_in=soonest(waking),
    )


def _outcome(spec: MoEJobSpec, memory: Memory, facts: Facts, now: float) -> Condition | None:
    """The end, if it has come: success goes before a deadline that passes in the same moment."""
    runtime = facts.runtime
    if runtime is not None and runtime.training is not None and runtime.training.done:
        told = f"{_progress(facts)}; checkpoint in {runtime.training.checkpoint_path or spec.output.path}"
        return Condition("Complete", "True", Reason.COMPLETED, told)
    if runtime is not None and runtime.failure:
        return Condition("Failed", "True", Reason.RUNTIME_FAILED, runtime.failure)
    if spec.active_deadline_seconds is not None and memory.started_at is not None:
        ran = now - memory.started_at
        if ran >= spec.active_deadline_seconds:
            told = f"ran {ran:.0f} s of {spec.active_deadline_seconds} s allowed; raise activeDeadlineSeconds"
            return Condition("Failed", "True", Reason.DEADLINE_EXCEEDED, told)
    return None


def _progress(facts: Facts) -> str:
    training = facts.runtime.training if facts.runtime is not None else None
    if training is None:
        return ""
    told = f"step {training.step}" + (f" of {training.max_steps}" if training.max_steps else "")
    if training.heldout_bits_per_byte is not None:
        told += f", {training.heldout_bits_per_byte:.3f} held-out bits per byte"
    return told


def _ready(wish: Wish, cycle: Cycle, facts: Facts) -> Condition:
    early = not_ready_yet(cycle, facts)
    if early is not None:
        return early
    counts = cycle.counts
    told = f"{counts.active} of {counts.desired} ranks active"
    if counts.active < counts.desired:
        reason = Reason.FORMING if is_forming(wish, cycle) else Reason.RANK_LOST
        return Condition("Ready", "False", reason, told + losses(cycle))
    return Condition("Ready", "True", Reason.ALL_ACTIVE, told)


def _end(  # noqa: PLR0917
    wish: Wish, accepted: Accepted, memory: Memory, facts: Facts, now: float, outcome: Condition
) -> Decision:
    """Write the end down first; pods go in the next cycle, so that a lost write can never start the job again."""
    ranks = seats(facts, now, ROLE_RANK)
    other = "Failed" if outcome.type == "Complete" else "Complete"
    conditions = (
        Condition("Accepted", "True", Reason.ACCEPTED, accepted.note),
        Condition("Ready", "False", outcome.reason, outcome.message),
        outcome,
        Condition(other, "False", outcome.reason, outcome.message),
        _OVER,
    )
    memory = replace(memory, completed_at=now)
    counts = count(accepted.plan.num_ranks, ranks, facts.runtime)
    status = status_of(wish, memory, counts, runtime=facts.runtime, message=outcome.message)
    return Decision(
        conditions=conditions,
        status={**status, "restarts": wish.status.get("restarts", 0)},
        events=events_of(wish.status, (outcome,)),
        wake_in=0.05,
    )


def after_the_end(wish: Wish, facts: Facts, now: float) -> Decision:
    """Nothing runs on; the object goes when its time to live is over. Nothing that was accepted is asked again."""
    memory = Memory.of(wish.status)
    kind = "Complete" if is_true(wish.status, "Complete") else "Failed"
    before = condition_in(wish.status, kind) or {}
    try:
        spec = parse_spec(MoEJobSpec, wish.spec)
        num_ranks, ttl = spec.parallelism.ranks, spec.ttl_seconds_after_finished
    except InvalidSpec:  # an edit after the end, which changes nothing any more
        num_ranks, ttl = 0, None
    counts = count(num_ranks, seats(facts, now, ROLE_RANK), None)
    status = status_of(wish, memory, counts, message=str(before.get("message", "")))
    actions = everything_goes(facts)
    wake_in = None
    if ttl is not None and memory.completed_at is not None:
        wait = memory.completed_at + ttl - now
        if wait > 0:
            wake_in = max(0.05, wait)
        elif not facts.pods:
            actions.append(DeleteOwner(wish.uid))
    status = {**status, "restarts": wish.status.get("restarts", 0)}
    return Decision(actions=tuple(actions), conditions=(_OVER,), status=status, wake_in=wake_in)
