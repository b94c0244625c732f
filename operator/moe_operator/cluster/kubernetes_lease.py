"""The Lease as elector.py wants it: read, create and replace, each bound to what was seen.

Leases pass around the fence, which asks whether the Lease is held.
"""

from datetime import UTC, datetime
from typing import Any

from moe_operator.cluster.kubernetes import KubeApi, Object
from moe_operator.elector import NOBODY, LeaseRecord


class KubernetesLease:
    """One `coordination.k8s.io/v1` Lease."""

    def __init__(self, api: KubeApi, *, namespace: str, name: str) -> None:
        self._api = api
        self._name = name
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"

    async def read(self) -> LeaseRecord | None:
        found = await self._api.find(f"{self._collection}/{self._name}")
        return _record(found) if found is not None else None

    async def create(self, record: LeaseRecord) -> LeaseRecord:
        return _record(await self._api.create(self._collection, self._body(record), fenced=False))

    async def replace(self, record: LeaseRecord) -> LeaseRecord:
        return _record(await self._api.replace(f"{self._collection}/{self._name}", self._body(record), fenced=False))

    def _body(self, record: LeaseRecord) -> Object:
        metadata: dict[str, Any] = {"name": self._name}
        if record.version:
            metadata["resourceVersion"] = record.version
        spec: dict[str, Any] = {
            "leaseDurationSeconds": max(1, round(record.duration_s)),
            "leaseTransitions": record.transitions,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),  # for people; no process compares it
        }
        if record.holder != NOBODY:
            spec["holderIdentity"] = record.holder
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


def _record(obj: Object) -> LeaseRecord:
    spec = obj.get("spec") or {}
    return LeaseRecord(
        holder=spec.get("holderIdentity") or NOBODY,
        duration_s=float(spec.get("leaseDurationSeconds") or 1),
        transitions=int(spec.get("leaseTransitions") or 0),
        version=obj["metadata"]["resourceVersion"],
    )
