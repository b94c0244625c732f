"""Status of the ExpertMap objects: which assignment the ranks follow, what it covers, how evenly the load falls."""

from collections.abc import Mapping
from typing import Any

from moe_core.contract.exchange import RuntimeState
from moe_core.contract.expert_map import ExpertMap
from moe_core.decide.crew import active_uids
from moe_core.decide.times import rfc3339, seconds_of
from moe_core.experts.measure import balance
from moe_core.facts import Facts, ReportMap

MEASURE_EVERY_S = 60.0
"""Load changes all the time; a status that people read need not."""


def report_maps(expert_map: ExpertMap, facts: Facts, now: float) -> list[ReportMap]:
    """The same for every slice; nothing while no coordinator answers or no group has formed."""
    runtime = facts.runtime
    slices = sorted((obj for obj in facts.objects if obj.kind == "ExpertMap"), key=lambda obj: obj.name)
    if runtime is None or not runtime.epoch or not slices:
        return []
    status = _status(runtime, expert_map, slices[0].status, now)
    return [ReportMap(obj.name, status) for obj in slices if dict(obj.status) != status]


def _status(runtime: RuntimeState, expert_map: ExpertMap, before: Mapping[str, Any], now: float) -> dict[str, Any]:
    status: dict[str, Any] = {"appliedDigest": runtime.map_digest, "epoch": runtime.epoch}
    if runtime.coverage is not None and runtime.coverage.total:
        covered, total = runtime.coverage.covered, runtime.coverage.total
        status |= {"coveredExperts": covered, "totalExperts": total, "coveragePercent": 100 * covered // total}
    if runtime.map_digest != expert_map.digest:  # a load was counted under a map that is not this one
        return status
    measured = {
        key: before[key] for key in _MEASURED if key in before and before.get("appliedDigest") == runtime.map_digest
    }
    tokens = sum(map(sum, runtime.load))
    last = seconds_of(measured.get("measuredTime"))
    is_due = last is None or now - last >= MEASURE_EVERY_S
    if tokens and is_due and tokens != measured.get("measuredTokens") and _fits(runtime, expert_map):
        active = active_uids(runtime)
        live = [s.rank for s in runtime.ranks if s.pod_uid in active and s.rank < expert_map.num_ranks]
        found = balance(expert_map, runtime.load, live)
        measured = {
            "balancednessPercent": round(100 * found.balancedness),
            "balancednessMinPercent": round(100 * found.balancedness_min),
            "measuredTokens": tokens,
            "measuredTime": rfc3339(now),
        }
    return status | measured


_MEASURED = ("balancednessPercent", "balancednessMinPercent", "measuredTokens", "measuredTime")


def _fits(runtime: RuntimeState, expert_map: ExpertMap) -> bool:
    """[L][E] of this model, however old the process is that counted."""
    shape = {len(row) for row in runtime.load}
    return len(runtime.load) == expert_map.num_layers and shape == {expert_map.num_logical_experts}
