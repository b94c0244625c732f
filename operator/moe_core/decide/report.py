"""Counts, status and events: what a person reads. Messages carry numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_core.contract.exchange import RuntimeState
from moe_core.contract.names import LABEL_ROLE, ROLE_RANK, owner_labels
from moe_core.decide.crew import Seat, active_uids
from moe_core.decide.measured import FIELDS as MEASURED
from moe_core.decide.measured import Measured
from moe_core.decide.memory import Memory, condition_in
from moe_core.decide.times import rfc3339
from moe_core.facts import Condition, Event, Wish
from moe_core.outcome import Reason

_GOOD_WHEN_TRUE = ("Accepted", "Placed", "Ready", "ExpertCoverage", "Balanced", "Complete")
_BAD_WHEN_TRUE = ("Failed", "Degraded")
_QUIET = (Reason.STARTING, Reason.PLACING, Reason.STABLE, Reason.FORMING, Reason.RUNNING, Reason.COUNTING)
"""How things always begin; not worth an event until they change."""


@dataclass(frozen=True, slots=True)
class Counts:
    """desired; allocated: bound to a node; available: running; active: taking part in steps."""

    desired: int
    allocated: int
    available: int
    active: int

    def as_status(self) -> dict[str, int]:
        return {
            "desired": self.desired,
            "allocated": self.allocated,
            "available": self.available,
            "active": self.active,
        }


def count(num_ranks: int, ranks: Mapping[int, Seat], runtime: RuntimeState | None, *, last_active: int = 0) -> Counts:
    """`last_active` stands in while no coordinator answers: the ranks go on without it, as far as they run."""
    wanted = [ranks[r] for r in range(num_ranks) if r in ranks]
    placed = [seat.live for seat in wanted if seat.live is not None and seat.is_placed]
    active = active_uids(runtime)
    available = sum(1 for pod in placed if pod.phase == "Running")
    return Counts(
        desired=num_ranks,
        allocated=len(placed),
        available=available,
        active=min(last_active, available) if runtime is None else sum(1 for pod in placed if pod.uid in active),
    )


def status_of(
    wish: Wish,
    memory: Memory,
    counts: Counts,
    *,
    restarts: int = 0,
    runtime: RuntimeState | None = None,
    message: str = "",
) -> dict[str, Any]:
    """The whole status but for conditions. Numbers of the runtime stay as last seen while no coordinator answers."""
    before = {key: wish.status[key] for key in _OF_RUNTIME if key in wish.status}
    labels = {**owner_labels(wish.kind, wish.name), LABEL_ROLE: ROLE_RANK}
    status: dict[str, Any] = {
        "observedGeneration": wish.generation,
        "ranks": counts.as_status(),
        "replicas": counts.allocated,
        "selector": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "restarts": restarts,
        **(before if runtime is None else _of_runtime(runtime)),
        "epoch": memory.epoch,
        "message": message,
        "memory": memory.as_status(),
    }
    if memory.started_at is not None:
        status["startTime"] = rfc3339(memory.started_at)
    if memory.completed_at is not None:
        status["completionTime"] = rfc3339(memory.completed_at)
    return status


_OF_RUNTIME = (
    *("mapDigest", "expertCoveragePercent", "training", "serving", "recoveries", "steps", "wireError"),
    *MEASURED,
)


def _of_runtime(runtime: RuntimeState) -> dict[str, Any]:
    found: dict[str, Any] = {"mapDigest": runtime.map_digest}
    if runtime.coverage is not None and runtime.coverage.total:
        found["expertCoveragePercent"] = 100 * runtime.coverage.covered // runtime.coverage.total
    if runtime.training is not None:
        found["training"] = _camel(runtime.training.model_dump(mode="json", exclude_none=True))
    if runtime.serving is not None:
        found["serving"] = _camel(runtime.serving.model_dump(mode="json", exclude_none=True))
    if (time := runtime.step_time) is not None:
        found["steps"] = {
            "computePercent": time.percent(time.compute_us),
            "exchangePercent": time.percent(time.exchange_us),
            "waitPercent": time.percent(time.wait_us),
            **({} if time.most_waited_for is None else {"mostWaitedForRank": time.most_waited_for}),
        }
    if runtime.wire_error:
        found["wireError"] = dict(runtime.wire_error)
    found |= Measured.of_runtime(runtime).as_status()
    if runtime.recoveries:
        last = runtime.recoveries[-1]
        found["recoveries"] = {
            "seen": len(runtime.recoveries),
            "lastEpoch": last.epoch,
            "lastLostRanks": list(last.lost_ranks),
            "lastDetectedTime": rfc3339(last.detected_at),
            "lastResumeMilliseconds": round(1000 * (last.resumed_at - last.detected_at)),
        }
    return found


def _camel(values: Mapping[str, Any]) -> dict[str, Any]:
    """snake_case keys of a wire model as status fields; floats as they are (a status may hold numbers)."""
    return {_camel_word(key): value for key, value in values.items()}


def _camel_word(word: str) -> str:
    head, *rest = word.split("_")
    return head + "".join(part.capitalize() for part in rest)


def events_of(status: Mapping[str, Any], conditions: Sequence[Condition]) -> tuple[Event, ...]:
    """One event for each condition whose status or reason is another than last written."""
    events = []
    for condition in conditions:
        before = condition_in(status, condition.type)
        if before is not None and (before.get("status"), before.get("reason")) == (condition.status, condition.reason):
            continue
        if before is None and (condition.reason in _QUIET or condition.status == "Unknown"):
            continue
        if condition.type == "Progressing" or (condition.status == "Unknown" and condition.type != "Ready"):
            continue
        bad = (condition.type in _GOOD_WHEN_TRUE and condition.status == "False") or (
            condition.type in _BAD_WHEN_TRUE and condition.status == "True"
        )
        worth = bad and condition.reason not in (*_QUIET, Reason.RESIZING)
        events.append(Event("Warning" if worth else "Normal", condition.reason, condition.message))
    unique: list[Event] = []
    for event in events:
        if all(event.reason != other.reason for other in unique):
            unique.append(event)
    return tuple(unique)
