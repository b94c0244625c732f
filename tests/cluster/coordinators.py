"""A coordinator that answers for the ranks of every owner, so that simulated pods become a group."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from aiohttp import web

from cluster.controlplane.api import Api, Object
from cluster.controlplane.background import in_background
from cluster.controlplane.process import free_port
from cluster.controlplane.start import ADMIN, ControlPlane
from cluster.world import is_going, rank_of, role
from moe_core.contract.exchange import (
    Coverage,
    FaultRequest,
    RankState,
    RuntimeState,
    RuntimeWish,
    ServingProgress,
    TrainingProgress,
)


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
