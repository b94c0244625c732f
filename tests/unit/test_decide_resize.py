"""MoEService in a simulated cluster: it grows and shrinks, and forgets nobody."""

from dataclasses import replace

import pytest

from moe_core.facts import CreatePod, DeletePod, PutWish
from simcluster import Sim, edit, running


def test_a_vanished_pod_is_not_forgotten() -> None:
    sim = running()
    sim.pods = [p for p in sim.pods if not (p.role == "rank" and p.index == 3)]
    sim.settle()
    assert [p.incarnation for p in sim.live(3)] == [2]
    assert sim.wish.status["restarts"] == 1


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


def test_a_leaver_on_a_node_that_is_gone_is_asked_to_go_before_its_successor_is_created() -> None:
    sim = running(4, 9)
    edit(sim, parallelism={"expert": 3})
    sim.refuses = lambda action: isinstance(action, DeletePod)
    for _ in range(4):
        sim.step()
        sim.tick()
    leaver = next(pod for pod in sim.ranks() if pod.index == 3)
    sim.nodes = tuple(node for node in sim.nodes if node.name != leaver.node)
    sim.step()
    edit(sim, parallelism={"expert": 4})
    actions = sim.decision().actions
    gone = next(i for i, a in enumerate(actions) if isinstance(a, DeletePod) and a.uid == leaver.uid)
    made = next(i for i, a in enumerate(actions) if isinstance(a, CreatePod) and a.index == 3)
    assert gone < made


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
