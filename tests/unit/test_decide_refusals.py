"""What the API server refuses stands in the conditions, in its own words, until it goes through."""

from dataclasses import replace
from typing import Any

import pytest

from moe_core.decide import decide
from moe_core.decide.refusals import tell
from moe_core.facts import Action, ApplyObject, CreatePod, EnsureToken, PutWish, RefusedAction
from moe_core.outcome import Reason
from simcluster import Sim, edit, gpu_nodes, gpu_template, job_spec, make, service_spec


def start(kind: str, ranks: int = 4) -> Sim:
    spec: dict[str, Any] = (service_spec if kind == "MoEService" else job_spec)(ranks, template=gpu_template())
    return make(kind, spec, gpu_nodes(6))


def pods_of_ranks(action: Action) -> bool:
    return isinstance(action, CreatePod) and action.role == "rank"


@pytest.mark.parametrize("kind", ["MoEJob", "MoEService"])
def test_pods_over_quota_are_told_in_the_conditions_and_once_as_an_event(kind: str) -> None:
    sim = start(kind)
    sim.refuses = lambda action: pods_of_ranks(action) and not sim.now > 1005
    told = "was refused: 403 exceeded quota: few"
    first = sim.step()
    assert [(event.type, event.reason) for event in first.events if told in event.message] == [
        ("Warning", Reason.REFUSED)
    ]
    for type_ in ("Ready", "Placed", "Progressing"):
        assert sim.condition(type_) == ("False", "Refused")
        assert told in sim.message(type_)
    assert told in sim.wish.status["message"]
    assert sim.condition("Accepted") == ("True", "Accepted"), "the spec is not to blame"
    assert sim.step().events == ()
    sim.now = 1010
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert "Refused" not in str(sim.wish.status["conditions"])


@pytest.mark.parametrize("kind", ["MoEJob", "MoEService"])
def test_an_invalid_pod_takes_the_acceptance_back(kind: str) -> None:
    sim = start(kind)
    pod = next(action for action in sim.decision().actions if pods_of_ranks(action))
    refused = RefusedAction(pod, 422, "volumeMounts[0].name: Not found: models")
    decision = decide(sim.wish, replace(sim.facts(), refused=(refused,)), sim.now)
    accepted = next(c for c in decision.conditions if c.type == "Accepted")
    assert (accepted.status, accepted.reason) == ("False", Reason.REFUSED)
    assert accepted.message == "Pod tiny-{}-rank-0-1 was refused: 422 volumeMounts[0].name: Not found: models".format(
        "svc" if kind == "MoEService" else "job"
    )


def test_a_running_service_stays_ready_while_a_change_of_its_objects_is_refused() -> None:
    sim = start("MoEService")
    sim.settle()
    sim.refuses = lambda action: isinstance(action, ApplyObject)
    sim.objects["ConfigMap", "tiny-svc-config"] = "another"
    sim.step()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.condition("Progressing") == ("False", "Refused")
    assert sim.message("Progressing") == "ConfigMap tiny-svc-config was refused: 403 exceeded quota: few"


def test_a_lost_rank_whose_successor_is_refused_is_still_called_lost_and_not_replaced() -> None:
    sim = start("MoEService")
    sim.settle()
    sim.kill(1)
    sim.tick()
    sim.refuses = pods_of_ranks
    decision = sim.step()
    assert sim.condition("Ready") == ("False", "RankLost")
    assert sim.condition("Placed") == ("False", "Refused")
    assert [event for event in decision.events if event.reason == Reason.RANK_REPLACED] == []
    sim.refuses = lambda action: False
    assert any(event.reason == Reason.RANK_REPLACED for event in sim.step().events)
    sim.tick()
    sim.step()
    assert sim.condition("Degraded")[1] != "Starting", "the group has formed long ago"


def test_a_refused_wish_is_told_and_put_again() -> None:
    sim = start("MoEService")
    sim.settle()
    edit(sim, parallelism={"expert": 3})
    sim.refuses = lambda action: isinstance(action, PutWish)
    sim.step()
    assert sim.condition("Progressing") == ("False", "Refused")
    assert sorted(sim.members) == [0, 1, 2, 3]
    sim.refuses = lambda action: False
    sim.settle()
    assert sorted(sim.members) == [0, 1, 2]


def test_an_object_of_somebody_else_met_on_the_way_is_called_foreign_at_once() -> None:
    sim = start("MoEJob")
    pod = next(action for action in sim.decision().actions if pods_of_ranks(action))
    foreign = RefusedAction(pod, 409, "it belongs to Deployment web")
    decision = decide(sim.wish, replace(sim.facts(), refused=(foreign,)), sim.now)
    assert decision.conditions[0].reason == Reason.FOREIGN_OBJECT
    assert "Pod/tiny-job-rank-0-1" in decision.conditions[0].message
    assert decision.actions == ()


def test_many_refusals_are_one_sentence() -> None:
    one = RefusedAction(EnsureToken("t"), 403, "no")
    assert tell((one, one, one)) == "Secret t was refused: 403 no; and 2 more"
