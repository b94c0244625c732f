"""The verbs of protocol.py on an API server.

Every change names what it expects to find: ownership is checked before an object is touched, deletions and patches
carry the uid that was seen. A foreign object is refused by name and never changed.
"""

import asyncio
import base64
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from moe_core.contract.names import (
    ANNOTATION_SPEC_DIGEST,
    API_VERSION,
    FIELD_MANAGER,
    GROUP,
    SCHEDULING_GATE,
    TOKEN_KEY,
    owner_labels,
)
from moe_core.facts import (
    ApplyObject,
    BindPod,
    CreatePod,
    DeleteObject,
    DeletePod,
    EnsureToken,
    Event,
    Facts,
    NetworkFact,
    ReportMap,
    TargetFact,
    Wish,
)
from moe_operator.cluster.kubernetes import APPLY_PATCH, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, KubeApi, NotFound
from moe_operator.cluster.kubernetes_cache import Cache, target_of
from moe_operator.cluster.kubernetes_paths import api_version_of, is_owned, path_of, plural_of
from moe_operator.cluster.kubernetes_runtimes import Runtimes
from moe_operator.cluster.protocol import Conflict, Foreign, Key, RuntimeFace
from moe_operator.observe import HOSTNAME_LABEL, Object, describe_owner, owner_reference
from moe_operator.settings import OperatorSettings

logger = logging.getLogger(__name__)

EVENT_NOTE_LIMIT = 1024
FOREIGN_LOOK_S = 3.0


