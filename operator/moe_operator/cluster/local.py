"""The local shell: the same custom resources and the same reconcile, with processes of this machine as pods.

One node `localhost` with the machine's processors and memory. Objects live in memory and are mirrored to the run
folder. Ranks of one owner share one Ray node (a `node` pod that the brain does not see), because a node each would only
cost start-up time; everything else about them is as on Kubernetes.
"""

import asyncio
import logging
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from moe_core.contract.names import TOKEN_KEY
from moe_core.facts import (
    ApplyObject,
    BindPod,
    CreatePod,
    DeleteObject,
    DeletePod,
    EnsureToken,
    Event,
    Facts,
    Kind,
    ModelFact,
    ReportMap,
    TargetFact,
    Wish,
)
from moe_core.outcome import InvalidSpec
from moe_core.spec.kinds import KIND_OF_NAME
from moe_core.spec.load import broken_changes
from moe_operator.cluster.local_crew import Crew
from moe_operator.cluster.local_dirty import DirtyKeys
from moe_operator.cluster.local_machine import Ports, node_fact
from moe_operator.cluster.local_model import has_checkpoint, read_model
from moe_operator.cluster.local_pod import LocalPod
from moe_operator.cluster.local_runs import make_run_folder
from moe_operator.cluster.local_runtimes import Runtimes
from moe_operator.cluster.local_store import Manifest, ObjectStore, key_of, owner_uid_of
from moe_operator.cluster.protocol import Conflict, Foreign, Key, RuntimeFace, Unavailable
from moe_operator.observe import object_fact, topology_levels, wish_of

logger = logging.getLogger(__name__)

POD_PROGRAM = (sys.executable, "-m", "moe_runtime.pod")
MIRROR_EVERY_S = 0.5
OWNER_KINDS: tuple[Kind, ...] = ("MoEJob", "MoEService")
RESOURCE_KINDS: tuple[Kind, ...] = (*OWNER_KINDS, "MoEDrill")


