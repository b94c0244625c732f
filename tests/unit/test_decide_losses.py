"""MoEService in a simulated cluster: ranks, nodes, coordinators and gateways are lost, and come back."""

from dataclasses import replace
from itertools import pairwise

import pytest

from moe_core.contract.exchange import RankState, RuntimeState
from moe_core.contract.runtime_config import ENV_REATTACH
from moe_core.decide import decide
from moe_core.facts import CreatePod, DeletePod, NodeFact, PutWish
from simcluster import edit, make, running, service, service_spec


def test_a_group_whose_ranks_die_again_and_again_says_why_while_it_starts() -> None:
    sim = service()
    for _ in range(40):
        sim.step()
        sim.tick(10)
        for pod in sim.pods:
            if pod.role == "rank" and pod.phase == "Running":
                sim.fail(pod.uid, "exit code 1: moe-pod: rank 0: its process ended: OSError: no shard 3")
    kind, reason = sim.condition("Ready")
    assert kind == "False"
    assert reason in ("Starting", "Forming")
    assert "no shard 3" in sim.message("Ready")


def test_a_gateway_that_cannot_start_says_why() -> None:
    sim = service()
    sim.settle()
    gateway = next(pod for pod in sim.pods if pod.role == "gateway")
    sim.change(gateway.uid, ready=False, message="exit code 1: the gateway ended: no tokenizer.json")
    sim.step()
    assert "tiny-svc-gateway-0-1: exit code 1: the gateway ended: no tokenizer.json" in sim.message("Ready")


def test_a_gang_that_would_take_the_last_room_of_its_own_coordinator_is_not_started() -> None:
    template = {"spec": {"resources": {"requests": {"cpu": "1"}}}}
    sim = make(
        "MoEService", service_spec(template=template), [NodeFact("n0", allocatable={"cpu": 4000, "memory": 2**35})]
    )
    sim.settle()
    assert sim.ever_bound == []
    assert sim.message("Placed") == (
        "its 4 ranks have room in the cluster, but beside them 3 pods of coordinator and gateways need cpu 100m, "
        "memory 768Mi each, and there is room for 0"
    )
    sim.nodes = (NodeFact("n0", allocatable={"cpu": 4300, "memory": 2**35}),)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_exactly_the_dead_rank_is_replaced_and_counted_once() -> None:
    sim = running()
    others = {p.uid for p in sim.pods if not (p.role == "rank" and p.index == 2)}
    sim.kill(2)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert others <= {p.uid for p in sim.pods}
    assert [p.name for p in sim.ranks() if p.index == 2] == ["tiny-svc-rank-2-2"]
    assert sim.wish.status["restarts"] == 1


def test_losing_an_uncopied_expert_shows_as_degraded_until_it_is_back() -> None:
    sim = running()
    sim.kill(2)
    sim.tick()
    sim.step()
    assert sim.condition("ExpertCoverage") == ("False", "ExpertsLost")
    assert sim.condition("Degraded") == ("True", "ExpertsLost")
    assert sim.condition("Ready") == ("False", "RankLost")
    told = "3 of 4 ranks active; not active: 2; replaced once, last rank 2: tiny-svc-rank-2-1: killed"
    assert sim.message("Ready") == told


def test_a_pod_that_a_person_deleted_is_replaced_though_it_is_stuck_terminating() -> None:
    sim = running()
    sim.stuck_terminating = True
    [pod] = sim.live(1)
    sim.apply(DeletePod(pod.name, pod.uid))
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert [(p.incarnation, p.deleting) for p in sim.ranks() if p.index == 1] == [(1, True), (2, False)]


def test_a_full_cluster_takes_the_place_of_the_pod_that_is_going() -> None:
    sim = running(nodes=4)
    [pod] = sim.live(1)
    sim.stuck_terminating = True
    sim.apply(DeletePod(pod.name, pod.uid))
    sim.settle()
    assert sim.live(1)[0].node == pod.node


def test_ranks_on_a_deleted_node_move_to_another_and_the_dead_node_is_not_proof_of_death() -> None:
    sim = running()
    gone = sim.live(0)[0]
    sim.nodes = tuple(n for n in sim.nodes if n.name != gone.node)
    decision = sim.step()
    puts = [a for a in decision.actions if isinstance(a, PutWish)]
    assert all(gone.uid not in put.wish.dead_pod_uids for put in puts)
    sim.settle()
    assert sim.live(0)[0].node != gone.node
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_node_that_is_not_ready_is_waited_for_within_its_grace() -> None:
    sim = running()
    name = sim.live(0)[0].node
    sim.nodes = tuple(replace(n, ready=False, not_ready_since=sim.now) if n.name == name else n for n in sim.nodes)
    decision = sim.step()
    assert decision.actions == ()
    assert decision.wake_in == pytest.approx(20.0)
    sim.now += 20
    actions = sim.step().actions
    assert [(a.index, a.incarnation) for a in actions if isinstance(a, CreatePod) and a.gated] == [(0, 2)]
    assert [a.uid for a in actions if isinstance(a, DeletePod)]


def test_a_pod_that_waits_for_a_node_that_was_cordoned_meanwhile_is_replaced() -> None:
    sim = service(nodes=5)
    sim.step()
    sim.step()
    [pod] = sim.live(0)
    sim.pods = [replace(p, scheduled=False) if p.uid == pod.uid else p for p in sim.pods]
    sim.nodes = tuple(replace(n, unschedulable=True) if n.name == pod.node else n for n in sim.nodes)
    sim.step()
    assert [p.incarnation for p in sim.live(0)] == [2]
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.live(0)[0].node != pod.node


def test_several_dead_ranks_are_replaced_together() -> None:
    sim = running(nodes=8)
    for rank in (0, 1, 3):
        sim.kill(rank)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 3


