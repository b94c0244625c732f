"""MoEService in a simulated cluster: start, lose ranks, resize."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from moe_core.contract.exchange import RankState, RuntimeState
from moe_core.contract.runtime_config import ENV_REATTACH
from moe_core.decide import decide
from moe_core.facts import BindPod, CreatePod, DeletePod, NodeFact, PutWish, Taint
from simcluster import Sim, edit, gpu_nodes, gpu_template, make, service_spec


def service(ranks: int = 4, nodes: int = 6, **more: Any) -> Sim:
    return make("MoEService", service_spec(ranks, template=gpu_template(), **more), gpu_nodes(nodes))


def running(ranks: int = 4, nodes: int = 6, *, staging_ticks: int = 0, **more: Any) -> Sim:
    sim = service(ranks, nodes, **more)
    sim.staging_ticks = staging_ticks
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    return sim


def test_a_service_starts_and_says_so() -> None:
    sim = running()
    assert sim.wish.status["ranks"] == {"desired": 4, "allocated": 4, "available": 4, "active": 4}
    assert sim.condition("ExpertCoverage") == ("True", "FullCoverage")
    assert sim.condition("Degraded") == ("False", "Stable")
    assert sim.condition("Progressing") == ("False", "Stable")
    assert sim.wish.status["expertCoveragePercent"] == 100
    assert sim.wish.status["observedGeneration"] == 1


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


def test_a_gang_that_does_not_fit_stays_gated_and_says_what_is_missing() -> None:
    sim = service(nodes=3)
    sim.settle()
    assert sim.ever_bound == []
    assert [p.role for p in sim.pods] == ["rank"] * 4, "neither coordinator nor gateway may hold room before"
    assert sim.condition("Placed") == ("False", "NoFit")
    assert sim.message("Placed").startswith("needs room for 4 ranks in the cluster; best is 3")
    sim.nodes = gpu_nodes(4)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_gang_that_would_take_the_last_room_of_its_own_coordinator_is_not_started() -> None:
    template = {"spec": {"resources": {"requests": {"cpu": "1"}}}}
    sim = make(
        "MoEService", service_spec(template=template), [NodeFact("n0", allocatable={"cpu": 4000, "memory": 2**35})]
    )
    sim.settle()
    assert sim.ever_bound == []
    assert "beside them 3 pods of coordinator and gateways need cpu 100m, memory 768Mi each" in sim.message("Placed")
    sim.nodes = (NodeFact("n0", allocatable={"cpu": 4300, "memory": 2**35}),)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_group_of_which_nothing_is_left_starts_again_all_or_none() -> None:
    sim = running(nodes=4)
    for rank in range(4):
        sim.kill(rank)
    sim.nodes = gpu_nodes(3)
    before = len(sim.ever_bound)
    for _ in range(20):
        sim.step()
        sim.tick(30)
    assert len(sim.ever_bound) == before
    assert sim.condition("Placed") == ("False", "NoFit")
    sim.nodes = gpu_nodes(4)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_gang_that_was_half_started_gives_its_room_back_when_the_rest_finds_none() -> None:
    sim = service(nodes=4)
    sim.step()
    sim.step(crash_after=2)
    sim.nodes = gpu_nodes(2)
    assert len([p for p in sim.ranks() if p.node]) == 2
    sim.step()
    sim.now += 61
    sim.settle()
    assert [p for p in sim.ranks() if p.node] == []
    assert len(sim.ranks()) == 4
    sim.nodes = gpu_nodes(4)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


def test_all_ranks_are_bound_in_one_cycle_once_all_exist() -> None:
    sim = service()
    created = sim.step()
    assert sum(isinstance(a, CreatePod) and a.gated for a in created.actions) == 4
    assert not [a for a in created.actions if isinstance(a, BindPod)]
    bound = [a for a in sim.step().actions if isinstance(a, BindPod)]
    assert len(bound) == 4
    assert len({a.node for a in bound}) == 4


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


def test_a_vanished_pod_is_not_forgotten() -> None:
    sim = running()
    sim.pods = [p for p in sim.pods if not (p.role == "rank" and p.index == 3)]
    sim.settle()
    assert [p.incarnation for p in sim.live(3)] == [2]
    assert sim.wish.status["restarts"] == 1


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


def test_growing_starts_new_pods_first_and_then_tells_the_group() -> None:
    sim = running(nodes=8)
    edit(sim, parallelism={"expert": 6})
    told_before = sim.told
    while len(sim.live(5)) == 0 or sim.live(5)[0].phase != "Running":
        assert sim.told == told_before, "the map of six must wait until six run"
        assert sim.condition("Ready")[0] in ("True", "False")
        sim.step()
        sim.tick()
    sim.settle()
    assert sim.told is not None
    assert sim.told.ranks == (0, 1, 2, 3, 4, 5)
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


def test_growing_without_room_leaves_the_service_as_it_is() -> None:
    sim = running(nodes=5)
    edit(sim, parallelism={"expert": 6})
    sim.settle()
    assert len(sim.members) == 4
    assert all(p.gated for p in sim.ranks() if p.index >= 4), "the joiners come all or none"
    assert sim.condition("Placed") == ("False", "NoFit")
    assert sim.condition("Degraded") == ("False", "Stable")
    assert sim.condition("Ready") == ("False", "Resizing")


def test_shrinking_tells_the_group_first_and_deletes_pods_only_when_their_ranks_are_out() -> None:
    sim = running()
    edit(sim, parallelism={"expert": 3})
    actions = sim.step().actions
    assert [type(a) for a in actions if isinstance(a, PutWish | DeletePod)] == [PutWish]
    assert sim.live(3), "still a member: its pod stays"
    sim.settle()
    assert not [p for p in sim.ranks() if p.index == 3]
    assert sorted(sim.members) == [0, 1, 2]
    assert sim.condition("ExpertCoverage") == ("True", "FullCoverage")
    assert sim.wish.status["restarts"] == 0


def test_shrinking_waits_while_no_coordinator_answers() -> None:
    sim = running()
    sim.pods = [replace(p, phase="Pending", node=None) if p.role == "coordinator" else p for p in sim.pods]
    edit(sim, parallelism={"expert": 3})
    assert not [a for a in sim.step().actions if isinstance(a, DeletePod)]


def test_growing_again_before_the_leaver_is_gone_keeps_it() -> None:
    sim = running(staging_ticks=10)
    uid = sim.live(3)[0].uid
    edit(sim, parallelism={"expert": 3})
    for _ in range(3):
        sim.step()
        sim.tick()
    state = sim.runtime()
    assert state is not None
    assert [(rank.rank, rank.phase) for rank in state.ranks if rank.phase != "Active"] == [(3, "Draining")]
    assert sim.condition("Ready") == ("False", "Resizing")
    edit(sim, parallelism={"expert": 4})
    sim.settle()
    assert sim.live(3)[0].uid == uid
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


def test_shrinking_and_growing_counts_no_restart() -> None:
    sim = running()
    for size in (2, 5, 3, 4):
        edit(sim, parallelism={"expert": size})
        sim.settle()
        assert sim.condition("Ready") == ("True", "AllActive"), size
    assert sim.wish.status["restarts"] == 0


def test_more_copies_per_rank_change_the_map_and_no_pod() -> None:
    sim = running()
    uids = {p.uid for p in sim.pods}
    digest = sim.wish.status["mapDigest"]
    edit(sim, experts={"redundantPerRank": 4})
    sim.settle()
    assert {p.uid for p in sim.pods} == uids
    assert sim.wish.status["mapDigest"] != digest


def test_more_gateways_come_and_go_without_touching_ranks() -> None:
    sim = running()
    edit(sim, gateway={"replicas": 4})
    sim.settle()
    assert len([p for p in sim.pods if p.role == "gateway"]) == 4
    edit(sim, gateway={"replicas": 1})
    sim.settle()
    assert [p.index for p in sim.pods if p.role == "gateway"] == [0]
    assert sim.wish.status["restarts"] == 0


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


def test_what_holds_up_a_start_is_told() -> None:
    sim = service()
    sim.step()
    sim.step()
    sim.pods = [replace(p, message="ErrImagePull: no such image") if p.index == 2 else p for p in sim.pods]
    sim.step()
    assert sim.message("Ready") == (
        "0 of 4 ranks running, none active yet; tiny-svc-rank-2-1: ErrImagePull: no such image"
    )


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


def test_suspending_removes_every_pod_and_resuming_counts_no_restart() -> None:
    sim = running()
    edit(sim, suspend=True)
    sim.settle()
    assert sim.pods == []
    assert sim.condition("Ready") == ("False", "Suspended")
    sim.epoch, sim.members, sim.told = 0, {}, None
    edit(sim, suspend=False)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


def test_a_tainted_node_is_not_used_and_is_told() -> None:
    sim = service(nodes=4)
    sim.nodes = (*sim.nodes[:3], replace(sim.nodes[3], taints=(Taint("gpu", "reserved"),)))
    sim.settle()
    assert "taint gpu=reserved 1" in sim.message("Placed")


def test_a_group_whose_ranks_report_one_after_the_other_has_lost_nobody() -> None:
    sim = service()
    for _ in range(3):
        sim.step()
        sim.tick()
    state = sim.runtime()
    assert state is not None
    first = state.ranks[0].model_copy(update={"phase": "Active"})
    others = [r.model_copy(update={"phase": "Ready"}) for r in state.ranks[1:]]
    state = state.model_copy(update={"epoch": 1, "ranks": (first, *others)})
    decision = decide(sim.wish, replace(sim.facts(), runtime=state), sim.now)
    told = {c.type: (c.status, c.reason) for c in decision.conditions}
    assert told["Ready"] == ("False", "Forming")
    assert told["Degraded"][0] == "False"


def test_events_come_on_transitions_only() -> None:
    sim = running()
    sim.step()
    assert sim.step().events == ()
    sim.kill(1)
    reasons = [event.reason for event in sim.step().events]
    assert "RankReplaced" in reasons
    sim.step()
    assert "RankReplaced" not in [event.reason for event in sim.step().events]


def forgotten(*, coordinator: str) -> Sim:
    """A group that serves, whose status was never written; a rank is lost and finds no room; a minute has passed."""
    sim = running(4, nodes=4)
    sim.wish = replace(sim.wish, status={})
    sim.pods = [pod for pod in sim.pods if pod.index != 3 or pod.role != "rank"]
    sim.nodes = sim.nodes[:3]
    if coordinator != "answers":
        sim.pods = [pod for pod in sim.pods if pod.role != "coordinator"]
    sim.step()
    sim.now += 100
    if coordinator == "has just started":
        sim.tick()
        state = sim.runtime()
        assert state is not None and state.epoch == 0, "it has heard of no rank yet"
    return sim


@pytest.mark.parametrize("coordinator", ["answers", "is away", "has just started"])
def test_a_group_that_serves_is_never_taken_for_one_that_was_half_started(coordinator: str) -> None:
    sim = forgotten(coordinator=coordinator)
    members = set(sim.members.values())
    assert len(members) >= 3
    deleted = {action.uid for action in sim.step().actions if isinstance(action, DeletePod)}
    assert not deleted & members


@pytest.mark.parametrize("coordinator", ["answers", "is away", "has just started"])
def test_no_member_beyond_the_wished_size_is_deleted_on_a_forgotten_status(coordinator: str) -> None:
    sim = forgotten(coordinator=coordinator)
    edit(sim, parallelism={"expert": 2})
    deleted = {action.uid for action in sim.step().actions if isinstance(action, DeletePod)}
    assert not deleted & set(sim.members.values())


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
