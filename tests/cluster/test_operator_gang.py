"""A gang is placed whole or not at all, and comes back from what clusters do to its pods and nodes.

The operator runs as its own process as a user would start it, kube-apiserver, controllers and scheduler are real, nodes
are simulated, and a small server answers where a coordinator would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from cluster.controlplane.nodes import kubelets
from cluster.controlplane.start import ControlPlane
from cluster.coordinators import Coordinator
from cluster.documents import GPU, job, path_of, service
from cluster.operators import Operator, operator
from cluster.world import Room, World, by_rank, is_gated, is_going, is_running, uids

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("crds")]


@pytest.fixture
def room(cluster: ControlPlane, namespace: str) -> Iterator[Room]:
    """Two nodes, a and b, with two GPUs each."""
    with kubelets(cluster) as controls:
        nodes = Room(controls, namespace.rsplit("-", 1)[1])
        nodes.add("ab")
        yield nodes


@pytest.fixture
def running(cluster: ControlPlane, crds: object, namespace: str, coordinator: Coordinator) -> Iterator[Operator]:
    with operator(cluster, namespace, MOERATOR_COORDINATOR_URL=coordinator.url) as process:
        yield process


async def test_a_gang_that_does_not_fit_stays_whole_says_why_and_runs_once_a_node_appears(
    world: World, room: Room, running: Operator
) -> None:
    await world.apply(job(ranks=6))
    placed = await world.until_condition("moejobs", "tiny", "Placed", "False", reason="NoFit")
    assert placed["message"].startswith("needs room for 6 ranks")
    assert " 4" in placed["message"], "how many would fit is part of the answer"
    waiting = await world.until_pods(lambda pods: len(pods) == 6, what="6 pods behind the gate")
    assert all(map(is_gated, waiting))
    assert await world.pods("coordinator") == [], "a gang that waits takes no room at all"

    room.add("c")
    together = await world.until_running(6)
    assert uids(together) == uids(waiting)
    assert sorted(room.letters(together)) == ["a", "a", "b", "b", "c", "c"]
    assert (await world.until_condition("moejobs", "tiny", "Placed", "True"))["reason"] == "Placed"


async def test_a_service_whose_ranks_are_all_active_is_ready(
    world: World, room: Room, running: Operator, coordinator: Coordinator
) -> None:
    await world.apply(service())
    await world.until_condition("moeservices", "chat", "Ready", "True", reason="AllActive")
    wish = coordinator.wishes[f"{world.namespace}/chat"][-1]
    assert wish.ranks == (0, 1, 2, 3)
    emap = await world.find("expertmaps", "chat-svc-map")
    assert emap is not None and emap["spec"]["digest"] == wish.expert_map.digest
    seen = await world.find("moeservices", "chat")
    assert seen is not None and "finalizers" not in seen["metadata"]
    assert not any("kopf" in name for name in seen["metadata"].get("annotations", {}))


async def test_a_killed_rank_is_replaced_and_its_peers_stay(world: World, room: Room, running: Operator) -> None:
    await world.apply(service())
    await world.until_condition("moeservices", "chat", "Ready", "True")
    before = await world.pods()
    room.controls.fail_pod(world.namespace, "chat-svc-rank-1-1")
    after = await world.until_pods(
        lambda pods: len(pods) == 4 and all(map(is_running, pods)) and uids(pods) != uids(before),
        what="the replacement",
    )
    assert by_rank(after)[1] == ["chat-svc-rank-1-2"]
    assert len(uids(after) & uids(before)) == 3
    await world.until_condition("moeservices", "chat", "Ready", "True")


async def test_ranks_of_a_node_that_is_not_ready_move_to_another(world: World, room: Room, running: Operator) -> None:
    room.add("c")
    await world.apply(service())
    first = await world.until_running(4)
    lost_node = first[1]["spec"]["nodeName"]
    lost = [pod for pod in first if pod["spec"]["nodeName"] == lost_node]
    room.controls.silence_node(lost_node)
    after = await world.until_pods(
        lambda pods: sum(is_running(p) and p["spec"].get("nodeName") != lost_node for p in pods) == 4,
        what="4 ranks on living nodes",
        timeout_s=60,
    )
    kept = uids(first) - uids(lost)
    assert kept <= uids(after)
    assert all(is_going(pod) for pod in after if pod["metadata"]["uid"] in uids(lost)), "asked to go, and still there"


async def test_ranks_of_a_deleted_node_move_to_another(world: World, room: Room, running: Operator) -> None:
    room.add("c")
    await world.apply(service())
    first = await world.until_running(4)
    gone = first[0]["spec"]["nodeName"]
    room.controls.delete_node(gone)
    after = await world.until_pods(
        lambda pods: sum(is_running(p) and p["spec"].get("nodeName") != gone for p in pods) == 4,
        what="4 ranks on living nodes",
        timeout_s=45,
    )
    stayed = uids([pod for pod in first if pod["spec"]["nodeName"] != gone])
    assert stayed <= uids(after)


async def test_a_pod_stuck_terminating_does_not_hold_up_its_successor(
    world: World, room: Room, running: Operator
) -> None:
    room.add("c")
    await world.apply(service())
    before = await world.until_running(4)
    room.controls.hang_deletion(world.namespace, "chat-svc-rank-2-1")
    await world.api.delete(path_of("pods", world.namespace, "chat-svc-rank-2-1"))
    after = await world.until_pods(
        lambda pods: len([p for p in pods if is_running(p)]) == 4, what="4 running ranks beside the one that hangs"
    )
    assert by_rank(after)[2] == ["chat-svc-rank-2-1", "chat-svc-rank-2-2"]
    assert len(uids(before) & uids(after)) == 4
    room.controls.hang_deletion(world.namespace, "chat-svc-rank-2-1", False)
    await world.until_running(4)


async def test_two_gangs_that_want_the_same_room_never_hold_half_each(
    world: World, room: Room, running: Operator
) -> None:
    for name in ("left", "right"):
        await world.apply(job(name, ranks=4))
    pods = await world.until_pods(
        lambda pods: sum(map(is_running, pods)) == 4 and len(pods) == 8, what="one whole gang"
    )
    winners = {pod["metadata"]["labels"]["moerator.dev/owner-name"] for pod in pods if is_running(pod)}
    assert len(winners) == 1
    assert all(is_gated(pod) for pod in pods if not is_running(pod))
    loser = ({"left", "right"} - winners).pop()
    await world.until_condition("moejobs", loser, "Placed", "False", reason="NoFit")
    await world.api.delete(path_of("moejobs", world.namespace, winners.pop()))
    await world.until_running(4)


async def test_what_another_namespace_takes_of_a_node_is_not_free(
    cluster: ControlPlane, world: World, room: Room, running: Operator
) -> None:
    neighbour = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"neighbour-{room.name('a')}"},
        "spec": {
            "nodeName": room.name("a"),
            "containers": [
                {"name": "main", "image": "none", "resources": {"requests": {GPU: "2"}, "limits": {GPU: "2"}}}
            ],
        },
    }
    await world.api.create(path_of("pods", "default"), neighbour)
    await asyncio.sleep(1)
    await world.apply(job(ranks=4))
    placed = await world.until_condition("moejobs", "tiny", "Placed", "False", reason="NoFit")
    assert "in use 2" in placed["message"]
    assert all(map(is_gated, await world.pods()))
    await world.api.delete(path_of("pods", "default", f"neighbour-{room.name('a')}"), grace_s=0)
    await world.until_running(4)
