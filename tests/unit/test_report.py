"""Conditions are merged by type, and their time moves only when the status flips."""

from moe_core.decide.times import rfc3339
from moe_core.facts import Condition
from moe_core.outcome import Reason
from moe_operator.report import merge_conditions


def ready(status: str, message: str = "", reason: Reason = Reason.STARTING) -> Condition:
    assert status in ("True", "False", "Unknown")
    return Condition("Ready", status, reason, message)  # type: ignore[arg-type]


def test_a_new_condition_has_the_time_it_was_first_seen() -> None:
    (merged,) = merge_conditions([], [ready("False", "none yet")], generation=3, now=100)
    assert merged == {
        "type": "Ready",
        "status": "False",
        "reason": "Starting",
        "message": "none yet",
        "observedGeneration": 3,
        "lastTransitionTime": "1970-01-01T00:01:40Z",
    }


def test_the_time_stays_while_only_the_words_change() -> None:
    old = merge_conditions([], [ready("False", "1 of 4")], generation=1, now=100)
    (merged,) = merge_conditions(old, [ready("False", "2 of 4", Reason.FORMING)], generation=2, now=200)
    assert merged["lastTransitionTime"] == rfc3339(100)
    assert (merged["message"], merged["reason"], merged["observedGeneration"]) == ("2 of 4", "Forming", 2)


def test_the_time_moves_when_the_status_flips() -> None:
    old = merge_conditions([], [ready("False")], generation=1, now=100)
    (merged,) = merge_conditions(old, [ready("True")], generation=1, now=200)
    assert merged["lastTransitionTime"] == rfc3339(200)


def test_conditions_that_are_not_decided_any_more_stay_as_they_were() -> None:
    old = merge_conditions([], [Condition("Accepted", "True", Reason.ACCEPTED, "")], generation=1, now=100)
    merged = merge_conditions(old, [ready("True")], generation=2, now=200)
    assert [c["type"] for c in merged] == ["Accepted", "Ready"]
    assert merged[0] == old[0]


def test_merging_the_same_again_changes_nothing() -> None:
    old = merge_conditions([], [ready("True", "4 of 4")], generation=1, now=100)
    assert merge_conditions(old, [ready("True", "4 of 4")], generation=1, now=999) == old
