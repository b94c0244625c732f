"""What the watches brought, as records, and which keys a change makes dirty.

Fed by kopf's handlers and by the answers to our own changes (so that a cycle sees what the one before it did). Keyed by
uid: events of a deleted object and of its successor of the same name may arrive in any order. An answer and a watch may
cross, so an older resourceVersion never replaces a newer one, and a deleted uid never comes back.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moe_core.facts import NodeFact, ObjectFact, PodFact, Wish
from moe_core.outcome import Reason
from moe_operator.cluster.protocol import Key
from moe_operator.observe import (
    HOSTNAME_LABEL,
    KINDS,
    Owner,
    PodRecord,
    node_fact,
    object_fact,
    owner_of,
    pod_record,
    topology_levels,
    version_of,
    wish_of,
    with_node,
)

Object = Mapping[str, Any]
REMEMBERED_DELETIONS = 10_000


class Cache:
    """`mark` is called with every key whose facts have changed."""

    def __init__(self, mark: Callable[[Key], None]) -> None:
        self._mark = mark
        self._versions: dict[str, int] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self._plural_of: dict[str, str] = {}
        self._wishes: dict[str, Wish] = {}
        self._uid_of: dict[Key, str] = {}
        self._topologies: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {}
        self._nodes: dict[str, NodeFact] = {}
        self._node_of_hostname: dict[str, str] = {}
        self._pods: dict[str, PodRecord] = {}
        self._pods_of: defaultdict[str, set[str]] = defaultdict(set)
        self._claimed: defaultdict[Key, set[str]] = defaultdict(set)
        self._objects: dict[str, tuple[Owner, ObjectFact]] = {}
        self._objects_of: defaultdict[str, set[str]] = defaultdict(set)
        self._used: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._counted_on: dict[str, str] = {}
        self._drills_at: defaultdict[Key, set[str]] = defaultdict(set)

    # what a watch or an answer brings

    def put(self, plural: str, obj: Object) -> None:
        """Take a new state of an object of this resource (`pods`, `moejobs`, ...)."""
        uid, version = obj["metadata"]["uid"], version_of(obj)
        if uid in self._deleted or version <= self._versions.get(uid, -1):
            return
        self._versions[uid] = version
        self._plural_of[uid] = plural
        if plural == "pods":
            self._put_pod(uid, pod_record(obj))
        elif plural == "nodes":
            self._put_node(uid, node_fact(obj))
        elif plural == "clustertopologies":
            self._topologies[uid] = (obj["metadata"]["name"], topology_levels(obj))
            self._mark_all()
        elif obj["kind"] in KINDS:
            self._put_wish(wish_of(obj))
        else:
            self._put_object(uid, obj)

    def drop(self, uid: str) -> None:
        """The object of this uid is gone."""
        self._deleted[uid] = None
        if len(self._deleted) > REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)
        self._versions.pop(uid, None)
        plural = self._plural_of.pop(uid, None)
        if plural == "pods":
            self._put_pod(uid, None)
        elif plural == "nodes":
            self._put_node(uid, None)
        elif plural == "clustertopologies":
            del self._topologies[uid]
            self._mark_all()
        elif uid in self._wishes:
            self._drop_wish(uid)
        elif uid in self._objects:
            owner, _ = self._objects.pop(uid)
            self._objects_of[owner.uid].discard(uid)
            self._touch(owner.key)

    def uids(self, plural: str) -> set[str]:
        return {uid for uid, of in self._plural_of.items() if of == plural}

    def knows(self, uid: str) -> bool:
        """Whether this object has been seen, be it gone again or not."""
        return uid in self._plural_of or uid in self._deleted

    def mark_all(self) -> None:
        """Everything is looked at again: the safety net."""
        for key in self._uid_of:
            self._mark(key)

    # what facts are made of

    def wish(self, key: Key) -> Wish | None:
        uid = self._uid_of.get(key)
        return self._wishes[uid] if uid else None

    def count(self, kind: str) -> int:
        return sum(key.kind == kind for key in self._uid_of)

    def topologies(self) -> dict[str, tuple[tuple[str, str], ...]]:
        return dict(sorted(self._topologies.values()))

    def nodes(self, owner_uid: str) -> tuple[NodeFact, ...]:
        """All nodes by name; `used` leaves out this owner's own pods."""
        own: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for uid in self._pods_of.get(owner_uid, ()):
            if node := self._counted_on.get(uid):
                _add(own[node], self._pods[uid].requests, sign=1)
        facts = []
        for fact in sorted(self._nodes.values(), key=lambda node: node.name):
            used = dict(self._used.get(fact.name, {}))
            _add(used, own.get(fact.name, {}), sign=-1)
            facts.append(replace(fact, used=used))
        return tuple(facts)

    def hostname(self, node: str) -> str | None:
        """The value of the hostname label of a node, which need not be its name."""
        for fact in self._nodes.values():
            if fact.name == node:
                return fact.labels.get(HOSTNAME_LABEL)
        return None

    def pods(self, owner_uid: str) -> tuple[PodFact, ...]:
        records = (self._pods[uid] for uid in self._pods_of.get(owner_uid, ()))
        facts = (with_node(record, self._node_of(record)) for record in records)
        return tuple(sorted(facts, key=lambda fact: (fact.role, fact.index, fact.incarnation, fact.uid)))

    def pod(self, uid: str) -> PodRecord | None:
        return self._pods.get(uid)

    def objects(self, owner_uid: str) -> tuple[ObjectFact, ...]:
        facts = (self._objects[uid][1] for uid in self._objects_of.get(owner_uid, ()))
        return tuple(sorted(facts, key=lambda fact: (fact.kind, fact.name)))

    def foreign_pods(self, wish: Wish) -> tuple[str, ...]:
        """Pods that bear a child's name and are not children of this very wish."""
        key = Key(wish.kind, wish.namespace, wish.name)
        records = (self._pods[uid] for uid in self._claimed.get(key, ()))
        return tuple(sorted(f"Pod/{r.fact.name}" for r in records if r.owner is None or r.owner.uid != wish.uid))

    def drills_at(self, key: Key) -> tuple[Wish, ...]:
        """Drills that aim at this object, by name."""
        return tuple(sorted((self._wishes[uid] for uid in self._drills_at.get(key, ())), key=lambda wish: wish.name))

    # changes

    def _put_wish(self, wish: Wish) -> None:
        key = Key(wish.kind, wish.namespace, wish.name)
        self._wishes[wish.uid] = wish
        self._uid_of[key] = wish.uid
        self._touch(key)
        if target := target_of(wish):
            self._drills_at[target].add(wish.uid)
            self._mark(target)

    def _drop_wish(self, uid: str) -> None:
        wish = self._wishes.pop(uid)
        key = Key(wish.kind, wish.namespace, wish.name)
        if self._uid_of.get(key) == uid:
            del self._uid_of[key]
        self._touch(key)
        if target := target_of(wish):
            self._drills_at[target].discard(uid)
            self._mark(target)

    def _put_object(self, uid: str, obj: Object) -> None:
        owner, fact = owner_of(obj), object_fact(obj)
        before = self._objects.get(uid)
        if before is not None and (owner is None or owner != before[0]):
            self._objects_of[before[0].uid].discard(uid)
            del self._objects[uid]
            self._touch(before[0].key)
        if owner is not None:
            self._objects[uid] = (owner, fact)
            self._objects_of[owner.uid].add(uid)
            if before != (owner, fact):
                self._touch(owner.key)

    def _put_node(self, uid: str, fact: NodeFact | None) -> None:
        before = self._nodes.get(uid)
        if fact == before:
            return  # a heartbeat
        moved = before is not None and before.labels.get(HOSTNAME_LABEL)
        if moved:
            self._node_of_hostname.pop(str(moved), None)
        if fact is None:
            self._nodes.pop(uid, None)
        else:
            self._nodes[uid] = fact
            if hostname := fact.labels.get(HOSTNAME_LABEL):
                self._node_of_hostname[hostname] = fact.name
        self._mark_all()

    def _put_pod(self, uid: str, record: PodRecord | None) -> None:
        before = self._pods.pop(uid, None)
        if before is not None:
            self._forget_pod(uid, before)
        if record is not None:
            self._pods[uid] = record
            self._note_pod(uid, record)
        if record == before:
            return
        for either in (before, record):
            if either is None:
                continue
            if either.owner is not None:
                self._touch(either.owner.key)
            if either.claims is not None:
                self._mark(either.claims)
        if _takes(before) != _takes(record):
            self._mark_waiting()

    def _note_pod(self, uid: str, record: PodRecord) -> None:
        if record.owner is not None:
            self._pods_of[record.owner.uid].add(uid)
        if record.claims is not None:
            self._claimed[record.claims].add(uid)
        if node := self._node_of(record):
            self._counted_on[uid] = node
            _add(self._used[node], record.requests, sign=1)

    def _forget_pod(self, uid: str, record: PodRecord) -> None:
        if record.owner is not None:
            self._pods_of[record.owner.uid].discard(uid)
        if record.claims is not None:
            self._claimed[record.claims].discard(uid)
        if node := self._counted_on.pop(uid, None):
            _add(self._used[node], record.requests, sign=-1)

    def _node_of(self, record: PodRecord) -> str | None:
        if record.node is None and record.hostname is not None:
            return self._node_of_hostname.get(record.hostname, record.hostname)
        return record.node

    def _touch(self, key: Key) -> None:
        """Mark a key and the drills that aim at it."""
        self._mark(key)
        for drill in self.drills_at(key):
            self._mark(Key(drill.kind, drill.namespace, drill.name))

    def _mark_all(self) -> None:
        for key in self._uid_of:
            if key.kind != "MoEDrill":
                self._mark(key)

    def _mark_waiting(self) -> None:
        """Room was taken or given back: of interest only to those that wait for room."""
        for uid, wish in self._wishes.items():
            if _waits_for_room(wish) or any(self._pods[pod].fact.gated for pod in self._pods_of.get(uid, ())):
                self._mark(Key(wish.kind, wish.namespace, wish.name))


def target_of(drill: Wish) -> Key | None:
    """What a MoEDrill aims at; None for other kinds. The API server has checked its shape."""
    if drill.kind != "MoEDrill" or "target" not in drill.spec:
        return None
    target = drill.spec["target"]
    return Key(target["kind"], drill.namespace, target["name"])


def _waits_for_room(wish: Wish) -> bool:
    return any(c.get("reason") == Reason.NO_FIT for c in wish.status.get("conditions", ()))


def _takes(record: PodRecord | None) -> tuple[str | None, str | None, Mapping[str, int]] | None:
    return None if record is None else (record.node, record.hostname, record.requests)


def _add(total: dict[str, int], more: Mapping[str, int], *, sign: int) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0) + sign * value
