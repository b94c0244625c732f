"""The control plane and the simulated nodes behave as a cluster does: the ground under every other cluster test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.controlplane.api import JSON_PATCH, Api, ApiError, Object
from cluster.controlplane.nodes import KubeletControls, Node, kubelets
from cluster.controlplane.process import StartError
from cluster.controlplane.start import ControlPlane, Settings, control_plane
from cluster.waiting import eventually

pytestmark = pytest.mark.cluster

GATE = "moerator.dev/placement"


@pytest.fixture
def nodes(cluster: ControlPlane) -> Iterator[KubeletControls]:
    two = [Node(f"n{i}", {"rack": f"r{i}"}, {"nvidia.com/gpu": "8"}) for i in range(2)]
    with kubelets(cluster, two, heartbeat_s=1.5) as controls:
        yield controls


def pod(name: str, *, gpus: int = 1, gated: bool = False) -> Object:
    container = {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    spec: Object = {"containers": [container], "restartPolicy": "Never"}
    if gated:
        spec["schedulingGates"] = [{"name": GATE}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def phase(seen: Object | None) -> str:
    return str(seen["status"]["phase"]) if seen else "gone"


def condition(seen: Object | None, kind: str) -> Object:
    return next((c for c in (seen or {}).get("status", {}).get("conditions", []) if c["type"] == kind), {})


async def test_a_gated_pod_waits_and_runs_where_it_is_sent_once_ungated(
    api: Api, namespace: str, nodes: KubeletControls
) -> None:
    pods = f"/api/v1/namespaces/{namespace}/pods"
    await api.create(pods, pod("rank-0", gated=True))
    waiting = await eventually(
        lambda: api.find(f"{pods}/rank-0"), lambda seen: bool(condition(seen, "PodScheduled")), what="PodScheduled"
    )
    assert condition(waiting, "PodScheduled")["reason"] == "SchedulingGated"
    assert waiting is not None and "nodeName" not in waiting["spec"]

    bind = [
        {"op": "add", "path": "/spec/nodeSelector", "value": {"kubernetes.io/hostname": "n1"}},
        {"op": "remove", "path": "/spec/schedulingGates/0"},
    ]
    await api.patch(f"{pods}/rank-0", bind, JSON_PATCH)
    running = await eventually(lambda: api.find(f"{pods}/rank-0"), lambda seen: phase(seen) == "Running")
    assert running is not None and running["spec"]["nodeName"] == "n1"
    assert condition(running, "Ready")["status"] == "True"
    assert running["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]

    await api.delete(f"{pods}/rank-0")
    await eventually(lambda: api.find(f"{pods}/rank-0"), lambda seen: seen is None, what="the pod's end")


async def test_a_pod_that_fits_no_node_stays_pending_and_says_why(
    api: Api, namespace: str, nodes: KubeletControls
) -> None:
    path = f"/api/v1/namespaces/{namespace}/pods"
    await api.create(path, pod("wide", gpus=9))
    seen = await eventually(
        lambda: api.find(f"{path}/wide"), lambda seen: "message" in condition(seen, "PodScheduled"), what="a refusal"
    )
    assert "Insufficient nvidia.com/gpu" in condition(seen, "PodScheduled")["message"]

    nodes.add_node(Node("n9", resources={"nvidia.com/gpu": "16"}))
    seen = await eventually(lambda: api.find(f"{path}/wide"), lambda seen: phase(seen) == "Running")
    assert seen is not None and seen["spec"]["nodeName"] == "n9"


async def test_a_pod_stuck_terminating_is_seen_as_such_until_released(
    api: Api, namespace: str, nodes: KubeletControls
) -> None:
    path = f"/api/v1/namespaces/{namespace}/pods/rank-0"
    nodes.hang_deletion(namespace, "rank-0")
    await api.create(f"/api/v1/namespaces/{namespace}/pods", pod("rank-0"))
    await eventually(lambda: api.find(path), lambda seen: phase(seen) == "Running")
    await api.delete(path, grace_s=1)
    assert "deletionTimestamp" in (await api.get(path))["metadata"]
    with pytest.raises(ApiError, match=r"(?i)409 Conflict.*uid"):
        await api.delete(path, uid="another", grace_s=0)

    nodes.hang_deletion(namespace, "rank-0", False)
    await eventually(lambda: api.find(path), lambda seen: seen is None, what="the pod's end")


async def test_pods_fail_lose_readiness_and_succeed_on_request(
    api: Api, namespace: str, nodes: KubeletControls
) -> None:
    pods = f"/api/v1/namespaces/{namespace}/pods"
    for name in ("failing", "unready", "done"):
        await api.create(pods, pod(name))
        await eventually(lambda name=name: api.find(f"{pods}/{name}"), lambda seen: phase(seen) == "Running")  # type: ignore[misc]
    nodes.fail_pod(namespace, "failing", exit_code=137)
    nodes.set_pod_ready(namespace, "unready", False)
    nodes.complete_pod(namespace, "done")

    failed = await eventually(lambda: api.find(f"{pods}/failing"), lambda seen: phase(seen) == "Failed")
    assert failed is not None
    assert failed["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137
    await eventually(lambda: api.find(f"{pods}/done"), lambda seen: phase(seen) == "Succeeded")
    unready = await eventually(
        lambda: api.find(f"{pods}/unready"), lambda seen: condition(seen, "Ready").get("status") == "False"
    )
    assert phase(unready) == "Running"


async def test_a_silent_node_becomes_not_ready_and_returns_when_it_wakes(
    api: Api, namespace: str, nodes: KubeletControls
) -> None:
    pods = f"/api/v1/namespaces/{namespace}/pods"
    await api.create(pods, pod("rank-0") | {"spec": pod("rank-0")["spec"] | {"nodeSelector": {"rack": "r0"}}})
    await eventually(lambda: api.find(f"{pods}/rank-0"), lambda seen: phase(seen) == "Running")

    nodes.silence_node("n0")
    lost = await eventually(
        lambda: api.find("/api/v1/nodes/n0"), lambda seen: condition(seen, "Ready")["status"] == "Unknown"
    )
    assert lost is not None
    await eventually(
        lambda: api.find("/api/v1/nodes/n0"),
        lambda seen: "node.kubernetes.io/unreachable" in {t["key"] for t in (seen or {})["spec"].get("taints", [])},
        what="the taint",
    )
    other = await api.get("/api/v1/nodes/n1")
    assert condition(other, "Ready")["status"] == "True"
    await eventually(lambda: api.find(f"{pods}/rank-0"), lambda seen: condition(seen, "Ready").get("status") == "False")
    await api.delete(f"{pods}/rank-0", grace_s=1)
    assert "deletionTimestamp" in (await api.get(f"{pods}/rank-0"))["metadata"]

    nodes.wake_node("n0")
    await eventually(lambda: api.find("/api/v1/nodes/n0"), lambda seen: condition(seen, "Ready")["status"] == "True")
    await eventually(lambda: api.find(f"{pods}/rank-0"), lambda seen: seen is None, what="the pod's end")


async def test_a_hung_api_server_answers_nothing_and_then_goes_on(cluster: ControlPlane, api: Api) -> None:
    with cluster.paused("kube-apiserver"):
        assert not cluster.is_ready()
    assert (await api.get("/api/v1/namespaces/default"))["metadata"]["name"] == "default"


async def test_a_service_account_has_no_rights_of_its_own(cluster: ControlPlane, namespace: str) -> None:
    kubeconfig = cluster.service_account_kubeconfig(namespace, "default")
    refused = cluster.run_kubectl("get", "pods", kubeconfig=kubeconfig)
    assert refused.returncode == 1
    assert f"system:serviceaccount:{namespace}:default" in refused.stderr


def test_a_start_that_fails_half_way_says_why_and_leaves_nothing_running(tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match=r"kube-apiserver ended with code 1 (.|\n)*unknown flag: --no-such-flag"),
        control_plane(Settings(apiserver_flags=["--no-such-flag"]), directory=tmp_path),
    ):
        pytest.fail("it must not start")
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_nothing_outlives_a_control_plane_started_by_hand(tmp_path: Path, sent: signal.Signals) -> None:
    tests = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.controlplane", "--nodes", "1"],
        env=os.environ | {"PYTHONPATH": str(tests), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as by_hand:
        assert by_hand.stdout is not None
        assert by_hand.stdout.readline().startswith("export KUBECONFIG=")
        assert len(processes_of(tmp_path)) == 4
        by_hand.send_signal(sent)
        try:
            by_hand.wait(timeout=20)
        finally:
            by_hand.kill()  # leaving the block waits without end
    deadline = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(tmp_path) == []
    assert by_hand.returncode == (-signal.SIGKILL if sent is signal.SIGKILL else 0)


def processes_of(home: Path) -> list[str]:
    """Command lines of living processes that name this folder, other than this test's own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(home) in command:
                found.append(command)
    return found
