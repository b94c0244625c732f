"""The operator's ordinary life: both ways to start it, drift, resizing, a restart, and what it asks of the server."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.controlplane.faults import Proxy
from cluster.controlplane.nodes import kubelets
from cluster.controlplane.start import ControlPlane
from cluster.coordinators import Coordinator
from cluster.documents import drill, job, path_of, service
from cluster.operators import Operator, operator
from cluster.waiting import eventually
from cluster.world import Room, World, by_rank, is_running, uids

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("crds")]


@pytest.fixture
def room(cluster: ControlPlane, namespace: str) -> Iterator[Room]:
    """Two nodes with 4 GPUs each."""
    with kubelets(cluster) as controls:
        nodes = Room(controls, namespace.rsplit("-", 1)[1])
        nodes.add("ab", gpus=4)
        yield nodes


async def test_kopf_run_starts_it_for_the_whole_cluster_and_sigterm_ends_it_in_order(
    cluster: ControlPlane, world: World, room: Room
) -> None:
    kopf = Path(sys.executable).with_name("kopf")
    command = (kopf, "run", "--all-namespaces", "--quiet", "-m", "moe_operator.main")
    running = Operator(cluster, [], command=command, MOERATOR_OPERATOR_NAMESPACE=world.namespace)
    try:
        await asyncio.to_thread(running.start)
        await world.apply(job(ranks=2))
        await world.until_running(2)
        assert 'moerator_resources{kind="MoEJob"}' in running.get("/metrics")[1]
        assert await asyncio.to_thread(running.process.terminate) == 0
    finally:
        running.process.kill()
    lease = await world.api.get(f"/apis/coordination.k8s.io/v1/namespaces/{world.namespace}/leases/moerator-operator")
    assert "holderIdentity" not in lease["spec"], "given back"


async def test_bad_settings_end_it_with_a_sentence(cluster: ControlPlane, namespace: str) -> None:
    running = Operator(cluster, [namespace], MOERATOR_LEASE_DURATION_S="soon")
    running.process.start()
    await eventually(lambda: asyncio.sleep(0, running.process.is_running), lambda up: not up, what="its end")
    assert "MOERATOR_LEASE_DURATION_S must be a positive number of seconds (got 'soon')" in running.log()
    assert "Traceback" not in running.log()


async def test_children_that_are_deleted_or_changed_come_back_as_they_were(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await world.apply(service(ranks=2))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        before = {kind: await world.find(kind, name) for kind, name in CHILDREN}
        for kind, name in CHILDREN:
            await world.api.delete(path_of(kind, world.namespace, name))
        for kind, name in CHILDREN:
            again = await eventually(
                functools.partial(world.find, kind, name),
                lambda seen: seen is not None,
                what=f"{kind} {name}",
            )
            old = before[kind]
            assert again is not None and old is not None
            assert again["metadata"]["uid"] != old["metadata"]["uid"]
            assert again.get("data") == old.get("data")
        await world.until_condition("moeservices", "chat", "Ready", "True")


CHILDREN = (("configmaps", "chat-svc-config"), ("services", "chat-svc-coordinator"), ("expertmaps", "chat-svc-map"))


async def test_the_expert_map_says_what_is_applied_and_what_it_covers(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await world.apply(service(ranks=2))
        seen = await eventually(
            lambda: world.find("expertmaps", "chat-svc-map"),
            lambda seen: bool(seen and seen.get("status", {}).get("appliedDigest")),
            what="the status of the map",
        )
    assert seen is not None
    assert seen["status"].pop("epoch") >= 1
    assert seen["status"] == {
        **{"appliedDigest": seen["spec"]["digest"]},
        **{"coveredExperts": 64, "totalExperts": 64, "coveragePercent": 100},
    }
    table = cluster.kubectl("get", "emap", "-n", world.namespace).splitlines()
    assert table[0].split() == ["NAME", "GENERATION", "DIGEST", "APPLIED", "COVERAGE%", "AGE"]
    assert table[1].split()[2:5] == [seen["spec"]["digest"], seen["spec"]["digest"], "100"]


async def test_network_policies_close_a_group_and_go_when_the_operator_is_told_so(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    options = {"MOERATOR_COORDINATOR_URL": coordinator.url}
    with operator(cluster, world.namespace, MOERATOR_NETWORK_POLICY="on", **options) as first:
        await world.apply(service(ranks=2))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        await asyncio.to_thread(first.process.terminate)
    path = f"/apis/networking.k8s.io/v1/namespaces/{world.namespace}/networkpolicies"
    made = {policy["metadata"]["name"]: policy for policy in (await world.api.get(path))["items"]}
    assert sorted(made) == ["chat-svc-network", "chat-svc-network-coordinator", "chat-svc-network-gateway"]
    assert made["chat-svc-network-gateway"]["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    with operator(cluster, world.namespace, **options):
        await eventually(lambda: world.api.get(path), lambda listing: listing["items"] == [], what="no policy")


async def test_a_service_is_scaled_out_and_in_by_kubectl_scale(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await world.apply(service(ranks=2))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        two = await world.pods()
        cluster.kubectl("scale", "moeservice", "chat", "--replicas=4", "-n", world.namespace)
        four = await world.until_running(4)
        assert uids(two) <= uids(four)
        await world.until_condition("moeservices", "chat", "Ready", "True")
        cluster.kubectl("scale", "moeservice", "chat", "--replicas=2", "-n", world.namespace)
        await world.until_running(2)
        await world.until_condition("moeservices", "chat", "Ready", "True")
        left = await world.pods()
        assert sorted(by_rank(left)) == [0, 1] and uids(left) == uids(two)
        wishes = coordinator.wishes[f"{world.namespace}/chat"]
        assert [len(wish.ranks) for wish in wishes][-1] == 2
        assert max(len(wish.ranks) for wish in wishes) == 4


async def test_suspending_a_job_removes_its_pods_and_resuming_brings_new_ones(
    cluster: ControlPlane, world: World, room: Room
) -> None:
    with operator(cluster, world.namespace):
        await world.apply(job(ranks=2))
        first = await world.until_running(2)
        path = path_of("moejobs", world.namespace, "tiny")
        await world.api.patch(path, {"spec": {"suspend": True}})
        await world.until_condition("moejobs", "tiny", "Suspended", "True")
        await world.until_pods(lambda pods: pods == [], what="no pod")
        await world.api.patch(path, {"spec": {"suspend": False}})
        again = await world.until_running(2)
        assert not uids(first) & uids(again)


async def test_a_drill_kills_a_rank_once_and_tells_how_it_went(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    coordinator.on_fault = room.controls.fail_pod
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await world.apply(service(ranks=2, drills="Allowed"))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        await world.apply(drill("ouch", target="chat", rank=1))
        verdict = await world.until_condition("moedrills", "ouch", "Complete", "True", timeout_s=60)
    assert verdict["reason"] == "DrillPassed", verdict["message"]
    mine = [fault for fault in coordinator.faults if fault.fault == "kill"]
    assert len(mine) == 1
    assert by_rank(await world.pods())[1] == ["chat-svc-rank-1-2"]


async def test_a_restart_changes_nothing_and_writes_nothing(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy, coordinator: Coordinator
) -> None:
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url) as first:
        await world.apply(service(ranks=4))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        await world.until_condition("moeservices", "chat", "Degraded", "False", reason="Stable")
        await asyncio.to_thread(first.process.terminate)
    before = await world.find("moeservices", "chat")
    options = {"kubeconfig": proxy.kubeconfig, "MOERATOR_COORDINATOR_URL": coordinator.url}
    with operator(cluster, world.namespace, **options) as second:
        await eventually(lambda: asyncio.to_thread(lambda: second.is_leader), bool, what="it leads")
        await asyncio.sleep(3)
        changes = [
            seen
            for seen in proxy.seen
            if seen.method not in ("GET",) and "/leases" not in seen.path and seen.status < 300
        ]
        after = await world.find("moeservices", "chat")
    assert before is not None and after is not None
    assert after["status"]["conditions"] == before["status"]["conditions"]
    assert [f"{seen.method} {seen.path}" for seen in changes] == []


async def test_a_cycle_asks_for_no_list(cluster: ControlPlane, world: World, room: Room, proxy: Proxy) -> None:
    with operator(cluster, world.namespace, kubeconfig=proxy.kubeconfig) as running:
        await eventually(lambda: asyncio.to_thread(lambda: running.is_leader), bool, what="it leads")
        await world.apply(job("j0", ranks=2))  # decided on only after everything was listed once
        await world.until_pods(lambda pods: len(pods) == 2 and all(map(is_running, pods)), what="the first job")
        lists = [seen.path for seen in proxy.seen if seen.is_list]
        for number in (1, 2):
            await world.apply(job(f"j{number}", ranks=2))
        await world.until_pods(lambda pods: len(pods) == 6 and all(map(is_running, pods)), what="three jobs")
        assert [seen.path for seen in proxy.seen if seen.is_list] == lists


async def test_a_ghost_that_a_broken_watch_left_is_found_by_the_resync(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy
) -> None:
    options = {"kubeconfig": proxy.kubeconfig, "MOERATOR_WATCH_TIMEOUT_S": "2", "MOERATOR_RESYNC_S": "2"}
    with operator(cluster, world.namespace, **options):
        await world.apply(job(ranks=2))
        before = await world.until_running(2)
        proxy.hang("GET", "/pods$", times=1)  # the next watch of pods brings nothing, as one that lost an event
        await asyncio.sleep(2.5)
        await world.api.delete(path_of("pods", world.namespace, "tiny-job-rank-0-1"), grace_s=0)
        after = await world.until_running(2)
        assert by_rank(after)[0] == ["tiny-job-rank-0-2"] and len(uids(before) & uids(after)) == 1
