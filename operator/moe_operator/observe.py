"""Kubernetes objects, parsed once where they enter: small frozen records instead of documents.

What is not needed to decide (managedFields, most of a pod) is dropped here, so that caches of big clusters stay small.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from moe_core.contract.names import (
    ANNOTATION_SPEC_DIGEST,
    API_VERSION,
    GROUP,
    LABEL_INCARNATION,
    LABEL_RANK,
    LABEL_ROLE,
    ROLE_RANK,
    SCHEDULING_GATE,
    index_of_pod,
)
from moe_core.decide.times import seconds_of
from moe_core.facts import Kind, NodeFact, ObjectFact, PodFact, Taint, Wish
from moe_core.topology.quantity import base_units
from moe_operator.cluster.protocol import Key

Object = Mapping[str, Any]

HOSTNAME_LABEL = "kubernetes.io/hostname"
KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_OF_SHORT: dict[str, Kind] = {"job": "MoEJob", "svc": "MoEService"}
_POD_NAME = re.compile(r"(?P<owner>.+)-(?P<short>job|svc)-(?:coordinator|rank|gateway)-\d+-\d+")
_FINISHED = frozenset({"Succeeded", "Failed"})


@dataclass(frozen=True, slots=True)
class Owner:
    """The controller of an object, if it is one of ours."""

    key: Key
    uid: str


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod, ours or not. `node` is bound or wished; `requests` are in base units, empty once it has finished.

    `claims` is the owner that its name speaks of, whether or not that is true.
    """

    fact: PodFact
    namespace: str
    owner: Owner | None
    claims: Key | None
    node: str | None
    hostname: str | None
    requests: Mapping[str, int]


def version_of(obj: Object) -> int:
    """The resourceVersion as the number that the API promises it to be within one resource."""
    return int(obj["metadata"].get("resourceVersion") or 0)


def owner_of(obj: Object) -> Owner | None:
    """Our custom resource that controls this object."""
    metadata = obj["metadata"]
    for reference in metadata.get("ownerReferences", ()):
        ours = str(reference["apiVersion"]).split("/")[0] == GROUP and reference["kind"] in KINDS
        if ours and reference.get("controller"):
            return Owner(Key(reference["kind"], metadata.get("namespace", ""), reference["name"]), reference["uid"])
    return None


def owner_reference(wish: Wish) -> dict[str, Any]:
    """What makes an object ours. No blockOwnerDeletion: it would need a right on finalizers and wins nothing."""
    return {"apiVersion": API_VERSION, "kind": wish.kind, "name": wish.name, "uid": wish.uid, "controller": True}


def describe_owner(obj: Object) -> str:
    """Who owns a foreign object, in words."""
    names = [f"{ref['kind']} {ref['name']} (uid {ref['uid']})" for ref in obj["metadata"].get("ownerReferences", ())]
    return f"it belongs to {' and '.join(names)}" if names else "it has no owner"


def wish_of(obj: Object) -> Wish:
    metadata = obj["metadata"]
    return Wish(
        kind=obj["kind"],
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 0)),
        spec=obj.get("spec") or {},
        status=obj.get("status") or {},
        created_at=seconds_of(metadata.get("creationTimestamp")) or 0.0,
        deleting="deletionTimestamp" in metadata,
    )


def topology_levels(obj: Object) -> tuple[tuple[str, str], ...]:
    return tuple((level["name"], level["nodeLabel"]) for level in obj["spec"]["levels"])


def object_fact(obj: Object) -> ObjectFact:
    metadata = obj["metadata"]
    digest = (metadata.get("annotations") or {}).get(ANNOTATION_SPEC_DIGEST, "")
    if obj["kind"] != "ExpertMap":
        return ObjectFact(kind=obj["kind"], name=metadata["name"], digest=digest)
    version = f"{metadata.get('uid')}/{metadata.get('generation')}/{digest}"
    status, spec = obj.get("status") or {}, obj.get("spec") or {}
    return ObjectFact("ExpertMap", metadata["name"], digest, status=status, spec=spec, version=version)


