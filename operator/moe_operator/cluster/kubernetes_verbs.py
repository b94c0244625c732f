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
    COORDINATOR_PORT,
    FIELD_MANAGER,
    GROUP,
    ROLE_COORDINATOR,
    SCHEDULING_GATE,
    VERSION,
    child_name,
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
    ObjectFact,
    TargetFact,
    Wish,
)
from moe_operator.cluster.kubernetes import APPLY_PATCH, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, KubeApi, NotFound
from moe_operator.cluster.kubernetes_cache import Cache, target_of
from moe_operator.cluster.protocol import Conflict, Foreign, Key, RuntimeFace
from moe_operator.observe import HOSTNAME_LABEL, Object, describe_owner, owner_of, owner_reference
from moe_operator.runtime_client import RuntimeClient
from moe_operator.settings import OperatorSettings

logger = logging.getLogger(__name__)

TOKEN_KEY = "token"
EVENT_NOTE_LIMIT = 1024
FOREIGN_LOOK_S = 3.0
_PREFIX_OF_GROUP = {"": "/api/v1", GROUP: f"/apis/{GROUP}/{VERSION}"}
_RESOURCES: dict[str, tuple[str, str]] = {
    "Pod": ("", "pods"),
    "ConfigMap": ("", "configmaps"),
    "Service": ("", "services"),
    "Secret": ("", "secrets"),
    "MoEJob": (GROUP, "moejobs"),
    "MoEService": (GROUP, "moeservices"),
    "MoEDrill": (GROUP, "moedrills"),
    "ExpertMap": (GROUP, "expertmaps"),
}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """The API's path of an object, or of its collection when no name is given.

    >>> path_of("MoEJob", "team-a", "tiny")
    '/apis/moerator.dev/v1alpha1/namespaces/team-a/moejobs/tiny'
    """
    group, plural = _RESOURCES[kind]
    return f"{_PREFIX_OF_GROUP[group]}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


