"""MoEDrill: wait until the target is whole, injure one rank once, watch, judge.

The pod to injure and the moment are written down one cycle before the fault is sent. A fault names a pod's uid, so
sending it again after a crash can only hit the pod that was meant, never its successor.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, Literal

from moe_core.contract.exchange import FaultRequest
from moe_core.contract.names import ROLE_RANK
from moe_core.decide.crew import active_uids
from moe_core.decide.memory import is_true
from moe_core.decide.report import events_of
from moe_core.decide.times import rfc3339
from moe_core.drills.verdict import Injection, Seen, Slo, Verdict, judge, look, totals
from moe_core.facts import Action, Condition, Decision, Facts, InjectFault, PodFact, TargetFact, Wish
from moe_core.outcome import InvalidSpec, Reason
from moe_core.spec.load import parse_spec
from moe_core.spec.others import MoEDrillSpec

LOOK_AGAIN_S = 0.5
RESEND_AFTER_S = 5.0
LOOK_FOR_TARGET_S = 5.0
ACCEPT_WITHIN_S = 30.0
SEND_WITHIN_S = 30.0
"""A coordinator that is replaced answers again well before that."""
_FAULT: Mapping[str, Literal["kill", "hang"]] = {"KillRank": "kill", "HangRank": "hang"}


def decide_drill(wish: Wish, facts: Facts, now: float) -> Decision:
    kept = {key: value for key, value in wish.status.items() if key != "conditions"}
    if is_true(wish.status, "Complete"):
        return Decision(status=kept)
    try:
        spec = parse_spec(MoEDrillSpec, wish.spec)
    except InvalidSpec as invalid:
        told = "; ".join(str(problem) for problem in invalid.problems)
        return _not_injected(wish, kept, Reason.INVALID_SPEC, told)
    injection = _injection(kept)
    if injection is None:
        return _arm(wish, spec, facts.target, kept, now)
    return _watch(wish, spec, facts, injection, kept, now)


def _refused(wish: Wish, kept: Mapping[str, Any], reason: Reason, told: str, now: float) -> Decision:
    """Looked at again for a while: drill and target may be applied in any order."""
    if now - wish.created_at > ACCEPT_WITHIN_S:
        return _not_injected(wish, kept, reason, told)
    conditions = (Condition("Accepted", "False", reason, told), Condition("Complete", "False", reason, told))
    status = {**kept, "observedGeneration": wish.generation, "message": told}
    events = events_of(wish.status, conditions[:1])
    return Decision(conditions=conditions, status=status, events=events, wake_in=LOOK_FOR_TARGET_S)


def _pending(wish: Wish, kept: Mapping[str, Any], reason: Reason, told: str) -> Decision:
    conditions = (
        Condition("Accepted", "True", Reason.ACCEPTED, "the target allows drills"),
        Condition("Injected", "False", reason, told),
        Condition("Complete", "False", reason, told),
    )
    status = {**kept, "observedGeneration": wish.generation, "message": told}
    return Decision(conditions=conditions, status=status, events=events_of(wish.status, conditions), wake_in=2.0)


def _arm(wish: Wish, spec: MoEDrillSpec, target: TargetFact | None, kept: Mapping[str, Any], now: float) -> Decision:
    """Choose the pod and write it down; nothing is injured yet."""
    name = f"{spec.target.kind} {spec.target.name}"
    if target is None:
        return _refused(wish, kept, Reason.TARGET_NOT_FOUND, f"{name} does not exist in {wish.namespace}", now)
    if target.wish.spec.get("drills") != "Allowed":
        return _refused(wish, kept, Reason.DRILLS_FORBIDDEN, f"{name} does not say drills: Allowed", now)
    num_ranks = _num_ranks(target)
    if spec.target.rank >= num_ranks:
        told = f"target.rank is {spec.target.rank}; {name} has ranks 0 to {num_ranks - 1}"
        return _refused(wish, kept, Reason.TARGET_NOT_FOUND, told, now)
    pod = _pod(target, spec.target.rank)
    if pod is None or pod.uid not in active_uids(target.runtime):
        return _pending(wish, kept, Reason.TARGET_NOT_READY, f"{name} has no active rank {spec.target.rank}")
    if not is_true(target.wish.status, "Ready"):
        return _pending(wish, kept, Reason.TARGET_NOT_READY, f"{name} is not Ready; a drill starts from a whole group")
    injection = Injection(spec.target.rank, pod.uid, at=now, armed_at=now)
    told = f"about to injure {pod.name} by {spec.fault.type}"
    conditions = (
        Condition("Accepted", "True", Reason.ACCEPTED, "the target allows drills"),
        Condition("Injected", "False", Reason.DRILL_PENDING, told),
        Condition("Complete", "False", Reason.DRILL_PENDING, told),
    )
    return Decision(
        conditions=conditions,
        status=_status(wish, kept, injection, Seen(last=totals(target.runtime)), told, sent=False),
        events=events_of(wish.status, conditions[:1]),
        wake_in=0.05,
    )


def _watch(  # noqa: PLR0917
    wish: Wish,
    spec: MoEDrillSpec,
    facts: Facts,
    injection: Injection,
    kept: Mapping[str, Any],
    now: float,
) -> Decision:
    """Send the fault (the time counts from here), then look until there is a verdict."""
    target = facts.target
    name = f"{spec.target.kind} {spec.target.name}"
    sent = kept["memory"].get("sent") is True
    if not sent:
        injection = replace(injection, at=now)
    seen = _seen(kept)
    if target is not None:
        seen = look(injection, seen, target.runtime, num_ranks=_num_ranks(target), now=now)
    if not sent and seen.detected_s is None:  # else an operator that died had sent it
        hindered = _hindered(name, facts, injection, now)
        if hindered is not None:
            return _not_injected(wish, kept, *hindered)
    verdict = judge(injection, seen, Slo(spec.slo.max_requests_failed, spec.slo.restored_within_seconds), now=now)
    actions: list[Action] = []
    lost = now - injection.at > RESEND_AFTER_S and seen.detected_s is None and _is_untouched(target, injection)
    if verdict is None and (not sent or lost):
        actions.append(InjectFault(FaultRequest(pod_uid=injection.pod_uid, fault=_FAULT[spec.fault.type])))
    told = f"{spec.fault.type} sent to rank {injection.rank} of {name}; {_times(seen)}"
    return Decision(
        actions=tuple(actions),
        conditions=(conditions := _conditions(told, verdict)),
        status=_status(wish, kept, injection, seen, verdict.message if verdict else told, sent=True, verdict=verdict),
        events=events_of(wish.status, conditions),
        wake_in=LOOK_AGAIN_S if verdict is None else None,
    )


def _hindered(name: str, facts: Facts, injection: Injection, now: float) -> tuple[Reason, str] | None:
    """Why the fault cannot be sent, None while it can."""
    target = facts.target
    if target is None:
        return Reason.TARGET_NOT_FOUND, f"{name} was deleted before the fault was sent"
    for one in facts.refused:
        return Reason.REFUSED, f"the coordinator of {name} refused the fault: {one.code} {one.message}"
    if target.runtime is not None and all(pod.uid != injection.pod_uid or pod.deleting for pod in target.pods):
        return Reason.TARGET_NOT_FOUND, f"the pod of rank {injection.rank} of {name} went before the fault was sent"
    waited = now - injection.armed_at
    if waited > SEND_WITHIN_S:
        return Reason.COORDINATOR_AWAY, f"no coordinator of {name} took the fault in {waited:.0f} s"
    return None


def _not_injected(wish: Wish, kept: Mapping[str, Any], reason: Reason, why: str) -> Decision:
    """The end of a drill that has hurt nobody, and so has shown nothing."""
    told = f"nothing was injured: {why}"
    conditions = (
        Condition("Accepted", "False" if _injection(kept) is None else "True", reason, why),
        Condition("Injected", "False", reason, told),
        Condition("Complete", "True", reason, told),
        Condition("Failed", "True", reason, told),
    )
    status = {**kept, "observedGeneration": wish.generation, "message": told, "verdict": "Failed"}
    return Decision(conditions=conditions, status=status, events=events_of(wish.status, conditions))


def _conditions(told: str, verdict: Verdict | None) -> tuple[Condition, ...]:
    injected = Condition("Injected", "True", Reason.DRILL_INJECTED, told)
    if verdict is None:
        return injected, Condition("Complete", "False", Reason.DRILL_INJECTED, told)
    reason = Reason.DRILL_PASSED if verdict.passed else Reason.DRILL_FAILED
    failed = Condition("Failed", "False" if verdict.passed else "True", reason, verdict.message)
    return injected, Condition("Complete", "True", reason, verdict.message), failed


def _pod(target: TargetFact, rank: int) -> PodFact | None:
    pods = [p for p in target.pods if p.role == ROLE_RANK and p.index == rank and p.phase == "Running"]
    return max((p for p in pods if not p.deleting), key=lambda p: p.incarnation, default=None)


def _is_untouched(target: TargetFact | None, injection: Injection) -> bool:
    """The pod that was meant runs on as if nothing had been sent."""
    return target is not None and injection.pod_uid in active_uids(target.runtime)


def _num_ranks(target: TargetFact) -> int:
    """What the target wants; one that cannot be read is never restored."""
    parallelism = target.wish.spec.get("parallelism")
    degrees = [parallelism.get("expert"), parallelism.get("data", 1)] if isinstance(parallelism, Mapping) else [None]
    return prod(degree if isinstance(degree, int) else 1 for degree in degrees)


def _times(seen: Seen) -> str:
    parts = (("detected", seen.detected_s), ("serving again", seen.degraded_s), ("restored", seen.restored_s))
    told = [f"{name} after {value:.2f} s" for name, value in parts if value is not None]
    return ", ".join(told) or "nothing seen yet"


def _injection(kept: Mapping[str, Any]) -> Injection | None:
    memory = kept.get("memory")
    if not isinstance(memory, Mapping) or "podUid" not in memory:
        return None
    return Injection(
        rank=int(memory["rank"]),
        pod_uid=str(memory["podUid"]),
        at=int(memory["atMilliseconds"]) / 1000,
        armed_at=int(memory["armedMilliseconds"]) / 1000,
    )


def _seen(kept: Mapping[str, Any]) -> Seen:
    memory = kept["memory"]

    def seconds(key: str) -> float | None:
        return float(kept[key]) if key in kept else None

    return Seen(
        detected_s=seconds("detectedSeconds"),
        degraded_s=seconds("degradedSeconds"),
        restored_s=seconds("restoredSeconds"),
        requests_failed=int(kept.get("requestsFailed", 0)),
        tokens_degraded=int(kept.get("tokensDegraded", 0)),
        last=(int(memory["lastRequestsFailed"]), int(memory["lastTokensDegraded"])),
    )


def _status(
    wish: Wish,
    kept: Mapping[str, Any],
    injection: Injection,
    seen: Seen,
    message: str,
    *,
    sent: bool,
    verdict: Verdict | None = None,
) -> dict[str, Any]:
    """Seconds are decimal strings, for columns; the rest are counts."""
    status: dict[str, Any] = {
        **kept,
        "observedGeneration": wish.generation,
        "message": message,
        "requestsFailed": seen.requests_failed,
        "tokensDegraded": seen.tokens_degraded,
        "memory": {
            "rank": injection.rank,
            "podUid": injection.pod_uid,
            "atMilliseconds": round(injection.at * 1000),
            "armedMilliseconds": round(injection.armed_at * 1000),
            "lastRequestsFailed": seen.last[0],
            "lastTokensDegraded": seen.last[1],
            "sent": sent,
        },
    }
    times = {"detected": seen.detected_s, "degraded": seen.degraded_s, "restored": seen.restored_s}
    status |= {f"{name}Seconds": f"{value:.3f}" for name, value in times.items() if value is not None}
    if sent:
        status["injectedTime"] = rfc3339(injection.at)
    if verdict is not None:
        status["verdict"] = "Passed" if verdict.passed else "Failed"
    return status
