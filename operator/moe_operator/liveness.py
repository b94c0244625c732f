"""Whether the operator is alive: /healthz, /readyz and /metrics on an event loop that must not be blocked.

kopf swallows bookmarks and reconnects quietly, so that a watch which brings nothing looks like a quiet cluster. What
tells them apart: the server ends every watch after `watch_timeout_s`, and a working watch is then asked for anew and
answered. `WatchTrace` notes each answer to kopf's requests; a resource whose watch was not answered for far longer is
stalled. A blocked loop answers no probe at all, which is an answer too.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import aiohttp
from aiohttp import web

from moe_operator.elector import running_clock

logger = logging.getLogger(__name__)

LAG_LOOK_S = 1.0


class WatchTrace:
    """When kopf's watches of the expected paths were last answered. `on_list` is called when one was listed once more.

    `stalled_after_s` bounds the time between two answers of a watch that works; `start_s` the time to the first ones.
    """

    def __init__(
        self,
        expected: Iterable[str],
        *,
        stalled_after_s: float,
        start_s: float,
        on_list: Callable[[], None],
        clock: Callable[[], float] = running_clock,
    ) -> None:
        self._expected = frozenset(expected)
        self._stalled_after_s = stalled_after_s
        self._start_s = start_s
        self._on_list = on_list
        self._clock = clock
        self._born = clock()
        self._answered: dict[str, float] = {}

    def config(self) -> aiohttp.TraceConfig:
        """To be given to the session that kopf watches with."""
        trace = aiohttp.TraceConfig()
        trace.on_request_end.append(self._on_request_end)
        return trace

    def note(self, path: str, *, is_watch: bool) -> None:
        """A request for `path` was answered."""
        if path not in self._expected:
            return
        if is_watch:
            self._answered[path] = self._clock()
        elif path in self._answered:
            self._on_list()

    def is_started(self) -> bool:
        """Whether every collection has been listed and is watched."""
        return self._expected <= self._answered.keys()

    def problems(self) -> list[str]:
        now = self._clock()
        stalled = [
            f"the watch of {path} was last answered {now - at:.0f} s ago"
            for path, at in sorted(self._answered.items())
            if now - at > self._stalled_after_s
        ]
        if not self.is_started() and now - self._born > self._start_s:
            missing = sorted(self._expected - self._answered.keys())
            stalled.append(f"not watched {self._start_s:.0f} s after the start: {', '.join(missing)}")
        return stalled

    async def _on_request_end(
        self, _session: aiohttp.ClientSession, _context: SimpleNamespace, params: aiohttp.TraceRequestEndParams
    ) -> None:
        if params.response.status == 200:
            self.note(params.url.path, is_watch=params.url.query.get("watch") == "true")


class LoopLag:
    """How late the event loop runs what is due: policy or parsing that blocks it also blocks the lease."""

    def __init__(self, *, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last_s = 0.0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_LOOK_S
            await asyncio.sleep(LAG_LOOK_S)
            self._last_s = loop.time() - due

    def problems(self) -> list[str]:
        if self._last_s <= self._limit_s:
            return []
        return [f"the event loop ran {self._last_s:.1f} s late"]


class HealthServer:
    """Answers 200 while there is no problem, else 503 with the problems in words."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        alive: Callable[[], list[str]],
        ready: Callable[[], list[str]],
        metrics: Callable[[], bytes],
    ) -> None:
        self._host, self._port = host, port
        app = web.Application()
        app.router.add_get("/healthz", functools.partial(_verdict, alive))
        app.router.add_get("/readyz", functools.partial(_verdict, ready))
        app.router.add_get("/metrics", functools.partial(_scrape, metrics))
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0)

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        logger.info("health and metrics on %s:%d", self._host, self._port)

    async def close(self) -> None:
        await self._runner.cleanup()


async def _verdict(look: Callable[[], list[str]], _request: web.Request) -> web.Response:
    problems = look()
    return web.Response(status=503 if problems else 200, text="\n".join(problems or ["ok"]) + "\n")


async def _scrape(metrics: Callable[[], bytes], _request: web.Request) -> web.Response:
    return web.Response(body=metrics(), content_type="text/plain", charset="utf-8")
