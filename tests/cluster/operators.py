"""The operator as a user runs it, a coordinator that answers for the ranks, and words for what tests look at."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from cluster.controlplane.api import Api, Object
from cluster.controlplane.background import in_background
from cluster.controlplane.nodes import KubeletControls, Node
from cluster.controlplane.process import Process, free_port
from cluster.controlplane.start import ADMIN, ControlPlane
from cluster.waiting import eventually
from moe_core.contract.exchange import (
    Coverage,
    FaultRequest,
    RankState,
    RuntimeState,
    RuntimeWish,
    ServingProgress,
    TrainingProgress,
)

REPOSITORY = Path(__file__).resolve().parents[2]
MOERATOR = Path(sys.executable).with_name("moerator")
GPU = "nvidia.com/gpu"
SHAPE = {
    **{"family": "qwen3_moe", "hiddenSize": 64, "numHiddenLayers": 4, "numAttentionHeads": 4, "numKeyValueHeads": 2},
    **{"headDim": 16, "numExperts": 16, "numExpertsPerTok": 2, "moeIntermediateSize": 64},
}


class Operator:
    """One operator process, limited to some namespaces, with its health face on loopback."""

    def __init__(
        self,
        cluster: ControlPlane,
        namespaces: Sequence[str],
        *,
        kubeconfig: Path | None = None,
        name: str = "operator",
        command: Sequence[str | Path] = (MOERATOR, "operator"),
        **environment: str,
    ) -> None:
        self.port = free_port()
        values = {
            "PYTHONPATH": REPOSITORY / "operator",
            "KUBECONFIG": kubeconfig or cluster.kubeconfig,
            "MOERATOR_NAMESPACES": ",".join(namespaces),
            "MOERATOR_OPERATOR_NAMESPACE": namespaces[0] if namespaces else "default",
            "MOERATOR_HTTP_BIND": f"127.0.0.1:{self.port}",
            **environment,
        }
        settings = [f"{key}={value}" for key, value in values.items()]
        log = cluster.directory / f"{name}-{self.port}.log"
        self.process = Process(name, ["/usr/bin/env", *settings, *command], log)

    def start(self, *, timeout_s: float = 40.0) -> Operator:
        self.process.start()
        self.process.wait_ready(lambda: self.get("/readyz")[0] == 200, timeout_s=timeout_s)
        return self

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; (0, why) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()
        except OSError as error:
            return 0, str(error)

    @property
    def is_leader(self) -> bool:
        return "moerator_leader 1.0" in self.get("/metrics")[1]

    def log(self) -> str:
        return self.process.log.read_text()


@contextlib.contextmanager
def operator(cluster: ControlPlane, *namespaces: str, **options: Any) -> Iterator[Operator]:
    """A ready operator for as long as the block lasts; on a failure the end of its log is shown."""
    running = Operator(cluster, namespaces, **options)
    try:
        yield running.start()
    except BaseException:
        print(running.process.log_tail(40))  # pytest shows it with the failure
        raise
    finally:
        running.process.kill()


@dataclass
class Coordinator:
    """Answers for every owner's ranks: each rank pod that runs is Active once a wish names its rank.

    One server for all; the operator is told `url` as its template. It demands the token of the owner's Secret, and it
    answers only while a coordinator pod runs.
    """

    url: str
    wishes: dict[str, list[RuntimeWish]] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    faults: list[FaultRequest] = field(default_factory=list)
    on_fault: Callable[[str, str], None] = lambda namespace, pod: None
    """Called with the namespace and name of a pod that a drill injures."""
    forbids_faults: bool = False
    look_s: float = 0.2
    is_busy: bool = False
    """Counts tokens on, several times a second, as ranks under load do."""
    trained: set[str] = field(default_factory=set)
    """`namespace/name` of the jobs that have trained to the end."""

    def handler(self, api: Api) -> web.Application:
        app = web.Application()
        app.router.add_get("/{namespace}/{service}/v1/state", functools.partial(self._state, api))
        app.router.add_put("/{namespace}/{service}/v1/wish", functools.partial(self._wish, api))
        app.router.add_post("/{namespace}/{service}/v1/faults", functools.partial(self._fault, api))
        return app

    async def _fault(self, api: Api, request: web.Request) -> web.Response:
        _, ranks = await self._admit(api, request)
        if self.forbids_faults:
            return web.json_response({"error": "faults are not enabled for this object"}, status=403)
        fault = FaultRequest.parse(await request.read())
        self.faults.append(fault)
        for pod in ranks:
            if pod["metadata"]["uid"] == fault.pod_uid:
                name = pod["metadata"]["name"]
                await asyncio.to_thread(self.on_fault, request.match_info["namespace"], name)
        return web.Response(status=202)

    async def _admit(self, api: Api, request: web.Request) -> tuple[str, list[Object]]:
        namespace, service = request.match_info["namespace"], request.match_info["service"]
        secret = await api.find(f"/api/v1/namespaces/{namespace}/secrets/{service.removesuffix('coordinator')}token")
        token = base64.b64decode(secret["data"]["token"]).decode() if secret else None
        if request.headers.get("Authorization") != f"Bearer {token}":
            raise web.HTTPUnauthorized
        owner = service.rsplit("-", 2)[0]
        pods = await api.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=f"moerator.dev/owner-name={owner}")
        running = [p for p in pods["items"] if p["status"]["phase"] == "Running" and not is_going(p)]
        if not any(role(p) == "coordinator" for p in running):
            raise web.HTTPServiceUnavailable
        return f"{namespace}/{owner}", [p for p in running if role(p) == "rank"]

    async def _state(self, api: Api, request: web.Request) -> web.Response:
        after, deadline = int(request.query["after"]), time.monotonic() + float(request.query["wait_s"])
        while True:
            key, ranks = await self._admit(api, request)
            state = self._look(key, ranks)
            if state.version != after or time.monotonic() > deadline:
                return web.Response(text=state.canonical(), content_type="application/json")
            await asyncio.sleep(self.look_s)

    def _look(self, key: str, ranks: list[Object]) -> RuntimeState:
        wish = self.wishes[key][-1] if self.wishes.get(key) else None
        active = tuple(sorted(p["metadata"]["uid"] for p in ranks if wish and rank_of(p) in wish.ranks))
        if wish and active != self.members.get(key):
            self.members[key] = active
            self.epochs[key] = self.epochs.get(key, 0) + 1
        epoch = self.epochs.get(key, 0)
        states = tuple(
            RankState(
                rank=rank_of(p),
                pod_uid=p["metadata"]["uid"],
                phase="Active" if p["metadata"]["uid"] in active else "Ready",
            )
            for p in sorted(ranks, key=rank_of)
        )
        tokens = int(10 * time.monotonic()) if self.is_busy else 0
        return RuntimeState(
            version=1
            + tokens
            + (key in self.trained)
            + epoch * 100
            + len(self.wishes.get(key, ())) * 10_000
            + len(states),
            wish_put=wish.generation if wish else None,
            wish_generation=wish.generation if wish and len(active) == len(wish.ranks) else None,
            epoch=epoch,
            map_digest=wish.expert_map.digest if wish else "",
            ranks=states,
            coverage=Coverage(covered=64, total=64),
            serving=ServingProgress(tokens_out=tokens) if self.is_busy else None,
            training=TrainingProgress(step=100, done=True) if key in self.trained else None,
        )

    async def _wish(self, api: Api, request: web.Request) -> web.Response:
        key, _ = await self._admit(api, request)
        wish = RuntimeWish.parse(await request.read())
        if self.wishes.get(key) and wish.generation < self.wishes[key][-1].generation:
            raise web.HTTPConflict
        self.wishes.setdefault(key, []).append(wish)
        return web.Response(status=204)


@contextlib.contextmanager
def coordinators(cluster: ControlPlane) -> Iterator[Coordinator]:
    """The coordinator of every owner, on a thread of its own; `url` is the template for MOERATOR_COORDINATOR_URL."""
    port = free_port()
    answering = Coordinator(f"http://127.0.0.1:{port}/{{namespace}}/{{service}}")

    @contextlib.asynccontextmanager
    async def live() -> AsyncIterator[Coordinator]:
        async with Api(cluster.url, cluster.tokens[ADMIN], cluster.ca_file) as api:
            handler = answering.handler(api)
            runner = web.AppRunner(handler, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            yield answering
            await runner.cleanup()

    with in_background(live, name="coordinators") as running:
        yield running


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


# what tests apply


def job(name: str = "tiny", *, ranks: int = 4, **spec: object) -> Object:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"shape": SHAPE},
            "training": {"data": {"source": "PythonStdlib"}, "maxSteps": 100},
            "output": {"path": "/out"},
            "parallelism": {"expert": ranks},
            "template": one_gpu(),
            **spec,
        },
    }


def service(name: str = "chat", *, ranks: int = 4, **spec: object) -> Object:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEService",
        "metadata": {"name": name},
        "spec": {
            "model": {"path": "/model", "numExperts": 16, "numMoeLayers": 4},
            "parallelism": {"expert": ranks},
            "experts": {"redundantPerRank": 4},
            "gateway": {"replicas": 1},
            "template": one_gpu(),
            **spec,
        },
    }


def drill(name: str, *, target: str, rank: int) -> Object:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEDrill",
        "metadata": {"name": name},
        "spec": {"target": {"kind": "MoEService", "name": target, "rank": rank}, "fault": {"type": "KillRank"}},
    }


def one_gpu() -> Object:
    return {"spec": {"resources": {"requests": {"cpu": "1", "memory": "1Gi", GPU: "1"}, "limits": {GPU: "1"}}}}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    group = "/api/v1" if kind in ("pods", "configmaps", "services", "secrets") else "/apis/moerator.dev/v1alpha1"
    return f"{group}/namespaces/{namespace}/{kind}" + (f"/{name}" if name else "")


# what tests see


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


def by_rank(pods: Sequence[Object]) -> Mapping[int, list[str]]:
    """Rank -> names of its pods."""
    names: dict[int, list[str]] = {}
    for pod in pods:
        names.setdefault(rank_of(pod), []).append(pod["metadata"]["name"])
    return names


def uids(pods: Sequence[Object]) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in pods}
