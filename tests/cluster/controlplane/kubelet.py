"""The part of a kubelet that the API server sees: node status, heartbeats, pod status, finished deletions.

Level-triggered like a real one: what a pod should look like follows from what is observed and from the plan that a test
made for it. Tests use it through `nodes.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp

from cluster.controlplane.api import STRATEGIC, Api, ApiError, Object

PodKey = tuple[str, str]  # namespace, name
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


@dataclass(frozen=True)
class Node:
    """A node to simulate. `resources` adds to (or overrides) 64 CPUs, 512 GiB and 250 pods."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, str] = field(default_factory=dict)
    taints: Sequence[Mapping[str, str]] = ()

    def manifest(self) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": {"kubernetes.io/hostname": self.name, **self.labels}},
            "spec": {"taints": [dict(taint) for taint in self.taints]},
        }

    def status(self, *, is_ready: bool) -> Object:
        amounts = {"cpu": "64", "memory": "512Gi", "pods": "250", "ephemeral-storage": "1Ti", **self.resources}
        conditions = [_condition("Ready", is_ready, "KubeletReady" if is_ready else "KubeletNotReady")]
        conditions += [_condition(f"{what}Pressure", False, "Fine") for what in ("Memory", "Disk", "PID")]
        for condition in conditions:
            condition["lastHeartbeatTime"] = _now()
        return {
            "capacity": amounts,
            "allocatable": amounts,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": self.name}],
            "nodeInfo": {
                **dict.fromkeys(("machineID", "systemUUID", "bootID", "kernelVersion", "osImage"), "simulated"),
                **dict.fromkeys(("containerRuntimeVersion", "kubeletVersion", "kubeProxyVersion"), "simulated"),
                **{"operatingSystem": "linux", "architecture": "amd64"},
            },
        }


@dataclass
class _Plan:
    """What a test asked of one pod, in place of the normal course."""

    phase: str = "Running"
    is_ready: bool = True
    exit_code: int = 0
    reason: str = "Completed"
    hangs_on_delete: bool = False
    is_held_pending: bool = False


