"""Conditions as Kubernetes keeps them: a list keyed by type, whose transition time moves only when the status flips."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_core.decide.times import rfc3339
from moe_core.facts import Condition


def merge_conditions(
    old: Sequence[Mapping[str, Any]], new: Sequence[Condition], *, generation: int, now: float
) -> list[dict[str, Any]]:
    """Set `new` over `old` by type. Types that are not decided any more stay as they were."""
    merged = {str(c["type"]): dict(c) for c in old}
    for condition in new:
        before = merged.get(condition.type)
        flipped = before is None or before["status"] != condition.status
        merged[condition.type] = {
            "type": condition.type,
            "status": condition.status,
            "reason": condition.reason.value,
            "message": condition.message[:32768],
            "observedGeneration": generation,
            "lastTransitionTime": rfc3339(now) if flipped or before is None else before["lastTransitionTime"],
        }
    return list(merged.values())


_COUNTERS = ("training", "serving")
_COUNTING = ("Complete",)
"""Fields of a status, and conditions whose message, move with every step."""


def is_only_counting(
    old: Sequence[Mapping[str, Any]],
    new: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> bool:
    """Whether nothing but counters differs between two statuses: conditions apart, as in merge_conditions.

    >>> is_only_counting([], [], {"epoch": 1, "serving": {"tokensOut": 8}}, {"epoch": 1, "serving": {"tokensOut": 9}})
    True
    """
    return _still(before) == _still(after) and [_said(c) for c in old] == [_said(c) for c in new]


def _still(status: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in status.items() if name not in _COUNTERS}


def _said(condition: Mapping[str, Any]) -> dict[str, Any]:
    return {**condition, "message": ""} if condition["type"] in _COUNTING else dict(condition)