def test_one_of_two_dead_ranks_is_replaced_when_there_is_room_for_one() -> None:
    sim = running(nodes=4)
    lost = sim.live(3)[0].node
    sim.nodes = tuple(n for n in sim.nodes if n.name != lost)
    sim.kill(0)
    sim.settle()
    assert sim.condition("Placed") == ("False", "NoFit")
    assert sim.wish.status["ranks"]["active"] == 3


def test_replacements_of_one_rank_back_off() -> None:
    sim = running()
    created = []
    for _ in range(600):
        sim.kill(1)
        created += [(sim.now, a.name) for a in sim.step().actions if isinstance(a, CreatePod)]
        sim.tick()
    gaps = [round(b[0] - a[0]) for a, b in pairwise(created[1:])]
    assert gaps[0] >= 5
    assert gaps == sorted(gaps)
    assert len(created) < 12


def test_a_used_up_budget_stops_replacing_and_says_so() -> None:
    sim = running(failurePolicy={"maxRestarts": 1})
    sim.kill(1)
    sim.settle()
    sim.now += 100
    sim.kill(2)
    sim.settle()
    assert sim.condition("Degraded") == ("True", "RestartBudgetExhausted")
    assert "1 of 1 restarts used" in sim.message("Ready")
    assert "raise failurePolicy.maxRestarts" in sim.message("Ready")
    edit(sim, failurePolicy={"maxRestarts": 2})
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_lost_coordinator_is_replaced_and_told_the_wish_again_under_no_older_generation() -> None:
    sim = running()
    generation = sim.wish.status["memory"]["wishGeneration"]
    sim.pods = [p for p in sim.pods if p.role != "coordinator"]
    sim.told = None
    sim.step()
    assert sim.condition("Ready") == ("Unknown", "CoordinatorAway")
    assert sim.wish.status["ranks"]["active"] == 4, "the ranks go on without it"
    sim.settle()
    assert sim.told is not None
    assert sim.told.generation >= generation
    assert sim.told.newest_epoch == sim.wish.status["epoch"] > 0, "a new coordinator counts on from there"
    assert sim.condition("Ready") == ("True", "AllActive")


def test_coordinator_and_rank_lost_together_both_come_back() -> None:
    sim = running()
    sim.kill(1)
    sim.pods = [replace(p, phase="Failed") if p.role == "coordinator" else p for p in sim.pods]
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def reattaches(pod: CreatePod) -> bool:
    return {"name": ENV_REATTACH, "value": "1"} in pod.manifest["spec"]["containers"][0]["env"]


def test_only_a_coordinator_that_replaces_one_among_running_pods_is_told_to_reattach() -> None:
    first = service()
    created = [a for _ in range(6) for a in first.step().actions if isinstance(a, CreatePod)]
    assert {a.role for a in created} == {"rank", "coordinator", "gateway"}
    assert not any(reattaches(a) for a in created)

    sim = running()
    sim.pods = [p for p in sim.pods if p.role != "coordinator" and p.index != 1]
    again = [a for a in sim.step().actions if isinstance(a, CreatePod)]
    assert [(a.role, reattaches(a)) for a in again if a.role != "gateway"] == [("rank", False), ("coordinator", True)]


def test_a_killed_pod_is_vouched_dead_to_the_coordinator() -> None:
    sim = running()
    uid = sim.live(2)[0].uid
    sim.kill(2)
    sim.settle()
    assert sim.told is not None
    assert uid in sim.told.dead_pod_uids


def test_a_failure_that_no_restart_mends_is_told_and_nothing_is_churned() -> None:
    sim = running()
    lost = tuple(RankState(rank=p.index, pod_uid=p.uid, phase="Failed") for p in sim.ranks())
    state = RuntimeState(version=9, wish_put=1, epoch=1, ranks=lost, failure="the checkpoint has no expert 3")
    facts = replace(sim.facts(), runtime=state)
    decision = decide(sim.wish, facts, sim.now)
    ready = next(c for c in decision.conditions if c.type == "Ready")
    assert (ready.status, ready.reason, ready.message) == ("False", "RuntimeFailed", "the checkpoint has no expert 3")
    assert not [a for a in decision.actions if isinstance(a, CreatePod | DeletePod)]


def test_a_rank_that_the_runtime_gave_up_is_replaced() -> None:
    sim = running()
    uid = sim.live(2)[0].uid
    state = sim.runtime()
    assert state is not None
    gave_up = [r.model_copy(update={"phase": "Failed"}) if r.pod_uid == uid else r for r in state.ranks]
    decision = decide(
        sim.wish, replace(sim.facts(), runtime=state.model_copy(update={"ranks": tuple(gave_up)})), sim.now
    )
    assert [a.uid for a in decision.actions if isinstance(a, DeletePod)] == [uid]
    assert [(a.index, a.incarnation) for a in decision.actions if isinstance(a, CreatePod)] == [(2, 2)]


def test_members_whose_pods_are_gone_are_vouched_for_though_nobody_saw_them_die() -> None:
    sim = running()
    state = sim.runtime()
    assert state is not None
    left = next(rank for rank in state.ranks if rank.rank == 1)
    seen = state.model_copy(
        update={"ranks": (left,), "member_uids": tuple(rank.pod_uid for rank in state.ranks), "wish_put": None}
    )
    sim.pods = [pod for pod in sim.pods if pod.role != "rank" or pod.index == 1]
    facts = replace(sim.facts(), runtime=seen, put_generation=None)
    [put] = [action for action in decide(sim.wish, facts, sim.now).actions if isinstance(action, PutWish)]
    assert set(put.wish.dead_pod_uids) == set(seen.member_uids) - {left.pod_uid}
