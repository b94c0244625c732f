"""The objects of the local shell: in memory, and mirrored as YAML files so that a person can look.

Layout of the mirror: objects/<Kind>/<namespace>.<name>.yaml. Secrets are not mirrored.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from moe_core.decide.times import rfc3339
from moe_operator.cluster.protocol import Foreign, Key

Manifest = dict[str, Any]
ObjectKey = tuple[str, str, str]
"""kind, namespace, name"""

UNSEEN_KINDS = frozenset({"Secret"})
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class ObjectStore:
    """Objects by kind, namespace and name, with uids and generations as an API server would set them."""

    def __init__(self, mirror: Path, *, clock: Callable[[], float]) -> None:
        self._mirror = mirror
        self._clock = clock
        self._objects: dict[ObjectKey, Manifest] = {}
        self._unwritten: dict[ObjectKey, None] = {}
        self._version = 0

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        return self._objects.get((kind, namespace, name))

    def list(self, kind: str | None = None) -> Iterator[Manifest]:
        """All objects, or those of one kind, in order of name."""
        for key in sorted(self._objects):
            if kind is None or key[0] == kind:
                yield self._objects[key]

    def children(self, owner_uid: str) -> Iterator[Manifest]:
        return (thing for thing in self.list() if owner_uid_of(thing) == owner_uid)

    def put_resource(self, document: Mapping[str, Any]) -> tuple[Manifest, bool]:
        """Create a custom resource or change its spec, as `kubectl apply` does. Returns it and whether it changed."""
        kind, meta = str(document["kind"]), document["metadata"]
        namespace, name = str(meta.get("namespace") or "default"), str(meta["name"])
        thing = self.get(kind, namespace, name)
        if thing is None:
            thing = {
                "apiVersion": document["apiVersion"],
                "kind": kind,
                "metadata": {**deepcopy(dict(meta)), "namespace": namespace, "uid": str(uuid.uuid4()), "generation": 1},
                "spec": deepcopy(document.get("spec", {})),
                "status": {},
            }
            thing["metadata"]["creationTimestamp"] = rfc3339(self._clock())
        elif thing["spec"] == document.get("spec", {}):
            return thing, False
        else:
            thing["spec"] = deepcopy(document.get("spec", {}))
            thing["metadata"]["generation"] += 1
        self._put(thing)
        return thing, True

    def put_child(self, manifest: Mapping[str, Any], *, owner: Mapping[str, Any]) -> None:
        """Apply an object owned by `owner`. Raises Foreign when one of that name is somebody else's."""
        meta = owner["metadata"]
        thing = deepcopy(dict(manifest))
        thing["metadata"] = {**thing["metadata"], "namespace": meta["namespace"]}
        kind, name = thing["kind"], thing["metadata"]["name"]
        old = self.get(kind, meta["namespace"], name)
        if old is not None and owner_uid_of(old) != meta["uid"]:
            raise Foreign(f"{kind}/{name} exists and is not owned by {owner['kind']}/{meta['name']}")
        if old is not None and "status" in old:
            thing["status"] = old["status"]
        thing["metadata"] |= {
            "uid": old["metadata"]["uid"] if old else thing["metadata"].get("uid") or str(uuid.uuid4()),
            "creationTimestamp": old["metadata"]["creationTimestamp"] if old else rfc3339(self._clock()),
            "ownerReferences": [
                {
                    "apiVersion": owner["apiVersion"],
                    "kind": owner["kind"],
                    "name": meta["name"],
                    "uid": meta["uid"],
                    "controller": True,
                }
            ],
        }
        self._put(thing)

    def touch(self, thing: Manifest) -> None:
        """`thing`, already stored, was changed in place."""
        self._put(thing)

    def remove(self, kind: str, namespace: str, name: str) -> None:
        if self._objects.pop((kind, namespace, name), None) is not None:
            self._unwritten.pop((kind, namespace, name), None)
            self._file((kind, namespace, name)).unlink(missing_ok=True)

    def write_mirror(self) -> None:
        """Write what has changed since the last call: a person looks once a second, objects change far more often."""
        keys, self._unwritten = list(self._unwritten), {}
        for key in keys:
            path = self._file(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(yaml.dump(self._objects[key], Dumper=_Dumper, sort_keys=False, width=120))
            part.replace(path)

    def _put(self, thing: Manifest) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        key = (thing["kind"], thing["metadata"]["namespace"], thing["metadata"]["name"])
        self._objects[key] = thing
        if thing["kind"] not in UNSEEN_KINDS:
            self._unwritten[key] = None

    def _file(self, key: ObjectKey) -> Path:
        kind, namespace, name = key
        return self._mirror / kind / f"{namespace}.{name}.yaml"


def key_of(thing: Mapping[str, Any]) -> Key:
    """Key of a custom resource."""
    return Key(thing["kind"], thing["metadata"]["namespace"], thing["metadata"]["name"])


def owner_uid_of(thing: Mapping[str, Any]) -> str | None:
    for reference in thing["metadata"].get("ownerReferences", ()):
        if reference.get("controller"):
            return str(reference["uid"])
    return None
