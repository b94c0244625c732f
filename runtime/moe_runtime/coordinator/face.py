"""The coordinator's HTTP face: the operator puts wishes and reads states, ranks and gateways report.

It plans and never takes part in a step: ranks go on without it, and a new one knows everything after one round of
reports. Lives in the pod of the Ray head and needs no Ray of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from aiohttp import web

from moe_core.contract.exchange import FaultRequest, RuntimeWish
from moe_core.outcome import InvalidInput
from moe_runtime.coordinator.book import Book, StaleWish
from moe_runtime.coordinator.head_copies import HeadCopies
from moe_runtime.host.guard_client import GuardUnreachable, inject_fault
from moe_runtime.host.pod_env import PodEnv
from moe_runtime.host.ray_env import is_loopback
from moe_runtime.http_auth import require_bearer
from moe_runtime.metrics import CONTENT_TYPE, CoordinatorMetrics
from moe_runtime.registration import GatewayReport, RankReport

_MAX_WAIT_S = 30.0
_TICK_S = 0.25
"""How often time alone (a rank that went silent) may change the state."""
_MAX_BODY_BYTES = 64 << 20


class CoordinatorFace:
    """The routes over one Book. Who waits is woken when what it waits for has changed, not at each report."""

    def __init__(self, env: PodEnv, book: Book, copies: HeadCopies) -> None:
        self._env = env
        self._copies = copies
        self._book = book
        self._metrics = CoordinatorMetrics()
        self._ranks, self._operators = _Bell(), _Bell()
        self._told_seal, self._told_version = book.seal, 0

    def app(self) -> web.Application:
        guard = require_bearer(self._env.token, open_paths={"/healthz", "/metrics"})
        app = web.Application(middlewares=[guard], client_max_size=_MAX_BODY_BYTES)
        app.router.add_put("/v1/wish", self._put_wish)
        app.router.add_get("/v1/state", self._get_state)
        app.router.add_post("/v1/register", self._register)
        app.router.add_post("/v1/gateways", self._post_gateway)
        app.router.add_post("/v1/faults", self._post_fault)
        self._copies.add_routes(app)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._get_metrics)
        app.cleanup_ctx.append(self._ticking)
        return app

    async def _ticking(self, _: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._tick())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._book.tick()
            self._tell()

    def _tell(self) -> None:
        if (seal := self._book.seal) != self._told_seal:
            self._told_seal = seal
            self._ranks.ring()
        if (version := self._book.state().version) != self._told_version:
            self._told_version = version
            self._operators.ring()

    async def _put_wish(self, request: web.Request) -> web.Response:
        try:
            self._book.put_wish(RuntimeWish.parse(await request.read()))
        except InvalidInput as error:
            return _refusal(400, str(error))
        except StaleWish as error:
            return _refusal(409, str(error))
        self._tell()
        return web.Response(status=204)

    async def _get_state(self, request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", "0"))
            wait_s = min(float(request.query.get("wait_s", "0")), _MAX_WAIT_S)
        except ValueError as error:
            return _refusal(400, f"after and wait_s must be numbers: {error}")
        deadline = time.monotonic() + wait_s
        while (state := self._book.state()).version <= after:
            if not await self._operators.wait(deadline):
                break
        return web.json_response(text=state.canonical())

    async def _register(self, request: web.Request) -> web.Response:
        try:
            report = RankReport.parse(await request.read())
        except InvalidInput as error:
            return _refusal(400, str(error))
        self._book.note_rank(report)
        self._tell()
        deadline = time.monotonic() + min(report.wait_s, _MAX_WAIT_S)
        while self._book.seal == report.directive_seen:
            if not await self._ranks.wait(deadline):
                return web.Response(status=204)
        return web.json_response(text=self._book.directive().canonical())

    async def _post_gateway(self, request: web.Request) -> web.Response:
        try:
            self._book.note_gateway(GatewayReport.parse(await request.read()))
        except InvalidInput as error:
            return _refusal(400, str(error))
        return web.json_response(text=self._book.members().canonical())

    async def _post_fault(self, request: web.Request) -> web.Response:
        if not self._env.config.faults_enabled:
            return _refusal(403, "faults are not enabled for this object (spec.drills: Allowed)")
        try:
            fault = FaultRequest.parse(await request.read())
        except InvalidInput as error:
            return _refusal(400, str(error))
        address = self._book.guard_address(fault.pod_uid)
        if address is None:
            return _refusal(404, f"no rank has registered with pod uid {fault.pod_uid!r}")
        try:
            await asyncio.to_thread(inject_fault, address, fault, token=self._env.token)
        except GuardUnreachable as error:
            return _refusal(502, f"the guard at {address} did not take the fault: {error}")
        return web.Response(status=202)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True, "version": self._book.version})

    async def _get_metrics(self, request: web.Request) -> web.Response:
        book = self._book
        text = self._metrics.render(
            book.state(),
            book.wish.expert_map if book.wish else None,
            counts=book.counts.of_ranks(),
            with_experts=request.query.get("experts") == "1",
        )
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


class _Bell:
    """Wakes all who wait at once."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        rung, self._rung = self._rung, asyncio.Event()
        rung.set()

    async def wait(self, deadline: float) -> bool:
        """Until it rings; False when the deadline (of time.monotonic) comes first."""
        try:
            await asyncio.wait_for(self._rung.wait(), deadline - time.monotonic())
        except TimeoutError:
            return False
        return True


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


async def serve_coordinator(env: PodEnv, copies: HeadCopies) -> None:
    """Serve until cancelled. Raises OSError when the port is taken."""
    # Versions start from the wall clock: those of a new coordinator lie above all of the one before.
    book = Book(time.monotonic, is_serving=env.config.mode == "serve", first_version=int(time.time() * 1000))
    runner = web.AppRunner(CoordinatorFace(env, book, copies).app(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    host = env.pod_ip if is_loopback(env.pod_ip) else None
    try:
        await web.TCPSite(runner, host, env.config.coordinator_port).start()
        print(f"moe-pod: coordinator on port {env.config.coordinator_port}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
