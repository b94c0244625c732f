"""From an injected fault and what the target has shown since then to times and a verdict.

Times are seconds after the injection:
    detected  the ranks saw the fault
    degraded  steps went on without the lost rank (degraded, but serving)
    restored  every rank is active again, the injured one with another pod, and every expert has a live copy
"""

from dataclasses import dataclass

from moe_core.contract.exchange import RuntimeState

CLOCK_SLACK_S = 0.5
"""Ranks and operator read different clocks; a recovery this much before the injection still counts as its effect."""


@dataclass(frozen=True, slots=True)
class Injection:
    rank: int
    pod_uid: str
    at: float
    armed_at: float
    """When the pod was chosen; the fault cannot be older, even if it was sent twice over a crash."""


@dataclass(frozen=True, slots=True)
class Seen:
    detected_s: float | None = None
    degraded_s: float | None = None
    restored_s: float | None = None
    requests_failed: int = 0
    """Requests failed and tokens degraded since the pod was chosen: every rise of the target's counts."""
    tokens_degraded: int = 0
    last: tuple[int, int] = (0, 0)
    """Both counts as the target last told them; they fall back when a coordinator or a gateway starts anew."""


@dataclass(frozen=True, slots=True)
class Slo:
    max_requests_failed: int
    restored_within_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    passed: bool
    message: str


def totals(runtime: RuntimeState | None) -> tuple[int, int]:
    """(requests failed, tokens degraded) since the target started."""
    serving = runtime.serving if runtime is not None else None
    if serving is None:
        return 0, 0
    return serving.requests_failed, sum(serving.degraded_tokens.values())


def look(injection: Injection, before: Seen, runtime: RuntimeState | None, *, num_ranks: int, now: float) -> Seen:
    """What has been seen by now; what was seen before stays."""
    if runtime is None:
        return before
    failed, degraded = (max(0, new - old) for new, old in zip(totals(runtime), before.last, strict=True))
    recovery = next(
        (
            r
            for r in runtime.recoveries
            if injection.rank in r.lost_ranks and r.detected_at >= injection.armed_at - CLOCK_SLACK_S
        ),
        None,
    )
    detected_s, degraded_s = before.detected_s, before.degraded_s
    if recovery is not None and detected_s is None:
        detected_s = max(0.0, recovery.detected_at - injection.at)
        degraded_s = max(0.0, recovery.resumed_at - injection.at)
    restored_s = before.restored_s
    if restored_s is None and _is_restored(injection, runtime, num_ranks):
        restored_s = now - injection.at
    return Seen(
        detected_s=detected_s,
        degraded_s=degraded_s,
        restored_s=restored_s,
        requests_failed=before.requests_failed + failed,
        tokens_degraded=before.tokens_degraded + degraded,
        last=totals(runtime),
    )


def _is_restored(injection: Injection, runtime: RuntimeState, num_ranks: int) -> bool:
    active = [state for state in runtime.ranks if state.phase == "Active"]
    again = any(state.rank == injection.rank and state.pod_uid != injection.pod_uid for state in active)
    back = len(active) >= num_ranks and all(state.pod_uid != injection.pod_uid for state in active)
    return again and back and runtime.coverage is not None and runtime.coverage.is_full


def judge(injection: Injection, seen: Seen, slo: Slo, *, now: float) -> Verdict | None:
    """The verdict, None while it is still open."""
    waited = now - injection.at
    if seen.restored_s is None and waited < slo.restored_within_s:
        return None
    told = f"{seen.requests_failed} requests failed ({slo.max_requests_failed} allowed)"
    told += f", {seen.tokens_degraded} tokens degraded"
    if seen.restored_s is None:
        what = "the fault was detected" if seen.detected_s is not None else "the fault was never detected"
        return Verdict(False, f"not restored within {slo.restored_within_s:.0f} s, {what}; {told}")
    in_time = f"restored after {seen.restored_s:.1f} s ({slo.restored_within_s:.0f} s allowed)"
    passed = seen.restored_s <= slo.restored_within_s and seen.requests_failed <= slo.max_requests_failed
    return Verdict(passed, f"{in_time}; {told}")