class Kubelets:
    """The simulator, on one event loop; `kubelets()` runs it on a thread and hands out `KubeletControls`."""

    def __init__(self, api: Api, *, heartbeat_s: float, pod_ip: Callable[[Object], str] | None) -> None:
        self._api = api
        self._heartbeat_s = heartbeat_s
        self._pod_ip = pod_ip or self._next_ip
        self._num_ips = 0
        self._nodes: dict[str, Node] = {}
        self._not_ready: set[str] = set()
        self._silent: set[str] = set()
        self._pods: dict[PodKey, Object] = {}
        self._plans: dict[PodKey, _Plan] = {}
        self._ips: dict[str, str] = {}
        self._syncs: dict[PodKey, asyncio.Task[None]] = {}
        self._dirty: set[PodKey] = set()
        self._slots = asyncio.Semaphore(16)

    @property
    def node_names(self) -> list[str]:
        return list(self._nodes)

    async def run(self) -> None:
        """Follow nodes and pods and send heartbeats until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_pods())
                tasks.create_task(self._follow_nodes())
                tasks.create_task(self._send_heartbeats())
        finally:
            for sync in self._syncs.values():
                sync.cancel()

    async def add_node(self, node: Node) -> None:
        self._nodes[node.name] = node
        self._silent.discard(node.name)
        created = await self._api.create("/api/v1/nodes", node.manifest())
        await self._post_node_status(node.name)
        owner = {"apiVersion": "v1", "kind": "Node", "name": node.name, "uid": created["metadata"]["uid"]}
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": node.name, "ownerReferences": [owner]},
            "spec": {"holderIdentity": node.name, "leaseDurationSeconds": 40, "renewTime": _now_micro()},
        }
        with contextlib.suppress(ApiError):  # left from a node of that name that is being collected
            await self._api.create(LEASES, lease)

    async def until_schedulable(self, name: str) -> None:
        """Wait for the node lifecycle controller to take away the taint that every new node is born with."""
        for _ in range(200):
            taints = (await self._api.get(f"/api/v1/nodes/{name}"))["spec"].get("taints", [])
            if all(taint["key"] != "node.kubernetes.io/not-ready" for taint in taints):
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"node {name} was still tainted not-ready after 10 s")

    async def delete_node(self, name: str) -> None:
        """The Node object goes, as when a cloud takes the machine back; its pods are Kubernetes' to collect."""
        self._nodes.pop(name, None)
        await self._api.delete(f"/api/v1/nodes/{name}")

    async def silence_node(self, name: str) -> None:
        """No heartbeat, no status, no finished deletion: a machine that lost power or network."""
        self._silent.add(name)

    async def wake_node(self, name: str) -> None:
        self._silent.discard(name)
        await self._renew_lease(name)
        await self._post_node_status(name)
        for key, pod in self._pods.items():
            if pod["spec"].get("nodeName") == name:
                self._mark(key)

    async def set_node_ready(self, name: str, is_ready: bool) -> None:
        """The kubelet itself reports that it is (not) ready; heartbeats go on."""
        (self._not_ready.discard if is_ready else self._not_ready.add)(name)
        await self._post_node_status(name)

    async def replan(self, key: PodKey, **changes: object) -> None:
        plan = self._plans.setdefault(key, _Plan())
        for name, value in changes.items():
            setattr(plan, name, value)
        self._mark(key)

    async def _follow_pods(self) -> None:
        async for kind, pod in self._api.follow("/api/v1/pods"):
            key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
            if kind == "DELETED":
                self._pods.pop(key, None)
                self._plans.pop(key, None)
                self._ips.pop(pod["metadata"]["uid"], None)
            else:
                self._pods[key] = pod
                self._mark(key)

    async def _follow_nodes(self) -> None:
        async for kind, seen in self._api.follow("/api/v1/nodes"):
            name = seen["metadata"]["name"]
            if kind == "DELETED" or name not in self._nodes or name in self._silent:
                continue
            conditions = seen.get("status", {}).get("conditions", [])
            if {c["type"]: c["status"] for c in conditions}.get("Ready") == "Unknown":
                await self._tolerant(self._post_node_status(name))  # the node controller gave up on it; it is back

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            for name in [name for name in self._nodes if name not in self._silent]:
                await self._tolerant(self._renew_lease(name))

    async def _renew_lease(self, name: str) -> None:
        await self._api.patch(f"{LEASES}/{name}", {"spec": {"renewTime": _now_micro()}})

    async def _post_node_status(self, name: str) -> None:
        status = self._nodes[name].status(is_ready=name not in self._not_ready)
        await self._api.patch(f"/api/v1/nodes/{name}/status", {"status": status}, STRATEGIC)

    def _mark(self, key: PodKey) -> None:
        self._dirty.add(key)
        if key not in self._syncs:
            self._syncs[key] = asyncio.get_running_loop().create_task(self._sync(key))

    async def _sync(self, key: PodKey) -> None:
        try:
            while key in self._dirty:
                self._dirty.discard(key)
                pod = self._pods.get(key)
                node = pod["spec"].get("nodeName") if pod else None
                if pod is not None and node in self._nodes and node not in self._silent:
                    async with self._slots:
                        done = await self._tolerant(self._sync_pod(pod, self._plans.get(key, _Plan())))
                    if not done:
                        await asyncio.sleep(0.2)
                        self._dirty.add(key)
        finally:
            del self._syncs[key]

    async def _sync_pod(self, pod: Object, plan: _Plan) -> None:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        if "deletionTimestamp" in metadata:
            if not plan.hangs_on_delete:
                await self._api.delete(path, uid=metadata["uid"], grace_s=0)
            return
        seen = pod.get("status", {})
        if plan.is_held_pending or seen.get("phase") in ("Failed", "Succeeded"):
            return
        ready = {c["type"]: c["status"] for c in seen.get("conditions", [])}.get("Ready") == "True"
        if seen.get("phase") != plan.phase or ready != (plan.is_ready and plan.phase == "Running"):
            status = self._pod_status(pod, plan)
            await self._api.patch(f"{path}/status", {"metadata": {"uid": metadata["uid"]}, "status": status}, STRATEGIC)

    def _pod_status(self, pod: Object, plan: _Plan) -> Object:
        uid = pod["metadata"]["uid"]
        ip = self._ips.get(uid) or self._ips.setdefault(uid, self._pod_ip(pod))
        is_running = plan.phase == "Running"
        is_ready = is_running and plan.is_ready
        ended = {"exitCode": plan.exit_code, "reason": plan.reason, "finishedAt": _now()}
        state = {"running": {"startedAt": _now()}} if is_running else {"running": None, "terminated": ended}
        return {
            "phase": plan.phase,
            **({} if is_running or plan.phase == "Succeeded" else {"reason": plan.reason}),
            "hostIP": "127.0.0.1",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "startTime": pod.get("status", {}).get("startTime") or _now(),
            "conditions": [
                _condition("PodReadyToStartContainers", is_running, ""),
                _condition("Initialized", True, ""),
                _condition("ContainersReady", is_ready, "" if is_ready else "ContainersNotReady"),
                _condition("Ready", is_ready, "" if is_ready else "ContainersNotReady"),
            ],
            "initContainerStatuses": [
                _container_status(container, uid, False, {"terminated": {"exitCode": 0, "reason": "Completed"}})
                for container in pod["spec"].get("initContainers", [])
            ],
            "containerStatuses": [_container_status(c, uid, is_ready, state) for c in pod["spec"]["containers"]],
        }

    def _next_ip(self, _pod: Object) -> str:
        self._num_ips += 1
        return f"10.244.{self._num_ips // 250}.{self._num_ips % 250 + 1}"

    async def _tolerant(self, work: Coroutine[Any, Any, object]) -> bool:
        """A kubelet outlives an absent or overloaded server. False: try again; what no longer applies is done."""
        try:
            await work
        except ApiError as error:
            return error.status in (404, 409)  # gone, or another pod has its name now: an event says what is next
        except (aiohttp.ClientError, TimeoutError):
            return False
        return True


def _condition(kind: str, is_true: bool, reason: str) -> Object:
    status = "True" if is_true else "False"
    return {"type": kind, "status": status, "lastTransitionTime": _now(), "reason": reason or None}


def _container_status(container: Object, uid: str, is_ready: bool, state: Object) -> Object:
    name, image = container["name"], container.get("image", "")
    return {
        **{"name": name, "image": image, "imageID": f"simulated://{image}", "containerID": f"simulated://{uid}/{name}"},
        **{"ready": is_ready, "started": is_ready, "restartCount": 0, "state": state},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _now_micro() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
