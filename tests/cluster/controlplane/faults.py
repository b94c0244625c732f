"""A proxy in front of the API server that answers 409 or 429, hangs or cuts the line where a test asks for it.

The API server stays real; only chosen answers are withheld. It also notes every request, so that a test can say how
many lists an operator made, or stop it right after its third creation.

    with faulty(cluster) as proxy:
        proxy.refuse("POST", r"/pods$", status=429, times=2, retry_after_s=1)
        operator(kubeconfig=proxy.kubeconfig)

Plain HTTP on loopback towards the client, TLS and one user's token towards the API server (kubectl sends none without
TLS).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
from aiohttp import web

from cluster.controlplane.api import cut_off
from cluster.controlplane.background import in_background
from cluster.controlplane.process import free_port
from cluster.controlplane.start import ADMIN, ControlPlane

_REASONS = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
_HOP_BY_HOP = {"connection", "host", "keep-alive", "transfer-encoding", "upgrade", "content-length"}


@dataclass(frozen=True)
class Seen:
    """A request that came, `status` 0 while it is unanswered. `path` without the query."""

    method: str
    path: str
    query: str
    user_agent: str
    status: int

    @property
    def is_list(self) -> bool:
        parts = self.path.strip("/").split("/")
        rest = parts[2:] if parts[0] == "api" else parts[3:]  # /api/v1/..., /apis/group/version/...
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            rest = rest[2:]
        return self.method == "GET" and "watch=" not in self.query and len(rest) == 1


@dataclass
class Fault:
    """What happens to the next `times` requests that match.

    `refuse` answers `status` without asking the API server; `lose_answer` lets the request take effect and cuts the
    line before its answer, so that the client cannot know; `hang` never answers.
    """

    kind: Literal["refuse", "lose_answer", "hang"]
    method: re.Pattern[str]
    path: re.Pattern[str]
    times: int
    status: int = 409
    retry_after_s: int | None = None

    def takes(self, request: web.Request) -> bool:
        matches = self.method.fullmatch(request.method) and self.path.search(request.path)
        if not matches or self.times <= 0:
            return False
        self.times -= 1
        return True


@dataclass
class Proxy:
    """The proxy as a test sees it; every method may be called from any thread at any time."""

    url: str
    kubeconfig: Path
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _watchers: list[tuple[re.Pattern[str], Callable[[], None]]] = field(default_factory=list)

    def refuse(self, method: str, path: str, *, status: int, times: int = 1, retry_after_s: int | None = None) -> Fault:
        """`method` and `path` are regular expressions, `path` is searched for."""
        return self._add(Fault("refuse", re.compile(method), re.compile(path), times, status, retry_after_s))

    def lose_answer(self, method: str, path: str, *, times: int = 1) -> Fault:
        return self._add(Fault("lose_answer", re.compile(method), re.compile(path), times))

    def hang(self, method: str, path: str, *, times: int = 1) -> Fault:
        return self._add(Fault("hang", re.compile(method), re.compile(path), times))

    def after(self, request: str, call: Callable[[], None]) -> None:
        """Call each time such a request (`"POST /api/.*/pods"`, a regular expression) has been answered, before the
        client gets the answer: a client that is killed then has created what it does not know of."""
        self._watchers.append((re.compile(request), call))

    def _add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def answered(self, method: str, path: str) -> None:
        for pattern, call in list(self._watchers):
            if pattern.search(f"{method} {path}"):
                call()


class _Server:
    def __init__(self, upstream: str, token: str, proxy: Proxy, session: aiohttp.ClientSession) -> None:
        self._upstream = upstream
        self._token = token
        self._proxy = proxy
        self._session = session

    async def handle(self, request: web.Request) -> web.StreamResponse:
        fault = next((fault for fault in self._proxy.faults if fault.takes(request)), None)
        if fault is not None and fault.kind == "hang":
            self._note(request, 0)
            await asyncio.Event().wait()  # ends with the client's connection or the proxy
        if fault is not None and fault.kind == "refuse":
            self._note(request, fault.status)
            return _refusal(fault)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        headers["Authorization"] = f"Bearer {self._token}"
        async with self._session.request(
            request.method, self._upstream + request.path_qs, headers=headers, data=await request.read() or None
        ) as answer:
            self._note(request, answer.status)
            if fault is not None:
                await answer.read()
                self._proxy.answered(request.method, request.path)
                _cut(request)
            back = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    back.headers[name] = value
            if "watch=" not in request.query_string:
                body = await answer.read()
                self._proxy.answered(request.method, request.path)
                await back.prepare(request)
                await back.write(body)
            else:
                await back.prepare(request)
                with cut_off(answer):
                    async for chunk in answer.content.iter_any():
                        await back.write(chunk)
            return back

    def _note(self, request: web.Request, status: int) -> None:
        agent = request.headers.get("User-Agent", "")
        self._proxy.seen.append(Seen(request.method, request.path, request.query_string, agent, status))


def _refusal(fault: Fault) -> web.Response:
    headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
    body = {
        **{"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": fault.status},
        **{"reason": _REASONS.get(fault.status, ""), "message": f"made up by the test: {fault.status}"},
    }
    return web.json_response(body, status=fault.status, headers=headers)


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError("the test asked for it")


@contextlib.contextmanager
def faulty(cluster: ControlPlane, *, user: str = ADMIN, token: str | None = None) -> Iterator[Proxy]:
    """A proxy for as long as the block lasts; its kubeconfig is this user's (or this token's)."""
    url = f"http://127.0.0.1:{free_port()}"
    token = token or cluster.tokens[user]
    kubeconfig = cluster.write_kubeconfig(f"proxied-{user}", token, url=url)
    proxy = Proxy(url, kubeconfig)

    @contextlib.asynccontextmanager
    async def live() -> AsyncIterator[Proxy]:
        tls = ssl.create_default_context(cafile=str(cluster.ca_file))
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(ssl=tls, limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            app = web.Application(client_max_size=16 * 2**20)
            app.router.add_route("*", "/{path:.*}", _Server(cluster.url, token, proxy, session).handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", int(url.rsplit(":", 1)[1])).start()
                yield proxy
            finally:
                await runner.cleanup()

    with in_background(live, name="faults") as running:
        yield running
