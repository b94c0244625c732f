"""The local shell's verbs on real processes; the pods' program is a stand-in, the processes are not."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from moe_core.contract.names import (
    API_VERSION,
    LABEL_INCARNATION,
    LABEL_OWNER_KIND,
    LABEL_OWNER_NAME,
    LABEL_RANK,
    LABEL_ROLE,
)
from moe_core.facts import ApplyObject, BindPod, CreatePod, DeletePod, EnsureToken, PodFact, Wish
from moe_core.outcome import InvalidSpec
from moe_operator.cluster import local_ends
from moe_operator.cluster.local import LocalCluster
from moe_operator.cluster.local_pod import LocalPod
from moe_operator.cluster.protocol import Conflict, Foreign, Key

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

STAND_IN = (sys.executable, str(Path(__file__).with_name("local_stand_in.py")))
KEY = Key("MoEService", "default", "tiny")


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    async with LocalCluster(program=STAND_IN) as cluster:
        cluster.apply(service())
        yield cluster


def service(name: str = "tiny", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": "MoEService",
        "metadata": {"name": name},
        "spec": {"model": {"path": "nowhere"}, "parallelism": {"expert": 4}, **spec},
    }


def manifest(name: str, role: str, *args: str, owner: str = "tiny", **spec: Any) -> dict[str, Any]:
    container = {
        "name": "moerator",
        "args": list(args),
        "env": [
            {"name": "MOERATOR_ROLE", "value": role},
            {"name": "MOERATOR_POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
            {"name": "MOERATOR_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "MOERATOR_CONFIG", "value": "/etc/moerator/config/config.json"},
            {"name": "MOERATOR_TOKEN_FILE", "value": "/etc/moerator/token/token"},
        ],
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/moerator/config"},
            {"name": "token", "mountPath": "/etc/moerator/token"},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
    }
    volumes = [
        {"name": "config", "configMap": {"name": f"{owner}-svc-config"}},
        {"name": "token", "secret": {"secretName": f"{owner}-svc-token"}},
    ]
    labels = {LABEL_OWNER_KIND: "MoEService", LABEL_OWNER_NAME: owner, LABEL_ROLE: role}
    labels |= {LABEL_RANK: "0", LABEL_INCARNATION: "0"}
    return {
        "metadata": {"name": name, "labels": labels, "annotations": {}},
        "spec": {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 2, **spec},
    }


async def observed(cluster: LocalCluster, key: Key = KEY) -> tuple[Wish, dict[str, PodFact]]:
    found = await cluster.observe(key)
    assert found is not None
    return found[0], {pod.name: pod for pod in found[1].pods}


async def until(holds: Callable[[], bool], *, within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.02)  # what a pod wrote into its folder announces itself to nobody


async def start(cluster: LocalCluster, name: str, role: str, *args: str, **spec: Any) -> LocalPod:
    """Create the objects a pod needs, the pod itself and, for a rank, its binding."""
    wish, _ = await observed(cluster)
    config = {"apiVersion": "v1", "metadata": {"name": "tiny-svc-config"}, "data": {"config.json": '{"mode":"serve"}'}}
    await cluster.apply_object(wish, ApplyObject("ConfigMap", "tiny-svc-config", "d1", config))
    await cluster.ensure_token(wish, EnsureToken("tiny-svc-token"))
    body = manifest(name, role, *args, **spec)
    await cluster.create_pod(wish, CreatePod(name, role, 0, 0, role == "rank", body))
    pod = next(pod for pod in cluster.pods() if pod.name == name)
    if role == "rank":
        await cluster.bind_pod(wish, BindPod(name, pod.uid, "localhost"))
    return pod


def environment(pod: LocalPod) -> dict[str, str]:
    found: dict[str, str] = json.loads((pod.folder / "environment.json").read_text())
    return found


def runs(pod: LocalPod) -> list[int]:
    path = pod.folder / "runs"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_gated_pod_is_only_a_record_until_it_is_bound(cluster: LocalCluster) -> None:
    wish, _ = await observed(cluster)
    body = manifest("tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    await cluster.create_pod(wish, CreatePod("tiny-svc-rank-0-0", "rank", 0, 0, True, body))
    _, pods = await observed(cluster)
    assert (pods["tiny-svc-rank-0-0"].phase, pods["tiny-svc-rank-0-0"].gated) == ("Pending", True)
    assert [pod.pid for pod in cluster.pods()] == [None]


async def test_a_bound_pod_runs_with_its_config_token_and_identity(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    await until(lambda: pod.phase == "Running" and pod.ready)
    await until((pod.folder / "environment.json").exists)
    given = environment(pod)
    assert given["MOERATOR_POD_UID"] == pod.uid
    assert given["MOERATOR_POD_IP"] == "127.0.0.1"
    assert given["MOERATOR_SHARED_RAY"] == "1"
    assert json.loads(Path(given["MOERATOR_CONFIG"]).read_text()) == {"mode": "serve"}
    token = Path(given["MOERATOR_TOKEN_FILE"])
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600


async def test_the_first_rank_brings_the_ray_node_that_the_brain_does_not_see(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    roles = [other.role for other in cluster.pods()]
    wish, facts = await observed(cluster)
    assert sorted(roles) == ["node", "rank"]
    assert list(facts) == ["tiny-svc-rank-0-0"]
    await cluster.delete_pod(wish, DeletePod(pod.name, pod.uid))
    await until(lambda: not cluster.pods())


async def test_a_killed_rank_pod_fails_and_is_not_restarted(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    await until(lambda: pod.phase == "Running" and bool(runs(pod)))
    os.kill(runs(pod)[0], signal.SIGKILL)
    await until(lambda: pod.phase == "Failed")
    assert pod.message == "killed by SIGKILL (exit code 137)"
    assert (len(runs(pod)), pod.restarts, pod.ready) == (1, 0, False)


async def test_a_pod_that_exits_with_zero_and_is_not_restarted_succeeded(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", "exit", "0", restartPolicy="Never")
    await until(lambda: pod.phase == "Succeeded")
    assert pod.message == "exit code 0"


async def test_a_killed_coordinator_is_restarted_in_place_with_the_same_uid_and_state(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-coordinator-0-0", "coordinator")
    await until(lambda: pod.phase == "Running" and len(runs(pod)) == 1)
    uid = pod.uid
    os.kill(runs(pod)[0], signal.SIGKILL)
    await until(lambda: pod.restarts == 1 and len(runs(pod)) == 2)
    assert (pod.uid, pod.phase) == (uid, "Running")


async def test_a_stopped_gateway_is_killed_by_its_liveness_probe_and_comes_back(cluster: LocalCluster) -> None:
    probe = {"httpGet": {"path": "/healthz", "port": 8000}, "periodSeconds": 0.2, "timeoutSeconds": 0.3}
    wish, _ = await observed(cluster)
    await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")  # brings ConfigMap and token
    body = manifest("tiny-svc-gateway-0-0", "gateway")
    body["spec"]["containers"][0] |= {"readinessProbe": probe, "livenessProbe": probe}
    await cluster.create_pod(wish, CreatePod("tiny-svc-gateway-0-0", "gateway", 0, 0, False, body))
    pod = next(pod for pod in cluster.pods() if pod.role == "gateway")
    await until(lambda: pod.ready)
    first = runs(pod)[0]
    os.kill(first, signal.SIGSTOP)
    await until(lambda: pod.restarts == 1 and pod.ready)
    assert not is_alive(first)
    assert len(runs(pod)) == 2


async def test_a_deleted_pod_takes_its_daemons_with_it(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-coordinator-0-0", "coordinator", "daemon")
    await until(lambda: pod.phase == "Running")
    await until((pod.folder / "daemon").exists)
    daemon = int((pod.folder / "daemon").read_text())
    assert is_alive(daemon)
    wish, _ = await observed(cluster)
    await cluster.delete_pod(wish, DeletePod(pod.name, pod.uid))
    _, pods = await observed(cluster)
    assert pods[pod.name].deleting
    await until(lambda: not cluster.pods())
    assert not is_alive(daemon)


async def test_what_a_killed_first_process_left_behind_is_swept(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", "daemon", restartPolicy="Never")
    await until((pod.folder / "daemon").exists)
    daemon = int((pod.folder / "daemon").read_text())
    assert pod.pid is not None
    os.kill(pod.pid, signal.SIGKILL)
    await until(lambda: pod.phase == "Failed")
    assert not is_alive(daemon)


async def test_deleting_the_resource_ends_its_pods_and_objects(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-coordinator-0-0", "coordinator")
    await until(lambda: bool(runs(pod)))
    process = runs(pod)[0]
    assert cluster.delete(KEY)
    await until(lambda: not cluster.pods())
    assert await cluster.observe(KEY) is None
    assert not is_alive(process)
    assert cluster.objects() == []


async def test_an_object_of_somebody_else_is_refused_by_name(cluster: LocalCluster) -> None:
    await start(cluster, "tiny-svc-coordinator-0-0", "coordinator")
    other = cluster.apply(service("other"))
    wish, _ = await observed(cluster, other)
    config = {"apiVersion": "v1", "metadata": {"name": "tiny-svc-config"}, "data": {}}
    with pytest.raises(Foreign, match="ConfigMap/tiny-svc-config exists and is not owned by MoEService/other"):
        await cluster.apply_object(wish, ApplyObject("ConfigMap", "tiny-svc-config", "d", config))


async def test_binding_a_pod_of_another_uid_is_a_conflict(cluster: LocalCluster) -> None:
    wish, _ = await observed(cluster)
    with pytest.raises(Conflict, match="uid nobody"):
        await cluster.bind_pod(wish, BindPod("tiny-svc-rank-0-0", "nobody", "localhost"))


async def test_a_pod_without_its_secret_says_what_is_missing(cluster: LocalCluster) -> None:
    wish, _ = await observed(cluster)
    config = {"apiVersion": "v1", "metadata": {"name": "tiny-svc-config"}, "data": {}}
    await cluster.apply_object(wish, ApplyObject("ConfigMap", "tiny-svc-config", "d", config))
    body = manifest("tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    await cluster.create_pod(wish, CreatePod("tiny-svc-rank-0-0", "rank", 0, 0, False, body))
    pod = cluster.pods()[0]
    await until(lambda: pod.phase == "Failed")
    assert "there is no Secret/tiny-svc-token" in pod.message


async def test_leaving_the_cluster_removes_processes_and_files() -> None:
    async with LocalCluster(program=STAND_IN) as cluster:
        cluster.apply(service())
        pod = await start(cluster, "tiny-svc-coordinator-0-0", "coordinator", "daemon")
        await until((pod.folder / "daemon").exists)
        processes = [*runs(pod), int((pod.folder / "daemon").read_text())]
        folder = cluster.folder
    assert not any(is_alive(pid) for pid in processes)
    assert not folder.exists()


async def test_used_room_counts_other_owners_only(cluster: LocalCluster) -> None:
    await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    other = cluster.apply(service("other"))
    own, foreign = await cluster.observe(KEY), await cluster.observe(other)
    assert own is not None
    assert foreign is not None
    assert own[1].nodes[0].used == {}
    assert foreign[1].nodes[0].used["memory"] == 64 * 2**20


async def test_a_pod_whose_first_process_is_stopped_ends_all_the_same(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ends, "END_WITHIN_S", 0.5)
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")
    await until(lambda: bool(runs(pod)))
    [program] = runs(pod)
    assert pod.pid is not None
    os.kill(pod.pid, signal.SIGSTOP)
    wish, _ = await observed(cluster)
    await cluster.delete_pod(wish, DeletePod(pod.name, pod.uid))
    await until(lambda: pod.name not in [left.name for left in cluster.pods()])
    await until(lambda: not is_alive(program))


async def test_the_end_of_a_pod_takes_nothing_of_a_pod_that_is_starting(cluster: LocalCluster) -> None:
    ending = await start(cluster, "tiny-svc-rank-0-0", "rank", "exit", "3", restartPolicy="Never")
    environ = {**os.environ, "MOERATOR_RUN": str(cluster.folder), "MOERATOR_POD_UID": "another"}
    newborn = await asyncio.create_subprocess_exec("sleep", "60", env=environ)  # not known to the kubelet yet
    await until(lambda: ending.phase == "Failed")
    assert newborn.returncode is None
    newborn.kill()
    await newborn.wait()


async def test_a_shell_closes_though_a_first_process_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ends, "END_WITHIN_S", 0.5)
    async with LocalCluster(program=STAND_IN) as cluster:
        cluster.apply(service())
        pod = await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never")
        await until(lambda: bool(runs(pod)))
        [program] = runs(pod)
        assert pod.pid is not None
        os.kill(pod.pid, signal.SIGSTOP)
    assert not is_alive(program)


async def test_a_volume_that_makes_no_sense_fails_the_pod_and_says_so(cluster: LocalCluster) -> None:
    pod = await start(cluster, "tiny-svc-rank-0-0", "rank", restartPolicy="Never", volumes=[{}])
    await until(lambda: pod.phase == "Failed")
    assert "its manifest cannot be run: KeyError('name')" in pod.message


async def test_a_change_that_no_api_server_takes_is_refused_here_too(cluster: LocalCluster) -> None:
    with pytest.raises(InvalidSpec, match="model cannot be changed"):
        cluster.apply(service(model={"path": "elsewhere"}))
    thing = cluster.resource(KEY)
    assert thing is not None and thing["spec"]["model"] == {"path": "nowhere"}
    cluster.apply(service(suspend=True))
    assert thing["spec"]["suspend"] is True
