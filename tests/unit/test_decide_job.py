"""MoEJob in a simulated cluster: to the end, or to failure; nothing runs on."""

from dataclasses import replace
from typing import Any

from moe_core.contract.exchange import RuntimeState
from moe_core.decide import decide
from moe_core.facts import CreatePod, DeletePod
from simcluster import Sim, edit, gpu_nodes, gpu_template, job_spec, make


def running(**more: Any) -> Sim:
    sim = make("MoEJob", job_spec(template=gpu_template(), **more), gpu_nodes(6))
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    return sim


def test_a_job_that_is_done_completes_and_leaves_nothing_running() -> None:
    sim = running()
    sim.training_done = True
    first = sim.step()
    assert not [a for a in first.actions if isinstance(a, DeletePod)], "the end is written down first"
    assert sim.condition("Complete") == ("True", "Completed")
    sim.settle()
    assert sim.pods == []
    assert sim.condition("Complete") == ("True", "Completed")
    assert "completionTime" in sim.wish.status


def test_an_operator_that_dies_before_writing_the_end_finds_it_again() -> None:
    sim = running()
    sim.training_done = True
    sim.step(crash_after=0)
    assert len(sim.pods) == 5
    sim.settle()
    assert sim.condition("Complete") == ("True", "Completed")


def test_ranks_that_somebody_ended_in_order_are_replaced_and_the_job_is_not_complete() -> None:
    sim = running()
    sim.pods = [replace(p, phase="Succeeded") if p.role == "rank" else p for p in sim.pods]
    assert len([a for a in sim.step().actions if isinstance(a, CreatePod)]) == 4
    sim.settle()
    assert sim.condition("Complete")[0] == "False"
    assert sim.condition("Ready") == ("True", "AllActive")


def test_the_budget_fails_the_job_and_removes_its_pods() -> None:
    sim = running(failurePolicy={"maxRestarts": 1})
    for rank in (0, 2):
        sim.kill(rank)
        sim.settle()
    assert sim.condition("Failed") == ("True", "RestartBudgetExhausted")
    assert "1 of 1 restarts used" in sim.message("Failed")
    assert sim.pods == []


def test_a_deadline_fails_the_job() -> None:
    sim = running(activeDeadlineSeconds=100)
    wake_in = sim.step().wake_in
    assert wake_in is not None
    assert wake_in <= 100
    sim.now += 100
    sim.settle()
    assert sim.condition("Failed") == ("True", "DeadlineExceeded")
    assert sim.pods == []


def test_a_failure_of_the_runtime_fails_the_job() -> None:
    sim = running()
    facts = replace(sim.facts(), runtime=RuntimeState(version=1, epoch=1, failure="family 'x' is not a MoE family"))
    failed = next(c for c in decide(sim.wish, facts, sim.now).conditions if c.type == "Failed")
    assert (failed.status, failed.reason, failed.message) == ("True", "RuntimeFailed", "family 'x' is not a MoE family")


def test_a_finished_job_is_removed_when_its_time_to_live_is_over() -> None:
    sim = running(ttlSecondsAfterFinished=60)
    sim.training_done = True
    sim.settle()
    assert not sim.owner_deleted
    wake_in = sim.step().wake_in
    assert wake_in is not None
    sim.now += 60
    sim.step()
    assert sim.owner_deleted


def test_a_suspended_job_holds_nothing_and_its_deadline_starts_anew() -> None:
    sim = running(activeDeadlineSeconds=100)
    edit(sim, suspend=True)
    sim.settle()
    assert sim.pods == []
    assert sim.condition("Suspended") == ("True", "Suspended")
    sim.now += 1000
    sim.epoch, sim.members, sim.told = 0, {}, None
    edit(sim, suspend=False)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.condition("Suspended")[0] == "False"


def test_a_lost_rank_of_a_job_is_replaced() -> None:
    sim = running()
    sim.kill(3)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 1


def test_a_finished_job_stays_finished_though_its_topology_is_gone() -> None:
    sim = running()
    sim.training_done = True
    sim.step()
    edit(sim, topologyConstraint={"topologyName": "gone", "pack": {"required": "rack"}})
    sim.settle()
    assert sim.pods == []
    assert sim.condition("Complete") == ("True", "Completed")