class LocalCluster:
    """Use as `async with LocalCluster() as cluster`; leaving it ends every process and, unless `keep`, every file."""

    def __init__(self, *, program: Sequence[str] = POD_PROGRAM, folder: Path | None = None, keep: bool = False) -> None:
        self.folder = folder or make_run_folder()
        self._keep = keep
        self._store = ObjectStore(self.folder / "objects", clock=time.time)
        ports = Ports()
        self._runtimes = Runtimes(self._store, ports, mark=self._mark)
        self._crew = Crew(
            program,
            folder=self.folder,
            store=self._store,
            ports=ports,
            on_change=self._mark_owner,
            on_gone=self._room_is_free,
        )
        self._dirty = DirtyKeys()
        self._num_events = 0
        self._has_checkpoint: dict[str, bool] = {}
        self._mirroring = asyncio.create_task(self._mirror(), name="mirror")

    async def __aenter__(self) -> "LocalCluster":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Kill every pod and remove the run folder."""
        for outcome in await asyncio.gather(self._crew.close(), *self._runtimes.ends(), return_exceptions=True):
            if isinstance(outcome, BaseException):  # none of them may keep the others from ending
                logger.error("while closing", exc_info=outcome)
        self._mirroring.cancel()
        await asyncio.gather(self._mirroring, return_exceptions=True)
        self._store.write_mirror()
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    # What a person does: apply, delete, look.

    def apply(self, document: Mapping[str, Any]) -> Key:
        """Create or change a custom resource. The document was validated before.

        Raises InvalidSpec for a change that an API server would refuse.
        """
        meta, kind = document["metadata"], str(document["kind"])
        there = self._store.get(kind, str(meta.get("namespace") or "default"), str(meta["name"]))
        if there is not None:
            problems = broken_changes(KIND_OF_NAME[kind].model, there["spec"], document.get("spec", {}))
            if problems:
                raise InvalidSpec(problems)
        thing, changed = self._store.put_resource(document)
        if changed:
            self._mark(thing)
        return key_of(thing)

    def delete(self, key: Key) -> bool:
        """Delete a custom resource and everything it owns. False when there is none."""
        thing = self._store.get(key.kind, key.namespace, key.name)
        if thing is not None:
            self._delete_owner(thing)
        return thing is not None

    def resource(self, key: Key) -> Manifest | None:
        """The custom resource with its status, as an API server would return it."""
        return self._store.get(key.kind, key.namespace, key.name)

    def objects(self, kind: str | None = None) -> list[Manifest]:
        return list(self._store.list(kind))

    def pods(self) -> list[LocalPod]:
        return self._crew.all()

    def state_of(self, key: Key) -> RuntimeFace | None:
        """Face of the coordinator of a job or service, None before it has pods."""
        thing = self.resource(key)
        return self._runtimes.of(thing["metadata"]["uid"]) if thing else None

    def port_of(self, key: Key, use: str) -> int:
        """Loopback port by use: coordinator, ray, gateway."""
        thing = self.resource(key)
        if thing is None:
            raise KeyError(str(key))
        return self._runtimes.ports_of(thing)[use]

    async def changed(self) -> None:
        """Wait until anything changes."""
        await self._dirty.changed()

    # Observation.

    def dirty(self) -> AsyncIterator[Key]:
        return self._dirty.taken()

    async def observe(self, key: Key) -> tuple[Wish, Facts] | None:
        thing = self.resource(key)
        if thing is None:
            return None
        wish = _seen(thing)
        if wish.kind == "MoEDrill":
            return wish, Facts(target=self._target(wish), local=True)
        own = frozenset(pod.uid for pod in self._crew.of(wish.uid, with_node=True))
        client = self._runtimes.of(wish.uid)
        facts = Facts(
            nodes=(node_fact(self.pods(), own=own),),
            pods=self._crew.facts(wish.uid),
            objects=tuple(
                object_fact(child)
                for child in self._store.children(wish.uid)
                if child["kind"] in ("ConfigMap", "Secret", "Service", "ExpertMap")
            ),
            topologies={t["metadata"]["name"]: topology_levels(t) for t in self._store.list("ClusterTopology")},
            model=self._model(wish),
            runtime=client.state if client else None,
            put_generation=client.put_generation if client else None,
            local=True,
            ports=self._runtimes.ports_of(thing),
        )
        return wish, facts

    # The verbs.

    async def apply_object(self, wish: Wish, action: ApplyObject) -> None:
        self._store.put_child({"kind": action.kind, **action.manifest}, owner=self._owner(wish))
        self._mark_wish(wish)

    async def ensure_token(self, wish: Wish, action: EnsureToken) -> None:
        if self._store.get("Secret", wish.namespace, action.name) is None:
            manifest = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": action.name},
                "stringData": {TOKEN_KEY: secrets.token_hex(32)},
            }
            self._store.put_child(manifest, owner=self._owner(wish))
            self._mark_wish(wish)

    async def create_pod(self, wish: Wish, action: CreatePod) -> None:
        there = self._store.get("Pod", wish.namespace, action.name)
        if there is not None:
            if owner_uid_of(there) != wish.uid:
                raise Foreign(f"Pod/{action.name} exists and is not owned by {wish.kind}/{wish.name}")
            return
        owner = self._owner(wish)
        pod = self._crew.admit(action.manifest, owner=owner, gated=action.gated)
        if not action.gated:
            self._run(pod, owner)

    async def bind_pod(self, wish: Wish, action: BindPod) -> None:
        pod = self._expect(action.name, action.uid, wish)
        if pod.gated and not pod.deleting:
            self._run(pod, self._owner(wish))

    async def delete_pod(self, wish: Wish, action: DeletePod) -> None:
        if self._crew.get(action.uid) is not None:
            self._crew.delete(self._expect(action.name, action.uid, wish))

    async def delete_object(self, wish: Wish, action: DeleteObject) -> None:
        thing = self._store.get(action.kind, wish.namespace, action.name)
        if thing is not None and owner_uid_of(thing) != wish.uid:
            raise Foreign(f"{action.kind}/{action.name} is not owned by {wish.kind}/{wish.name}")
        self._store.remove(action.kind, wish.namespace, action.name)
        self._mark_wish(wish)

    async def report_map(self, wish: Wish, action: ReportMap) -> None:
        thing = self._store.get("ExpertMap", wish.namespace, action.name)
        if thing is not None and owner_uid_of(thing) == wish.uid:
            thing["status"] = dict(action.status)
            self._store.touch(thing)

    async def delete_owner(self, wish: Wish) -> None:
        self._delete_owner(self._owner(wish))

    def runtime(self, wish: Wish) -> RuntimeFace:
        uid = wish.uid
        if wish.kind == "MoEDrill":
            target = self._target(wish)
            uid = target.wish.uid if target else ""
        client = self._runtimes.of(uid)
        if client is None:
            raise Unavailable(f"{wish.kind}/{wish.name}: no coordinator has been started yet", retry_after=1.0)
        return client

    async def write_status(
        self, wish: Wish, *, conditions: Sequence[Mapping[str, Any]], status: Mapping[str, Any]
    ) -> None:
        thing = self._owner(wish)
        thing["status"] = {**status, "conditions": [dict(condition) for condition in conditions]}
        self._store.touch(thing)
        self._mark(thing)

    async def emit(self, wish: Wish, event: Event) -> None:
        self._num_events += 1
        logger.info("%s %s/%s: %s: %s", wish.kind, wish.namespace, wish.name, event.reason, event.message)
        manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{wish.name}.{self._num_events:06d}"},
            "type": event.type,
            "reason": str(event.reason),
            "message": event.message,
            "involvedObject": {"kind": wish.kind, "name": wish.name, "uid": wish.uid},
        }
        self._store.put_child(manifest, owner=self._owner(wish))
        self._dirty.pulse()

    # Inside.

    async def _mirror(self) -> None:
        while True:
            self._store.write_mirror()
            self._look_for_checkpoints()
            await asyncio.sleep(MIRROR_EVERY_S)

    def _look_for_checkpoints(self) -> None:
        """A service that was refused for want of its checkpoint is looked at again when one appears."""
        for thing in self._store.list("MoEService"):
            path = thing["spec"].get("model", {}).get("path", "")
            there = has_checkpoint(Path(path))
            if there != self._has_checkpoint.get(thing["metadata"]["uid"], there):
                self._mark(thing)
            self._has_checkpoint[thing["metadata"]["uid"]] = there

    def _owner(self, wish: Wish) -> Manifest:
        thing = self._store.get(wish.kind, wish.namespace, wish.name)
        if thing is None or thing["metadata"]["uid"] != wish.uid:
            raise Conflict(f"{wish.kind}/{wish.name} was deleted meanwhile")
        return thing

    def _expect(self, name: str, uid: str, wish: Wish) -> LocalPod:
        pod = self._crew.get(uid)
        if pod is None or pod.name != name:
            raise Conflict(f"Pod/{name} with uid {uid} is gone")
        if owner_uid_of(pod.manifest) != wish.uid:
            raise Foreign(f"Pod/{name} is not owned by {wish.kind}/{wish.name}")
        return pod

    def _run(self, pod: LocalPod, owner: Manifest) -> None:
        self._runtimes.follow(owner)
        self._crew.run(pod, owner=owner)

    def _model(self, wish: Wish) -> ModelFact | None:
        path = wish.spec.get("model", {}).get("path") if isinstance(wish.spec.get("model"), Mapping) else None
        return read_model(Path(path)) if wish.kind == "MoEService" and isinstance(path, str) else None

    def _target(self, drill: Wish) -> TargetFact | None:
        named = drill.spec.get("target", {})
        thing = self._store.get(str(named.get("kind")), drill.namespace, str(named.get("name")))
        if thing is None:
            return None
        wish = _seen(thing)
        client = self._runtimes.of(wish.uid)
        return TargetFact(wish, self._crew.facts(wish.uid), client.state if client else None)

    def _drills_of(self, key: Key) -> list[Manifest]:
        return [
            drill
            for drill in self._store.list("MoEDrill")
            if drill["metadata"]["namespace"] == key.namespace
            and drill["spec"].get("target") is not None
            and (drill["spec"]["target"].get("kind"), drill["spec"]["target"].get("name")) == (key.kind, key.name)
        ]

    def _delete_owner(self, owner: Manifest) -> None:
        key, uid = key_of(owner), owner["metadata"]["uid"]
        self._store.remove(key.kind, key.namespace, key.name)
        for pod in self._crew.of(uid, with_node=True):
            self._crew.delete(pod)
        for child in list(self._store.children(uid)):
            if child["kind"] != "Pod":
                self._store.remove(child["kind"], key.namespace, child["metadata"]["name"])
        self._runtimes.forget(uid)
        self._mark(owner)

    def _room_is_free(self) -> None:
        """Whoever waits for room should look again."""
        for kind in OWNER_KINDS:
            for thing in self._store.list(kind):
                self._mark(thing)
        self._dirty.pulse()

    def _mark_owner(self, pod: LocalPod) -> None:
        reference = pod.manifest["metadata"]["ownerReferences"][0]
        thing = self._store.get(reference["kind"], pod.namespace, reference["name"])
        if thing is not None:
            self._mark(thing)
        else:
            self._dirty.pulse()

    def _mark_wish(self, wish: Wish) -> None:
        self._mark(self._owner(wish))

    def _mark(self, thing: Manifest) -> None:
        """The resource's facts changed; so did those of drills aimed at it, and of a drill's target."""
        key = key_of(thing)
        if key.kind not in RESOURCE_KINDS:
            return
        if key.kind == "MoEDrill":
            target = thing["spec"].get("target", {})
            self._dirty.add(key, Key(target.get("kind"), key.namespace, target.get("name")))
        else:
            self._dirty.add(key, *map(key_of, self._drills_of(key)))


def _seen(thing: Manifest) -> Wish:
    """A copy: the brain decides in a thread of its own while objects change here."""
    return wish_of(deepcopy(thing))
