"""The pods of a local shell: admitted as records, run when bound, told of in the objects, gone with their owner."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from moe_core.contract.names import LABEL_ROLE, ROLE_GATEWAY, ROLE_NODE, ROLE_RANK, pod_name
from moe_core.contract.runtime_config import ENV_ROLE, ENV_SHARED_RAY
from moe_core.facts import PodFact
from moe_operator.cluster.local_kubelet import Kubelet
from moe_operator.cluster.local_machine import NODE_NAME, Ports
from moe_operator.cluster.local_pod import LocalPod
from moe_operator.cluster.local_store import Manifest, ObjectStore, owner_uid_of


class Crew:
    """Every pod of the shell by uid. `on_change` is told of each change, `on_gone` when a pod's room is free again."""

    def __init__(
        self,
        program: Sequence[str],
        *,
        folder: Path,
        store: ObjectStore,
        ports: Ports,
        on_change: Callable[[LocalPod], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._store = store
        self._ports = ports
        self._on_change = on_change
        self._on_gone = on_gone
        self._pods: dict[str, LocalPod] = {}
        self._num_admitted = 0
        self._kubelet = Kubelet(
            program, run_folder=folder, read_volume=self._read_volume, on_change=self._changed, on_gone=self._gone
        )

    async def close(self) -> None:
        await self._kubelet.close()

    def all(self) -> list[LocalPod]:
        return list(self._pods.values())

    def get(self, uid: str) -> LocalPod | None:
        return self._pods.get(uid)

    def of(self, owner_uid: str, *, with_node: bool = False) -> list[LocalPod]:
        return [
            pod
            for pod in self._pods.values()
            if owner_uid_of(pod.manifest) == owner_uid and (with_node or pod.role != ROLE_NODE)
        ]

    def facts(self, owner_uid: str) -> tuple[PodFact, ...]:
        """What the brain sees of one owner's pods, in order of name."""
        facts = (pod.fact() for pod in self.of(owner_uid))
        return tuple(sorted(facts, key=lambda fact: fact.name))

    def admit(self, manifest: Mapping[str, Any], *, owner: Manifest, gated: bool) -> LocalPod:
        """A new pod as a record. Raises Foreign when another owner has one of that name."""
        self._num_admitted += 1
        uid = str(uuid.uuid4())
        thing = deepcopy(dict(manifest)) | {"apiVersion": "v1", "kind": "Pod"}
        name = thing["metadata"]["name"]
        thing["metadata"]["uid"] = uid
        self._store.put_child(thing, owner=owner)
        stored = self._store.get("Pod", owner["metadata"]["namespace"], name)
        assert stored is not None, name
        namespace = owner["metadata"]["namespace"]
        unique = name if namespace == "default" else f"{namespace}.{name}"
        folder, temp = self._folder / "p" / unique, self._folder / f"t{self._num_admitted}"
        pod = LocalPod(stored, folder, temp, created_at=time.time(), gated=gated)
        pod.extra_env[ENV_SHARED_RAY] = "1"
        if pod.role == ROLE_GATEWAY:
            pod.health_port = self._ports.take()
        self._pods[uid] = pod
        self._changed(pod)
        return pod

    def run(self, pod: LocalPod, *, owner: Manifest) -> None:
        """Bind the pod to this machine and start it, the first rank together with the Ray node it needs."""
        if pod.role == ROLE_RANK:
            self._ensure_ray_node(owner, pod)
        pod.gated, pod.node = False, NODE_NAME
        self._kubelet.start(pod)

    def delete(self, pod: LocalPod, *, grace_s: float | None = None) -> None:
        """Begin to end a pod, once."""
        if not pod.deleting:
            self._kubelet.delete(pod, grace_s=grace_s)

    def _ensure_ray_node(self, owner: Manifest, rank: LocalPod) -> None:
        """Started with the owner's first rank, gone with its last pod."""
        meta = owner["metadata"]
        if any(pod.role == ROLE_NODE and not pod.deleting for pod in self.of(meta["uid"], with_node=True)):
            return
        manifest = deepcopy(rank.manifest)
        name = pod_name(owner["kind"], meta["name"], ROLE_NODE, index=0, incarnation=self._num_admitted)
        manifest["metadata"] = {"name": name, "labels": manifest["metadata"]["labels"] | {LABEL_ROLE: ROLE_NODE}}
        manifest["spec"]["restartPolicy"] = "Always"
        for ranks_own in ("livenessProbe", "readinessProbe", "startupProbe", "resources"):
            manifest["spec"]["containers"][0].pop(ranks_own, None)
        node = self.admit(manifest, owner=owner, gated=False)
        node.extra_env[ENV_ROLE] = ROLE_NODE
        self.run(node, owner=owner)

    def _read_volume(self, pod: LocalPod, kind: str, name: str) -> Mapping[str, str] | None:
        thing = self._store.get(kind, pod.namespace, name)
        if thing is None:
            return None
        return dict(thing.get("stringData" if kind == "Secret" else "data", {}))

    def _changed(self, pod: LocalPod) -> None:
        pod.manifest["status"] = {
            "phase": pod.phase,
            "message": pod.message,
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(pod.ready)}],
            "containerStatuses": [{"name": "moerator", "ready": pod.ready, "restartCount": pod.restarts}],
        }
        if pod.node:
            pod.manifest["spec"]["nodeName"] = pod.node
        if self._store.get("Pod", pod.namespace, pod.name) is pod.manifest:
            self._store.touch(pod.manifest)
        self._on_change(pod)

    def _gone(self, pod: LocalPod) -> None:
        self._pods.pop(pod.uid, None)
        if self._store.get("Pod", pod.namespace, pod.name) is pod.manifest:
            self._store.remove("Pod", pod.namespace, pod.name)
        left = self.of(owner_uid_of(pod.manifest) or "", with_node=True)
        if all(other.role == ROLE_NODE for other in left):
            for node in left:
                self.delete(node, grace_s=1)
        self._on_gone()