def node_fact(obj: Object) -> NodeFact:
    """A node without its use, which only the pods on it tell."""
    metadata, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    condition: Object = next((c for c in status.get("conditions", ()) if c["type"] == "Ready"), {})
    since = metadata.get("deletionTimestamp") or condition.get("lastTransitionTime")
    ready = condition.get("status") == "True" and "deletionTimestamp" not in metadata
    return NodeFact(
        name=metadata["name"],
        labels=dict(metadata.get("labels") or {}),
        allocatable={
            name: base_units(name, value, round_up=False) for name, value in (status.get("allocatable") or {}).items()
        },
        ready=ready,
        not_ready_since=seconds_of(since) if since and not ready else None,
        unschedulable=bool(spec.get("unschedulable")),
        taints=tuple(Taint(t["key"], t.get("value", ""), t["effect"]) for t in spec.get("taints", ())),
    )


def pod_record(obj: Object) -> PodRecord:
    metadata, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    labels = metadata.get("labels") or {}
    phase = status.get("phase", "Pending")
    gates = [gate["name"] for gate in spec.get("schedulingGates", ())]
    hostname = (spec.get("nodeSelector") or {}).get(HOSTNAME_LABEL)
    role = labels.get(LABEL_ROLE, "")
    name, namespace = metadata["name"], metadata.get("namespace", "")
    owner = owner_of(obj)
    fact = PodFact(
        name=name,
        uid=metadata["uid"],
        role=role if owner else "",
        index=_number(labels.get(LABEL_RANK)) if owner and role == ROLE_RANK else index_of_pod(name),
        incarnation=_number(labels.get(LABEL_INCARNATION)) if owner else 0,
        phase=phase,
        ready=any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ())),
        gated=SCHEDULING_GATE in gates,
        node=spec.get("nodeName"),
        deleting="deletionTimestamp" in metadata,
        created_at=seconds_of(metadata.get("creationTimestamp")) or 0.0,
        message=_why(status) if owner else "",
    )
    return PodRecord(
        fact=fact,
        namespace=namespace,
        owner=owner,
        claims=_claims(namespace, name),
        node=spec.get("nodeName"),
        hostname=hostname if owner and not gates else None,
        requests={} if phase in _FINISHED else _requests(spec),
    )


def with_node(record: PodRecord, node: str | None) -> PodFact:
    """The fact with the node that our nodeSelector names, while the scheduler has not bound the pod."""
    return replace(record.fact, node=record.fact.node or node, scheduled=record.fact.node is not None)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _claims(namespace: str, name: str) -> Key | None:
    match = _POD_NAME.fullmatch(name)
    return Key(_KIND_OF_SHORT[match["short"]], namespace, match["owner"]) if match else None


def _requests(spec: Object) -> dict[str, int]:
    """What the scheduler counts: all containers and sidecars together, or the biggest init container beside them."""
    total: dict[str, int] = {}
    biggest: dict[str, int] = {}
    for container in spec.get("initContainers", ()):
        if container.get("restartPolicy") == "Always":
            _add(total, _container_requests(container))
        else:
            for name, value in _container_requests(container).items():
                biggest[name] = max(biggest.get(name, 0), total.get(name, 0) + value)
    for container in spec.get("containers", ()):
        _add(total, _container_requests(container))
    for name, value in biggest.items():
        total[name] = max(total.get(name, 0), value)
    _add(total, {name: base_units(name, value) for name, value in (spec.get("overhead") or {}).items()})
    total["pods"] = 1
    return total


def _container_requests(container: Object) -> dict[str, int]:
    resources = container.get("resources") or {}
    asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: base_units(name, value) for name, value in asked.items()}


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0) + value


def _why(status: Object) -> str:
    """The most telling sentence of a pod's status: a container's trouble, else the scheduler's, else the kubelet's."""
    for text in _troubles(status):
        return text[:400]
    return ""


def _last_line(text: str) -> str:
    """Of a container's last output the line that says what happened: an error's own."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _troubles(status: Object) -> Iterable[str]:
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        ended = (container.get("lastState") or {}).get("terminated") or {}
        if ended.get("message") and not container.get("ready"):  # tells more than "back-off restarting"
            yield f"{ended.get('reason', '')} (exit code {ended.get('exitCode')}): {_last_line(ended['message'])}"
        for state in (container.get("state") or {}).values():
            reason = (state or {}).get("reason", "")
            if reason and reason not in ("Completed", "PodInitializing", "ContainerCreating"):
                code = f" (exit code {state['exitCode']})" if "exitCode" in state else ""
                yield f"{reason}{code}: {_last_line(state.get('message', ''))}".rstrip(": ")
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False" and condition.get("message"):
            yield f"{condition.get('reason', 'Unschedulable')}: {condition['message']}"
    if status.get("message") or status.get("reason"):
        yield f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")
