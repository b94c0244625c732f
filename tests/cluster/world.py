"""One namespace as tests act in it and look at it, its simulated nodes, and words for what they see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.controlplane.api import Api, Object
from cluster.controlplane.nodes import KubeletControls, Node
from cluster.documents import GPU, path_of
from cluster.waiting import eventually


class Room:
    """Simulated nodes `a`, `b`, ... with names no other test has used, each with some GPUs."""

    def __init__(self, controls: KubeletControls, suffix: str) -> None:
        self.controls = controls
        self._suffix = suffix

    def name(self, letter: str) -> str:
        return f"{letter}-{self._suffix}"

    def add(self, letters: str, *, gpus: int = 2, **labels: str) -> None:
        for letter in letters:
            self.controls.add_node(Node(self.name(letter), labels, {GPU: str(gpus)}))

    def letters(self, pods: Sequence[Object]) -> list[str]:
        """Where these pods are, in order of the pods' names."""
        return [pod["spec"].get("nodeName", "-").removesuffix(f"-{self._suffix}") for pod in pods]


def role(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get("moerator.dev/role", ""))


def rank_of(pod: Object) -> int:
    return int(pod["metadata"]["labels"]["moerator.dev/rank"])


def is_going(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def is_gated(pod: Object) -> bool:
    return bool(pod["spec"].get("schedulingGates"))


def is_running(pod: Object) -> bool:
    return pod["status"].get("phase") == "Running" and not is_going(pod)


def condition(obj: Object | None, kind: str) -> Object:
    """The condition, an empty one where there is none."""
    conditions = (obj or {}).get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {"status": "", "reason": "", "message": ""})


def by_rank(pods: Sequence[Object]) -> Mapping[int, list[str]]:
    """Rank -> names of its pods."""
    names: dict[int, list[str]] = {}
    for pod in pods:
        names.setdefault(rank_of(pod), []).append(pod["metadata"]["name"])
    return names


def uids(pods: Sequence[Object]) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in pods}


@dataclass(frozen=True)
class World:
    """One namespace as a test acts in it and looks at it."""

    api: Api
    namespace: str

    async def apply(self, document: Object) -> Object:
        plural = {"MoEJob": "moejobs", "MoEService": "moeservices", "MoEDrill": "moedrills"}[document["kind"]]
        return await self.api.apply(path_of(plural, self.namespace, document["metadata"]["name"]), document)

    async def pods(self, of: str = "rank") -> list[Object]:
        """Pods of this role, by name."""
        listing = await self.api.get(path_of("pods", self.namespace))
        return sorted((p for p in listing["items"] if role(p) == of), key=lambda p: str(p["metadata"]["name"]))

    async def find(self, plural: str, name: str) -> Object | None:
        return await self.api.find(path_of(plural, self.namespace, name))

    async def until_pods(
        self, until: Callable[[list[Object]], bool], *, what: str, timeout_s: float = 30.0, of: str = "rank"
    ) -> list[Object]:
        deadline = time.monotonic() + timeout_s
        while True:
            seen = await self.pods(of)
            if until(seen):
                return seen
            late = time.monotonic() > deadline
            assert not late, f"{what} was not seen within {timeout_s:.0f} s: {await self._summary()}"
            await asyncio.sleep(0.05)

    async def until_running(self, ranks: int, *, timeout_s: float = 30.0) -> list[Object]:
        """All ranks run, and nothing else of that role exists."""
        return await self.until_pods(
            lambda pods: len(pods) == ranks and all(map(is_running, pods)),
            what=f"{ranks} running ranks",
            timeout_s=timeout_s,
        )

    async def until_condition(
        self, plural: str, name: str, kind: str, status: str, *, reason: str = "", timeout_s: float = 30.0
    ) -> Object:
        """The condition once it has this status (and reason)."""
        return await eventually(
            lambda: self._condition(plural, name, kind),
            lambda seen: seen["status"] == status and reason in ("", seen["reason"]),
            what=f"{kind}={status} {reason} of {name}",
            timeout_s=timeout_s,
        )

    async def _condition(self, plural: str, name: str, kind: str) -> Object:
        return condition(await self.find(plural, name), kind)

    async def _summary(self) -> str:
        pods = [*await self.pods("rank"), *await self.pods("coordinator"), *await self.pods("gateway")]
        return ", ".join(
            f"{p['metadata']['name']} {p['status'].get('phase')}{' gated' * is_gated(p)}{' going' * is_going(p)}"
            for p in pods
        )
