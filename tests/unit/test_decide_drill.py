"""MoEDrill: one fault, once, on a whole target; times and verdict."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.contract.exchange import Recovery, RuntimeState, ServingProgress
from moe_core.decide import decide
from moe_core.drills.verdict import Injection, Seen, look
from moe_core.facts import Decision, Facts, InjectFault, RefusedAction, TargetFact, Wish
from simcluster import Sim, gpu_nodes, gpu_template, make, service_spec


@dataclass
class Drill:
    """A drill beside its simulated target."""

    target: Sim
    spec: dict[str, Any]
    status: dict[str, Any] = field(default_factory=dict)
    recoveries: tuple[Recovery, ...] = ()
    serving: ServingProgress = field(default_factory=ServingProgress)

    def runtime(self) -> RuntimeState | None:
        state = self.target.runtime()
        if state is None:
            return None
        return state.model_copy(update={"recoveries": self.recoveries, "serving": self.serving})

    def step(self, *, crash: bool = False, refusing: tuple[int, str] | None = None) -> Decision:
        wish = Wish("MoEDrill", "default", "d", "drill", 1, self.spec, self.status)
        target = TargetFact(self.target.wish, tuple(self.target.pods), self.runtime())
        decision = decide(wish, Facts(target=target), self.target.now)
        if refusing is not None:
            refused = tuple(RefusedAction(action, *refusing) for action in decision.actions)
            decision = decide(wish, Facts(target=target, refused=refused), self.target.now)
        else:
            for action in decision.actions:
                self.target.apply(action)
        if not crash:
            conditions = {c["type"]: c for c in self.status.get("conditions", ())}
            for c in decision.conditions:
                conditions[c.type] = {"type": c.type, "status": c.status, "reason": str(c.reason), "message": c.message}
            self.status = {**decision.status, "conditions": list(conditions.values())}
        return decision

    def condition(self, type_: str) -> tuple[str, str]:
        return next((c["status"], c["reason"]) for c in self.status["conditions"] if c["type"] == type_)


def drill(**slo: int) -> Drill:
    sim = make("MoEService", service_spec(template=gpu_template(), drills="Allowed"), gpu_nodes(6))
    sim.settle()
    spec = {
        "target": {"kind": "MoEService", "name": "tiny", "rank": 2},
        "fault": {"type": "KillRank"},
        "slo": {"maxRequestsFailed": 0, "restoredWithinSeconds": 60, **slo},
    }
    return Drill(sim, spec)


def injure(found: Drill) -> str:
    """Through arming and sending; returns the uid that was hit."""
    found.step()
    found.step()
    [uid] = found.target.injected
    at = found.target.now
    found.target.kill(2)
    found.recoveries = (
        Recovery(
            epoch=2, lost_ranks=(2,), detected_at=at + 0.1, agreed_at=at + 0.2, rebuilt_at=at + 0.3, resumed_at=at + 0.5
        ),
    )
    return uid


def test_a_drill_that_is_survived_passes_with_its_times() -> None:
    found = drill()
    injure(found)
    for _ in range(8):
        found.target.step()
        found.target.tick()
        found.step()
    assert found.condition("Complete") == ("True", "DrillPassed")
    assert found.status["verdict"] == "Passed"
    assert (found.status["detectedSeconds"], found.status["degradedSeconds"]) == ("0.100", "0.500")
    assert float(found.status["restoredSeconds"]) > 0.5
    assert found.step().actions == ()


def test_nothing_is_injured_before_the_choice_is_written_down() -> None:
    found = drill()
    assert found.step(crash=True).actions == ()
    assert found.step(crash=True).actions == ()
    assert found.step().actions == ()
    assert [type(a) for a in found.step().actions] == [InjectFault]
    assert found.step().actions == ()


def test_an_operator_that_dies_after_sending_hits_no_second_pod() -> None:
    found = drill()
    found.step()
    found.step(crash=True)
    found.target.kill(2)
    found.target.settle()
    found.step()
    assert len(set(found.target.injected)) == 1, "the successor has another uid"


def test_a_fault_that_did_not_take_is_sent_again() -> None:
    found = drill()
    found.step()
    found.step()
    found.target.now += 6
    assert [type(a) for a in found.step().actions] == [InjectFault]


def test_failed_requests_fail_the_drill() -> None:
    found = drill()
    found.serving = ServingProgress(requests_failed=3)
    injure(found)
    found.serving = ServingProgress(requests_failed=5, degraded_tokens={"generalist": 40})
    for _ in range(8):
        found.target.step()
        found.target.tick()
        found.step()
    assert found.condition("Complete") == ("True", "DrillFailed")
    assert found.condition("Failed") == ("True", "DrillFailed")
    assert (found.status["requestsFailed"], found.status["tokensDegraded"]) == (2, 40)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 6), st.integers(0, 9))
def test_a_coordinator_that_starts_anew_hides_no_failure(rises: list[int], restart_at: int, before: int) -> None:
    injection, seen, count = Injection(2, "u", at=0.0, armed_at=0.0), Seen(last=(before, 0)), before
    for step, rise in enumerate(rises):
        count = rise if step == restart_at else count + rise
        if step == restart_at:  # it is heard once before anything new fails
            seen = look(injection, seen, RuntimeState(version=0, serving=ServingProgress()), num_ranks=4, now=1.0)
        serving = ServingProgress(requests_failed=count)
        seen = look(injection, seen, RuntimeState(version=step, serving=serving), num_ranks=4, now=1.0)
    assert seen.requests_failed == sum(rises)


def test_a_target_that_does_not_come_back_in_time_fails_the_drill() -> None:
    found = drill()
    injure(found)
    found.target.now += 61
    found.step()
    assert found.status["verdict"] == "Failed"
    assert found.status["message"].startswith("not restored within 60 s, the fault was detected")


def test_a_drill_waits_for_a_whole_target() -> None:
    found = drill()
    found.target.kill(0)
    found.target.step()
    found.step()
    assert found.condition("Injected") == ("False", "TargetNotReady")
    found.target.settle()
    found.step()
    assert found.condition("Injected") == ("False", "DrillPending")


def test_a_target_that_forbids_drills_is_not_touched() -> None:
    found = drill()
    found.target.wish = replace(found.target.wish, spec={**found.target.wish.spec, "drills": "Forbidden"})
    assert found.step().actions == ()
    assert found.condition("Accepted") == ("False", "DrillsForbidden")


def test_a_rank_that_the_target_does_not_have_is_said_and_not_waited_for() -> None:
    found = drill()
    found.spec["target"]["rank"] = 9
    assert found.step().actions == ()
    assert found.condition("Accepted") == ("False", "TargetNotFound")
    assert found.status["message"] == "nothing was injured: target.rank is 9; MoEService tiny has ranks 0 to 3"
    assert found.status["verdict"] == "Failed"


def test_a_target_that_does_not_exist_is_said() -> None:
    wish = Wish("MoEDrill", "default", "d", "drill", 1, drill().spec)
    decision = decide(wish, Facts(), 0.0)
    assert decision.conditions[0].reason == "TargetNotFound"
    assert decision.wake_in is not None
    late = decide(wish, Facts(), 60.0)
    assert [(c.type, c.status) for c in late.conditions if c.reason == "TargetNotFound"] == [
        *(("Accepted", "False"), ("Injected", "False"), ("Complete", "True"), ("Failed", "True")),
    ]
    assert late.status["verdict"] == "Failed"


@pytest.mark.parametrize(
    ("code", "said"), [(403, "faults are not enabled"), (401, "wrong token"), (404, "no rank has registered")]
)
def test_a_drill_whose_fault_is_refused_ends_at_once_and_says_why(code: int, said: str) -> None:
    found = drill()
    found.step()
    found.step(refusing=(code, said))
    assert found.condition("Complete") == found.condition("Failed") == ("True", "Refused")
    assert found.condition("Injected") == ("False", "Refused")
    assert found.status["verdict"] == "Failed"
    assert found.status["message"] == (
        f"nothing was injured: the coordinator of MoEService tiny refused the fault: {code} {said}"
    )
    assert found.step().actions == ()


def test_a_drill_whose_target_goes_before_the_fault_was_sent_ends_at_once() -> None:
    found = drill()
    found.step()
    found.target.kill(2)
    found.target.settle()
    assert found.step().actions == ()
    assert found.condition("Failed") == ("True", "TargetNotFound")


def test_a_fault_that_no_coordinator_takes_is_given_up() -> None:
    found = drill()
    found.step()
    found.target.now += 31
    assert found.step().actions == ()
    assert found.condition("Failed") == ("True", "CoordinatorAway")


def test_a_refused_repetition_of_a_fault_that_took_ends_nothing() -> None:
    found = drill()
    found.step()
    found.step(crash=True)
    at = found.target.now
    found.recoveries = (
        Recovery(epoch=2, lost_ranks=(2,), detected_at=at, agreed_at=at, rebuilt_at=at, resumed_at=at + 0.5),
    )
    found.step(refusing=(404, "no rank has registered with that uid"))
    assert found.condition("Injected") == ("True", "DrillInjected")
    assert found.condition("Complete")[0] == "False"


def test_a_hang_is_sent_as_a_hang() -> None:
    found = drill()
    found.spec["fault"] = {"type": "HangRank"}
    found.step()
    [action] = found.step().actions
    assert isinstance(action, InjectFault)
    assert action.request.fault == "hang"
