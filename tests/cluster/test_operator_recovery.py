"""Whatever happens to the operator, to the API server's answers or to the resource, the pods end up as wished.

Killed between any two changes, refused with 409 and 429, cut off from answers: it observes and goes on. What belongs to
somebody else is never touched.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Iterator

import pytest

from cluster.controlplane.api import Api
from cluster.controlplane.faults import Proxy
from cluster.controlplane.nodes import kubelets
from cluster.controlplane.start import ControlPlane
from cluster.coordinators import Coordinator
from cluster.documents import drill, job, one_gpu, path_of, service
from cluster.operators import operator
from cluster.waiting import eventually
from cluster.world import Room, World, by_rank, condition, is_running, uids

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("crds")]


@pytest.fixture
def room(cluster: ControlPlane, namespace: str) -> Iterator[Room]:
    """One node with 32 GPUs."""
    with kubelets(cluster) as controls:
        nodes = Room(controls, namespace.rsplit("-", 1)[1])
        nodes.add("a", gpus=32)
        yield nodes


QUICK_LEASE = {"MOERATOR_LEASE_DURATION_S": "3", "MOERATOR_REQUEST_TIMEOUT_S": "1"}


def creations(proxy: Proxy, *, status: int = 201) -> int:
    return sum(seen.method == "POST" and seen.path.endswith("/pods") and seen.status == status for seen in proxy.seen)


@pytest.mark.parametrize("killed_after", [1, 7])
async def test_an_operator_killed_while_it_creates_pods_goes_on_where_it_was(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy, killed_after: int
) -> None:
    with operator(cluster, world.namespace, kubeconfig=proxy.kubeconfig, **QUICK_LEASE) as first:
        proxy.after(r"POST .*/pods$", lambda: first.process.kill() if creations(proxy) >= killed_after else None)
        await world.apply(job(ranks=12))
        await eventually(lambda: asyncio.sleep(0, first.process.is_running), lambda up: not up, what="the kill")
    left = await world.pods()
    assert killed_after <= len(left) < 12, "killed half-way"
    with operator(cluster, world.namespace, **QUICK_LEASE):
        pods = await world.until_running(12, timeout_s=60)
    assert uids(left) <= uids(pods)
    assert by_rank(pods) == {rank: [f"tiny-job-rank-{rank}-1"] for rank in range(12)}


async def test_refusals_and_lost_answers_delay_and_never_double_anything(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy
) -> None:
    proxy.refuse("POST", "/pods$", status=429, times=2, retry_after_s=1)
    proxy.refuse("POST", "/pods$", status=409, times=2)
    proxy.lose_answer("POST", "/pods$", times=2)
    proxy.refuse("PATCH", "/pods/", status=409, times=3)
    proxy.refuse("PATCH", "/pods/", status=429, times=1, retry_after_s=1)
    proxy.lose_answer("PATCH", "/pods/", times=1)
    proxy.refuse("PATCH", "/status$", status=503, times=2)
    proxy.lose_answer("POST", "/configmaps$", times=1)
    with operator(cluster, world.namespace, kubeconfig=proxy.kubeconfig) as running:
        await world.apply(job(ranks=8))
        pods = await world.until_running(8, timeout_s=60)
        await world.until_condition("moejobs", "tiny", "Placed", "True")
        assert by_rank(pods) == {rank: [f"tiny-job-rank-{rank}-1"] for rank in range(8)}
        assert all(fault.times == 0 for fault in proxy.faults), "every fault was met"
        assert running.get("/healthz")[0] == 200
        assert "moerator_reconcile_errors_total{" not in running.get("/metrics")[1]


async def test_an_operator_waits_as_long_as_it_was_told(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy
) -> None:
    with operator(cluster, world.namespace, kubeconfig=proxy.kubeconfig):
        proxy.refuse("POST", "/configmaps$", status=429, times=1, retry_after_s=3)
        start = time.monotonic()
        await world.apply(job(ranks=2))
        await world.until_running(2)
        assert time.monotonic() - start >= 3
        asked = [seen for seen in proxy.seen if seen.method == "POST" and seen.path.endswith("/configmaps")]
        assert [seen.status for seen in asked] == [429, 201]


async def test_a_burst_of_edits_costs_no_pod_that_runs(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy, coordinator: Coordinator
) -> None:
    options = {"kubeconfig": proxy.kubeconfig, "MOERATOR_COORDINATOR_URL": coordinator.url}
    with operator(cluster, world.namespace, **options):
        await world.apply(service(ranks=4))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        before = await world.pods()
        path = path_of("moeservices", world.namespace, "chat")
        for count in range(60):
            await world.api.patch(path, {"spec": {"failurePolicy": {"maxRestarts": 100 + count}}})
        for ranks in (8, 5, 6, 3, 8, 4, 6):
            await world.api.patch(path, {"spec": {"parallelism": {"expert": ranks}}})
        pods = await world.until_running(6)
        await world.until_condition("moeservices", "chat", "Ready", "True", timeout_s=60)
        assert uids(before) <= uids(pods), "members of the group stay"
        assert creations(proxy) <= 4 + 2 + 8, "the last size and at most a few passing ones were acted on"
        writes = sum(seen.method == "PATCH" and seen.path.endswith("chat/status") for seen in proxy.seen)
        assert writes < 60, f"{writes} status writes for 67 edits"


async def test_a_resource_deleted_while_half_created_leaves_nothing(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy
) -> None:
    path = path_of("moejobs", world.namespace, "tiny")
    asked: list[int] = []

    def delete() -> None:
        if creations(proxy) >= 4 and not asked:
            asked.append(creations(proxy))
            cluster.kubectl("delete", "moejob", "tiny", "-n", world.namespace, "--wait=false")

    proxy.after(r"POST .*/pods$", delete)
    with operator(cluster, world.namespace, kubeconfig=proxy.kubeconfig) as running:
        await world.apply(job(ranks=60))
        await eventually(
            lambda: world.api.find(path), lambda seen: creations(proxy) >= 4 and seen is None, what="its end"
        )
        await asyncio.sleep(1)  # what was under way has ended
        for kind in ("pods", "services", "secrets", "expertmaps"):
            listing = path_of(kind, world.namespace)
            await eventually(
                functools.partial(_count, world.api, listing),
                lambda left: left == 0,
                what=f"no {kind}",
                timeout_s=60,
            )
        assert running.get("/healthz")[0] == 200
        made = creations(proxy)
        assert made < 60, "what was not begun when the deletion was seen is not created"
        await asyncio.sleep(1)
        assert creations(proxy) == made


@pytest.mark.parametrize(
    ("plural", "name", "kind"),
    [
        ("configmaps", "tiny-job-config", "ConfigMap"),
        ("pods", "tiny-job-rank-1-1", "Pod"),
        ("secrets", "tiny-job-token", "Secret"),
    ],
)
async def test_a_foreign_object_with_a_childs_name_is_refused_by_name_and_left_alone(  # noqa: PLR0917
    cluster: ControlPlane, world: World, room: Room, plural: str, name: str, kind: str
) -> None:
    foreign = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "labels": {"whose": "mine"}}}
    if kind == "Pod":
        foreign["spec"] = {"containers": [{"name": "main", "image": "none"}]}
    made = await world.api.create(path_of(plural, world.namespace), foreign)
    with operator(cluster, world.namespace):
        await world.apply(job(ranks=2))
        told = await eventually(
            lambda: world.find("moejobs", "tiny"),
            lambda seen: any(
                c["reason"] == "ForeignObject" for c in (seen or {}).get("status", {}).get("conditions", [])
            ),
            what="a condition that says so",
        )
        assert told is not None
        message = next(c["message"] for c in told["status"]["conditions"] if c["reason"] == "ForeignObject")
        assert f"{kind}/{name}" in message or f"{kind} {name}" in message
        seen = await world.find(plural, name)
        assert seen is not None and seen["metadata"]["uid"] == made["metadata"]["uid"]
        assert "ownerReferences" not in seen["metadata"] and seen["metadata"]["labels"] == {"whose": "mine"}
        assert not any(map(is_running, await world.pods())), "nothing runs until the way is free"

        await world.api.delete(path_of(plural, world.namespace, name), grace_s=0)
        await world.until_running(2)
        await world.until_condition("moejobs", "tiny", "Accepted", "True")


async def test_what_the_server_does_not_accept_is_told_in_its_own_words(
    cluster: ControlPlane, world: World, room: Room
) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}}
    made = await world.api.create(f"/api/v1/namespaces/{world.namespace}/resourcequotas", quota)
    await eventually(
        lambda: world.api.get(f"/api/v1/namespaces/{world.namespace}/resourcequotas/few"),
        lambda seen: "used" in seen.get("status", {}),
        what="the quota in force",
    )
    with operator(cluster, world.namespace):
        await world.apply(job(ranks=2))
        events = f"/apis/events.k8s.io/v1/namespaces/{world.namespace}/events"
        told = await eventually(
            lambda: world.api.get(events),
            lambda listing: any(e["reason"] == "Refused" for e in listing["items"]),
            what="the event",
        )
        note = next(e["note"] for e in told["items"] if e["reason"] == "Refused")
        assert re.search(r"exceeded quota: few.*limited: pods=1", note)
        placed = await world.until_condition("moejobs", "tiny", "Placed", "False", reason="Refused")
        assert "exceeded quota: few" in placed["message"]
        await world.until_condition("moejobs", "tiny", "Progressing", "False", reason="Refused")
        await world.api.delete(f"/api/v1/namespaces/{world.namespace}/resourcequotas/{made['metadata']['name']}")
        await world.until_running(2, timeout_s=60)
        await world.until_condition("moejobs", "tiny", "Placed", "True")


async def test_a_running_group_whose_successor_is_over_quota_says_so_and_heals_when_there_is_room(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await world.apply(service(ranks=3))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        quota = {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "few"},
            "spec": {"hard": {"pods": "0"}},
        }
        quotas = f"/api/v1/namespaces/{world.namespace}/resourcequotas"
        await world.api.create(quotas, quota)
        await eventually(
            lambda: world.api.get(f"{quotas}/few"), lambda seen: "used" in seen.get("status", {}), what="the quota"
        )
        room.controls.fail_pod(world.namespace, "chat-svc-rank-1-1")
        await world.until_condition("moeservices", "chat", "Progressing", "False", reason="Refused")
        seen = await world.find("moeservices", "chat")
        assert condition(seen, "Ready")["reason"] == "RankLost", "an object whose ranks die is not called ready"
        assert "exceeded quota: few" in condition(seen, "Placed")["message"]
        await world.api.delete(f"{quotas}/few")
        await world.until_condition("moeservices", "chat", "Ready", "True", timeout_s=60)
        assert condition(await world.find("moeservices", "chat"), "Progressing")["reason"] == "Stable"


async def test_a_busy_service_does_not_write_a_status_for_every_report(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy, coordinator: Coordinator
) -> None:
    options = {"kubeconfig": proxy.kubeconfig, "MOERATOR_COORDINATOR_URL": coordinator.url}
    with operator(cluster, world.namespace, **options):
        await world.apply(service(ranks=2))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        coordinator.is_busy = True
        try:
            await asyncio.sleep(2)
            before = _status_writes(proxy)
            await asyncio.sleep(11)
            written = _status_writes(proxy) - before
        finally:
            coordinator.is_busy = False
    assert 1 <= written <= 4, "one in five seconds, for some fifty reports"


def _status_writes(proxy: Proxy) -> int:
    return sum(seen.method == "PATCH" and seen.path.endswith("/moeservices/chat/status") for seen in proxy.seen)


async def test_a_pod_template_that_the_server_calls_invalid_takes_the_acceptance_back(
    cluster: ControlPlane, world: World, room: Room
) -> None:
    template = one_gpu()
    template["spec"]["resources"]["limits"]["cpu"] = "500m"  # less than is requested: only a pod's own rules forbid it
    with operator(cluster, world.namespace):
        await world.apply(job(ranks=2, template=template))
        told = await world.until_condition("moejobs", "tiny", "Accepted", "False", reason="Refused")
        assert re.search(r"Pod tiny-job-rank-0-1 was refused: 422 .*must be less than or equal", told["message"])
        assert await world.pods() == []


async def test_a_drill_that_the_coordinator_refuses_ends_at_once(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    coordinator.forbids_faults = True
    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await world.apply(service(ranks=2, drills="Allowed"))
        await world.until_condition("moeservices", "chat", "Ready", "True")
        await world.apply(drill("ouch", target="chat", rank=1))
        told = await world.until_condition("moedrills", "ouch", "Complete", "True", timeout_s=10)
    coordinator.forbids_faults = False
    assert told["reason"] == "Refused"
    assert told["message"].endswith("refused the fault: 403 faults are not enabled for this object")
    assert [fault for fault in coordinator.faults if fault.fault == "kill"] == []


async def test_an_operator_whose_watch_stalls_says_so_on_healthz(
    cluster: ControlPlane, world: World, room: Room, proxy: Proxy
) -> None:
    with operator(cluster, world.namespace, kubeconfig=proxy.kubeconfig, MOERATOR_WATCH_TIMEOUT_S="2") as running:
        await asyncio.sleep(3)
        assert running.get("/healthz") == (200, "ok\n"), "quiet watches that are renewed are healthy"
        stalled = proxy.hang("GET", "/pods$", times=1000)
        seen = await eventually(
            lambda: asyncio.to_thread(running.get, "/healthz"),
            lambda answer: answer[0] == 503,
            what="503",
            timeout_s=40,
        )
        assert re.search(r"the watch of /api/v1/\S*pods was last answered \d+ s ago", seen[1])
        stalled.times = 0


async def _count(api: Api, path: str) -> int:
    return len((await api.get(path))["items"])
