"""A gateway's process: a Ray driver that calls ranks directly, kept informed, behind the OpenAI face.

Calls go from here to the rank's process without any head in between, so requests go on while the coordinator's pod,
Ray's head included, is dead. Only finding a rank that this gateway has never met needs Ray's head.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from aiohttp import web
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from moe_core.contract.membership import Membership
from moe_core.contract.names import rank_actor_name
from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.gateway.face import GatewayFace
from moe_runtime.gateway.ranks import RankDirectory
from moe_runtime.gateway.replay import RankForgot, RankUnreachable
from moe_runtime.gateway.scout import Scout
from moe_runtime.gateway.tokenizer import load_tokenizer
from moe_runtime.host.pod_env import PodEnv
from moe_runtime.host.ray_driver import join_ray
from moe_runtime.host.ray_env import head_listens, is_loopback, ray_temp_dir
from moe_runtime.rank.desk import Poll, UnknownRequest

_CALL_S = 3.0


class RayRanks:
    """RankClient over actor handles, each looked up once by its name."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._handles: dict[str, ActorHandle] = {}

    async def _handle(self, pod_uid: str, timeout_s: float) -> ActorHandle:
        if pod_uid not in self._handles:
            # In a thread: it asks Ray's head, which may be gone, and blocks until then.
            lookup = asyncio.to_thread(ray.get_actor, rank_actor_name(pod_uid), namespace=self._namespace)
            try:
                self._handles[pod_uid] = await asyncio.wait_for(lookup, timeout_s)
            except (ValueError, TimeoutError, RayError) as error:
                raise RankUnreachable(f"no actor of pod {pod_uid}: {error}") from error
        return self._handles[pod_uid]

    async def _call(self, pod_uid: str, method: str, *args: Any, timeout_s: float) -> Any:
        handle = await self._handle(pod_uid, timeout_s)
        try:
            return await asyncio.wait_for(getattr(handle, method).remote(*args), timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, UnknownRequest):
                raise RankForgot(str(error.cause)) from error
            raise RankUnreachable(f"{method} on pod {pod_uid} failed: {error.cause!r}") from error
        except ActorDiedError as error:
            self._handles.pop(pod_uid, None)
            raise RankUnreachable(f"pod {pod_uid} died", is_gone=True) from error
        except (RayError, TimeoutError) as error:
            raise RankUnreachable(f"{method} on pod {pod_uid}: {type(error).__name__}") from error

    async def submit(self, pod_uid: str, request: GenerationRequest, *, wait_s: float, timeout_s: float) -> Poll:
        answer: Poll = await self._call(pod_uid, "submit", request, wait_s, timeout_s=timeout_s)
        return answer

    async def poll(self, pod_uid: str, request_id: str, *, have: int, wait_s: float, timeout_s: float) -> Poll:
        answer: Poll = await self._call(pod_uid, "poll", request_id, have, wait_s, timeout_s=timeout_s)
        return answer

    async def view(self, pod_uid: str) -> Membership | None:
        text = await self._call(pod_uid, "view", timeout_s=_CALL_S)
        return Membership.parse(text) if text else None

    def cancel(self, pod_uid: str, request_id: str) -> None:
        handle = self._handles.get(pod_uid)
        if handle is not None:
            with contextlib.suppress(RayError):
                handle.cancel.remote(request_id)

    def forget(self, living: set[str]) -> None:
        for pod_uid in set(self._handles) - living:
            del self._handles[pod_uid]


def _take_signals_back() -> None:
    """Ray's core puts its own handler for SIGTERM (a stack trace, then death) over the one of the pod's event loop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)


async def serve_gateway(
    env: PodEnv, listener: socket.socket, waiting: Sequence[socket.socket], *, ready: Callable[[], None]
) -> None:
    """Serve on the bound `listener`, and the connections that `waiting` holds, until cancelled.

    `ready` is called once requests can be answered. Raises TokenizerMissing, OSError (port), ConnectionError (no Ray).
    """
    source = env.config.model.path
    tokenizer = await asyncio.to_thread(load_tokenizer, Path(source) if source else None)
    directory, ranks = RankDirectory(), RayRanks(env.ray_namespace)
    face = GatewayFace(env.config, directory, ranks, tokenizer)
    runner = web.AppRunner(face.app(), access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
    await runner.setup()
    # A port that gateways of one machine share: whoever listens there gets requests, so a new one waits until it can
    # answer them. On a port of its own a gateway says at once that it lives; whether it is ready is another question.
    is_shared = is_loopback(env.pod_ip)
    face.is_open = not is_shared
    tasks = []
    try:
        if env.health_port is not None:
            await web.TCPSite(runner, env.pod_ip, env.health_port).start()
        if not is_shared:
            await _open(runner, listener, waiting)
        await head_listens(env)
        await asyncio.to_thread(
            join_ray,
            address=env.ray_address,
            namespace=env.ray_namespace,
            node_ip=env.pod_ip,
            temp_dir=str(ray_temp_dir(env)),
        )
        _take_signals_back()
        scout = Scout(env, directory, ranks, face)
        tasks = [asyncio.create_task(scout.follow_coordinator()), asyncio.create_task(scout.ask_ranks())]
        while is_shared and not directory.usable() and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
        if is_shared:
            await _open(runner, listener, waiting)
            face.is_open = True
        ready()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await runner.cleanup()


async def _open(runner: web.AppRunner, listener: socket.socket, waiting: Sequence[socket.socket]) -> None:
    await web.SockSite(runner, listener).start()
    assert runner.server is not None, "setup comes first"
    for connection in waiting:
        await asyncio.get_running_loop().connect_accepted_socket(runner.server, connection)
    print(f"moe-pod: gateway on port {listener.getsockname()[1]}", flush=True)