class KubernetesCluster:
    """Implements `Cluster`. `api` and `cache` are fed and closed by whoever made them."""

    def __init__(self, api: KubeApi, settings: OperatorSettings, *, clock: Callable[[], float]) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._dirty: asyncio.Queue[Key] = asyncio.Queue()
        self.cache = Cache(self._dirty.put_nowait)
        self._runtimes = Runtimes(api, self.cache, url=settings.coordinator_url, mark=self._mark_with_drills)
        self._network = (
            NetworkFact(settings.lease_namespace, settings.metrics_namespaces) if settings.network_policy else None
        )
        self._keys: dict[str, Key] = {}
        self._foreign: dict[str, set[tuple[str, str]]] = {}
        self._looks: dict[str, asyncio.TimerHandle] = {}

    async def close(self) -> None:
        await self._runtimes.close()

    def distrust(self) -> None:
        """Read anew, when it is next asked for, what no watch tells about."""
        self._runtimes.distrust()

    async def dirty(self) -> AsyncIterator[Key]:
        while True:
            yield await self._dirty.get()

    # observation

    async def observe(self, key: Key) -> tuple[Wish, Facts] | None:
        await self._forget_gone(key)
        wish = self.cache.wish(key)
        if wish is None:
            return None
        self._keys[wish.uid] = key
        # What must be asked for first, then everything from the caches in one breath: a pod that the runtime knows must
        # not be missing among the pods, or it would count as gone.
        runtime = await self._runtimes.follow(wish)
        secret = await self._runtimes.secret(wish)
        foreign = await self._foreign_objects(wish)
        target = await self._target(wish)
        facts = Facts(
            nodes=self.cache.nodes(wish.uid),
            pods=self.cache.pods(wish.uid),
            objects=(*self.cache.objects(wish.uid), *secret),
            foreign=tuple(sorted({*self.cache.foreign_pods(wish), *foreign})),
            topologies=self.cache.topologies(),
            runtime=runtime.state if runtime else None,
            put_generation=runtime.put_generation if runtime else None,
            target=target,
            network=self._network,
            default_image=self._settings.runtime_image,
        )
        latest = self.cache.wish(key)
        return (latest if latest is not None and latest.uid == wish.uid else wish), facts

    def runtime(self, wish: Wish) -> RuntimeFace:
        """Of the target for a drill. Raises Unavailable at its first use when no coordinator exists yet."""
        target = target_of(wish)
        owner = self.cache.wish(target) if target else wish
        return self._runtimes.of(owner or wish)

    def _mark_with_drills(self, key: Key) -> None:
        self._dirty.put_nowait(key)
        for drill in self.cache.drills_at(key):
            self._dirty.put_nowait(Key(drill.kind, drill.namespace, drill.name))

    async def _target(self, drill: Wish) -> TargetFact | None:
        target = target_of(drill)
        wish = self.cache.wish(target) if target else None
        if wish is None:
            return None
        runtime = await self._runtimes.follow(wish)
        return TargetFact(wish, self.cache.pods(wish.uid), runtime.state if runtime else None)

    async def _foreign_objects(self, wish: Wish) -> list[str]:
        """Objects that a verb refused to touch, as far as they are still in the way."""
        still: set[tuple[str, str]] = set()
        for kind, name in sorted(self._foreign.get(wish.uid, ())):
            obj = await self._api.find(path_of(kind, wish.namespace, name))
            if obj is not None and not is_owned(obj, wish):
                still.add((kind, name))
        if still:
            self._foreign[wish.uid] = still
            key = Key(wish.kind, wish.namespace, wish.name)  # no watch tells when it goes
            if wish.uid in self._looks:
                self._looks[wish.uid].cancel()
            loop = asyncio.get_running_loop()
            self._looks[wish.uid] = loop.call_later(FOREIGN_LOOK_S, self._dirty.put_nowait, key)
        else:
            self._foreign.pop(wish.uid, None)
            self._looks.pop(wish.uid, None)
        return sorted(f"{kind}/{name}" for kind, name in still if kind != "Pod")

    async def _forget_gone(self, key: Key) -> None:
        wish = self.cache.wish(key)
        for uid in [uid for uid, of in self._keys.items() if of == key and (wish is None or wish.uid != uid)]:
            del self._keys[uid]
            self._foreign.pop(uid, None)
            await self._runtimes.forget(uid)

    # changes

    async def apply_object(self, wish: Wish, action: ApplyObject) -> None:
        self._check_still_wished(wish)
        body = self._child(wish, action.manifest, kind=action.kind, name=action.name, digest=action.digest)
        path = path_of(action.kind, wish.namespace, action.name)
        existing = await self._api.find(path)
        if existing is None:
            # Not by server-side apply: that would quietly join an object which somebody else makes at this very moment.
            made = await self._api.create(path_of(action.kind, wish.namespace), body, fieldManager=FIELD_MANAGER)
        else:
            self._check_owner(wish, action.kind, existing)
            await self._own_fields_by_apply(path, existing)
            body["metadata"]["uid"] = existing["metadata"]["uid"]
            made = await self._api.patch(path, body, APPLY_PATCH, fieldManager=FIELD_MANAGER, force="true")
        self._learn(action.kind, made)

    async def ensure_token(self, wish: Wish, action: EnsureToken) -> None:
        path = path_of("Secret", wish.namespace, action.name)
        secret = await self._api.find(path)
        if secret is None:
            value = base64.b64encode(secrets.token_urlsafe(32).encode()).decode()
            manifest = {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "Opaque",
                "immutable": True,
                "data": {TOKEN_KEY: value},
            }
            body = self._child(wish, manifest, kind="Secret", name=action.name, digest="")
            secret = await self._api.create(path_of("Secret", wish.namespace), body, fieldManager=FIELD_MANAGER)
        self._check_owner(wish, "Secret", secret)
        self._runtimes.learn_token(wish, secret)

    async def create_pod(self, wish: Wish, action: CreatePod) -> None:
        self._check_still_wished(wish)
        body = self._child(wish, action.manifest, kind="Pod", name=action.name, digest=None)
        try:
            pod = await self._api.create(path_of("Pod", wish.namespace), body, fieldManager=FIELD_MANAGER)
        except Conflict:
            existing = await self._api.find(path_of("Pod", wish.namespace, action.name))
            if existing is None:
                raise
            self._check_owner(wish, "Pod", existing)
            pod = existing  # an earlier cycle made it and did not live to see the answer
        self._learn("Pod", pod)

    async def bind_pod(self, wish: Wish, action: BindPod) -> None:
        record = self.cache.pod(action.uid)
        if record is None:
            raise Conflict(f"Pod {action.name} of uid {action.uid} is gone")
        if record.owner is None or record.owner.uid != wish.uid:
            raise Foreign(f"Pod {action.name} is not a child of {wish.kind} {wish.name}")
        if not record.fact.gated:
            return
        hostname = self.cache.hostname(action.node)
        if hostname is None:
            raise Conflict(f"node {action.node} is gone or has no label {HOSTNAME_LABEL}")
        # One transaction: the node is named and only our gate goes; the uid makes it this very pod or nothing.
        patch = {
            "metadata": {"uid": action.uid},
            "spec": {
                "nodeSelector": {HOSTNAME_LABEL: hostname},
                "schedulingGates": [{"name": SCHEDULING_GATE, "$patch": "delete"}],
            },
        }
        path = path_of("Pod", wish.namespace, action.name)
        try:
            pod = await self._api.patch(path, patch, STRATEGIC_PATCH, fieldManager=FIELD_MANAGER)
        except NotFound as error:
            raise Conflict(str(error)) from error
        self._learn("Pod", pod)

    async def delete_pod(self, wish: Wish, action: DeletePod) -> None:
        record = self.cache.pod(action.uid)
        if record is None:
            return
        if record.owner is None or record.owner.uid != wish.uid:
            raise Foreign(f"Pod {action.name} is not a child of {wish.kind} {wish.name}")
        await self._delete(path_of("Pod", wish.namespace, action.name), action.uid)

    async def delete_object(self, wish: Wish, action: DeleteObject) -> None:
        path = path_of(action.kind, wish.namespace, action.name)
        existing = await self._api.find(path)
        if existing is None:
            return
        self._check_owner(wish, action.kind, existing)
        await self._delete(path, existing["metadata"]["uid"], propagation="Background")

    async def delete_owner(self, wish: Wish) -> None:
        path = path_of(wish.kind, wish.namespace, wish.name)
        await self._delete(path, wish.uid, propagation="Background")

    async def _delete(self, path: str, uid: str, *, propagation: str = "") -> None:
        body: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        body |= {"propagationPolicy": propagation} if propagation else {}
        try:
            await self._api.delete(path, body)
        except NotFound:
            pass
        except Conflict:
            # The uid is what may not match; then the object meant is gone, which was the wish.
            existing = await self._api.find(path)
            if existing is not None and existing["metadata"]["uid"] == uid:
                raise

    # report

    async def write_status(
        self, wish: Wish, *, conditions: Sequence[Mapping[str, Any]], status: Mapping[str, Any]
    ) -> None:
        body = {
            "apiVersion": API_VERSION,
            "kind": wish.kind,
            "metadata": {"name": wish.name, "uid": wish.uid},
            "status": {**status, "conditions": list(conditions)},
        }
        path = path_of(wish.kind, wish.namespace, wish.name) + "/status"
        try:
            written = await self._api.patch(path, body, APPLY_PATCH, fieldManager=FIELD_MANAGER, force="true")
        except NotFound:
            return  # deleted meanwhile; the watch will say so
        self._learn(wish.kind, written)

    async def report_map(self, wish: Wish, action: ReportMap) -> None:
        path = path_of("ExpertMap", wish.namespace, action.name)
        existing = await self._api.find(path)
        if existing is None:
            return
        self._check_owner(wish, "ExpertMap", existing)
        body = {
            "apiVersion": API_VERSION,
            "kind": "ExpertMap",
            "metadata": {"name": action.name, "uid": existing["metadata"]["uid"]},
            "status": dict(action.status),
        }
        try:
            written = await self._api.patch(
                f"{path}/status", body, APPLY_PATCH, fieldManager=FIELD_MANAGER, force="true"
            )
        except NotFound:
            return
        self._learn("ExpertMap", written)

    async def emit(self, wish: Wish, event: Event) -> None:
        """Named by what it says: the same event again only counts up, also after a restart."""
        note = (
            event.message if len(event.message) <= EVENT_NOTE_LIMIT else event.message[: EVENT_NOTE_LIMIT - 3] + "..."
        )
        digest = hashlib.sha256("\n".join((wish.uid, event.type, event.reason, note)).encode()).hexdigest()[:16]
        now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        collection = f"/apis/events.k8s.io/v1/namespaces/{wish.namespace}/events"
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{wish.name}.{digest}", "namespace": wish.namespace},
            "eventTime": now,
            "type": event.type,
            "reason": event.reason.value,
            "note": note,
            "action": "Reconcile",
            "reportingController": f"{GROUP}/operator",
            "reportingInstance": self._settings.identity[:128],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": wish.kind,
                "namespace": wish.namespace,
                "name": wish.name,
                "uid": wish.uid,
            },
        }
        try:
            await self._api.create(collection, body)
        except Conflict:
            path = f"{collection}/{wish.name}.{digest}"
            existing = await self._api.find(path)
            count = ((existing or {}).get("series") or {}).get("count", 1) + 1
            await self._api.patch(path, {"series": {"count": count, "lastObservedTime": now}}, MERGE_PATCH)

    # ownership

    def _child(
        self, wish: Wish, manifest: Mapping[str, Any], *, kind: str, name: str, digest: str | None
    ) -> dict[str, Any]:
        """The manifest as a child of `wish`: owner, labels, and the digest of what is applied."""
        metadata = dict(manifest.get("metadata") or {})
        annotations = dict(metadata.get("annotations") or {})
        if digest is not None:
            annotations[ANNOTATION_SPEC_DIGEST] = digest
        metadata |= {
            "name": name,
            "namespace": wish.namespace,
            "labels": {**(metadata.get("labels") or {}), **owner_labels(wish.kind, wish.name)},
            "annotations": annotations,
            "ownerReferences": [owner_reference(wish)],
        }
        return {**manifest, "apiVersion": api_version_of(kind), "kind": kind, "metadata": metadata}

    def _check_still_wished(self, wish: Wish) -> None:
        """Create nothing for an owner that was deleted since the decision: it would only be collected again."""
        now = self.cache.wish(Key(wish.kind, wish.namespace, wish.name))
        if now is None or now.uid != wish.uid or now.deleting:
            raise Conflict(f"{wish.kind} {wish.name} of uid {wish.uid} was deleted meanwhile")

    def _check_owner(self, wish: Wish, kind: str, obj: Object) -> None:
        if not is_owned(obj, wish):
            name = obj["metadata"]["name"]
            self._foreign.setdefault(wish.uid, set()).add((kind, name))
            raise Foreign(f"{kind} {name} exists and is not a child of {wish.kind} {wish.name}: {describe_owner(obj)}")

    async def _own_fields_by_apply(self, path: str, existing: Object) -> None:
        """Turn our ownership of fields by creation into one by apply, once.

        Otherwise a field that a later apply leaves out would stay, because the creation still owns it.
        """
        entries = existing["metadata"].get("managedFields", [])
        mine = [
            index
            for index, entry in enumerate(entries)
            if entry.get("manager") == FIELD_MANAGER and entry["operation"] == "Update" and not entry.get("subresource")
        ]
        if not mine:
            return
        has_applied = any(e.get("manager") == FIELD_MANAGER and e["operation"] == "Apply" for e in entries)
        kept = [
            {**entry, "operation": "Apply"} if index in mine else entry
            for index, entry in enumerate(entries)
            if not (index in mine and has_applied)
        ]
        metadata = existing["metadata"]
        patch = [
            {"op": "test", "path": "/metadata/uid", "value": metadata["uid"]},
            {"op": "replace", "path": "/metadata/managedFields", "value": kept},
            {"op": "replace", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
        ]
        await self._api.patch(path, patch, JSON_PATCH)

    def _learn(self, kind: str, obj: Object) -> None:
        """Take the answer to a change of ours, so that the next cycle sees it before the watch brings it."""
        self.cache.put(plural_of(kind), {"kind": kind, **obj})