class KubernetesCluster:
    """Implements `Cluster`. `api` and `cache` are fed and closed by whoever made them."""

    def __init__(self, api: KubeApi, settings: OperatorSettings, *, clock: Callable[[], float]) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._dirty: asyncio.Queue[Key] = asyncio.Queue()
        self.cache = Cache(self._dirty.put_nowait)
        self._runtimes: dict[str, RuntimeClient] = {}
        self._keys: dict[str, Key] = {}
        self._tokens: dict[str, str] = {}
        self._tokens_checked: set[str] = set()
        self._foreign: dict[str, set[tuple[str, str]]] = {}

    async def close(self) -> None:
        for runtime in self._runtimes.values():
            await runtime.close()
        self._runtimes.clear()

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
        runtime = await self._follow_runtime(wish)
        facts = Facts(
            nodes=self.cache.nodes(wish.uid),
            pods=self.cache.pods(wish.uid),
            objects=(*self.cache.objects(wish.uid), *await self._secret(wish)),
            foreign=tuple(sorted({*self.cache.foreign_pods(wish), *await self._foreign_objects(wish)})),
            topologies=self.cache.topologies(),
            runtime=runtime.state if runtime else None,
            put_generation=runtime.put_generation if runtime else None,
            drills=self.cache.drills_at(key),
            target=await self._target(wish),
            default_image=self._settings.runtime_image,
        )
        return wish, facts

    def runtime(self, wish: Wish) -> RuntimeFace:
        """Of the target for a drill. Raises Unavailable at its first use when no coordinator exists yet."""
        target = target_of(wish)
        owner = self.cache.wish(target) if target else wish
        return self._client_of(owner or wish)

    def _client_of(self, wish: Wish) -> RuntimeClient:
        if wish.uid not in self._runtimes:
            key = Key(wish.kind, wish.namespace, wish.name)
            url = self._settings.coordinator_url.format(
                service=child_name(wish.kind, wish.name, ROLE_COORDINATOR),
                namespace=wish.namespace,
                port=COORDINATOR_PORT,
            )
            self._runtimes[wish.uid] = RuntimeClient(
                url, token=lambda: self._tokens.get(wish.uid), on_change=lambda: self._mark_with_drills(key)
            )
        return self._runtimes[wish.uid]

    def _mark_with_drills(self, key: Key) -> None:
        self._dirty.put_nowait(key)
        for drill in self.cache.drills_at(key):
            self._dirty.put_nowait(Key(drill.kind, drill.namespace, drill.name))

    async def _follow_runtime(self, wish: Wish) -> RuntimeClient | None:
        """Poll the coordinator of this wish as long as it has a pod that runs."""
        if wish.kind == "MoEDrill":
            return None
        pods = self.cache.pods(wish.uid)
        if not any(pod.role == ROLE_COORDINATOR and pod.phase == "Running" for pod in pods):
            if (idle := self._runtimes.pop(wish.uid, None)) is not None:
                await idle.close()
            return None
        await self._secret(wish)
        client = self._client_of(wish)
        client.start()
        if wish.status.get("epoch"):  # a group has formed before this process looked
            await client.first_answer()
        return client

    async def _secret(self, wish: Wish) -> tuple[ObjectFact, ...]:
        """The token's Secret, read by name and seldom: watching Secrets would need a right to all of them."""
        if wish.kind == "MoEDrill":
            return ()
        name = child_name(wish.kind, wish.name, "token")
        if wish.uid not in self._tokens_checked:
            secret = await self._api.find(path_of("Secret", wish.namespace, name))
            if secret is None or not _is_owned(secret, wish):
                self._tokens.pop(wish.uid, None)
                return ()
            self._learn_token(wish, secret)
        return (ObjectFact("Secret", name, ""),)

    def _learn_token(self, wish: Wish, secret: Object) -> None:
        self._tokens[wish.uid] = base64.b64decode(secret["data"][TOKEN_KEY]).decode()
        self._tokens_checked.add(wish.uid)

    def distrust(self) -> None:
        """Read anew, when it is next asked for, what no watch tells about."""
        self._tokens_checked.clear()

    async def _target(self, drill: Wish) -> TargetFact | None:
        target = target_of(drill)
        wish = self.cache.wish(target) if target else None
        if wish is None:
            return None
        runtime = await self._follow_runtime(wish)
        return TargetFact(wish, self.cache.pods(wish.uid), runtime.state if runtime else None)

    async def _foreign_objects(self, wish: Wish) -> list[str]:
        """Objects that a verb refused to touch, as far as they are still in the way."""
        still: set[tuple[str, str]] = set()
        for kind, name in self._foreign.get(wish.uid, ()):
            obj = await self._api.find(path_of(kind, wish.namespace, name))
            if obj is not None and not _is_owned(obj, wish):
                still.add((kind, name))
        if still:
            self._foreign[wish.uid] = still
            key = Key(wish.kind, wish.namespace, wish.name)  # no watch tells when it goes
            asyncio.get_running_loop().call_later(FOREIGN_LOOK_S, self._dirty.put_nowait, key)
        else:
            self._foreign.pop(wish.uid, None)
        return [f"{kind}/{name}" for kind, name in still if kind != "Pod"]

    async def _forget_gone(self, key: Key) -> None:
        wish = self.cache.wish(key)
        for uid in [uid for uid, of in self._keys.items() if of == key and (wish is None or wish.uid != uid)]:
            del self._keys[uid]
            self._tokens.pop(uid, None)
            self._tokens_checked.discard(uid)
            self._foreign.pop(uid, None)
            if (runtime := self._runtimes.pop(uid, None)) is not None:
                await runtime.close()

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
        self._learn_token(wish, secret)

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
        grace = {} if action.grace_seconds is None else {"gracePeriodSeconds": action.grace_seconds}
        await self._delete(path_of("Pod", wish.namespace, action.name), action.uid, grace)

    async def delete_object(self, wish: Wish, action: DeleteObject) -> None:
        path = path_of(action.kind, wish.namespace, action.name)
        existing = await self._api.find(path)
        if existing is None:
            return
        self._check_owner(wish, action.kind, existing)
        await self._delete(path, existing["metadata"]["uid"], {"propagationPolicy": "Background"})

    async def delete_owner(self, wish: Wish) -> None:
        path = path_of(wish.kind, wish.namespace, wish.name)
        await self._delete(path, wish.uid, {"propagationPolicy": "Background"})

    async def _delete(self, path: str, uid: str, options: Mapping[str, Any]) -> None:
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}, **options}
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
        group, _ = _RESOURCES[kind]
        version = f"{group}/{VERSION}" if group else "v1"
        return {**manifest, "apiVersion": version, "kind": kind, "metadata": metadata}

    def _check_still_wished(self, wish: Wish) -> None:
        """Create nothing for an owner that was deleted since the decision: it would only be collected again."""
        now = self.cache.wish(Key(wish.kind, wish.namespace, wish.name))
        if now is None or now.uid != wish.uid or now.deleting:
            raise Conflict(f"{wish.kind} {wish.name} of uid {wish.uid} was deleted meanwhile")

    def _check_owner(self, wish: Wish, kind: str, obj: Object) -> None:
        if not _is_owned(obj, wish):
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
        _, plural = _RESOURCES[kind]
        self.cache.put(plural, {"kind": kind, **obj})


def _is_owned(obj: Object, wish: Wish) -> bool:
    owner = owner_of(obj)
    return owner is not None and owner.uid == wish.uid
