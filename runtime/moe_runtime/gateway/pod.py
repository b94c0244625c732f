"""A gateway's pod as its guard sees it: start the serving process, watch it, start another when it hangs or dies.

The guard owns the service's port. Connections that nobody has taken yet when the serving process stops or dies are the
next one's; only requests that it was answering are lost. Like every guard it imports neither torch nor Ray.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_runtime.gateway.door import Door
from moe_runtime.gateway.tokenizer import TokenizerMissing
from moe_runtime.host import last_words, processes
from moe_runtime.host.guard import Guard, guard_socket_path
from moe_runtime.host.heartbeat import Heartbeat
from moe_runtime.host.pod_env import PodEnv, read_pod_env
from moe_runtime.host.ray_env import is_loopback, ray_environment

SILENCE_S = 2.5
"""Ten heartbeats of a gateway that takes requests. One that answered 1,400 a second on two cores at a load of 5 was
silent for 0.28 s at most (23 Nov); imports, which may take longer, come before it is settled."""
_CRASH_S = 10.0
"""One that dies sooner than this after its start will do so again: its pod ends with it, and whoever runs pods waits
longer each time before it starts another."""
_BEGIN_S = 60.0
"""From its start to its first heartbeat, which comes before its imports."""
_TERMINATE_S = 2.0
_TICK_S = 0.05


class GatewayEnded(RuntimeError):
    """The serving process ended by itself, or died too soon to be started again."""


@dataclass(frozen=True, slots=True)
class GatewayBoot:
    """Travels as JSON through the child's argument; numbers are inherited file descriptors."""

    guard_socket: str
    listener: int
    waiting: tuple[int, ...]
    """Connections that the one before has not taken."""


async def guard_gateway(env: PodEnv) -> None:
    """Runs until the gateway cannot be kept up (GatewayEnded) or this is cancelled. Raises OSError: port taken."""
    assert env.config.serving is not None
    env.state_dir.mkdir(parents=True, exist_ok=True)
    door = Door(env.pod_ip if is_loopback(env.pod_ip) else None, env.config.serving.gateway_port)
    try:
        while True:
            began = time.monotonic()
            death = await _serve_once(env, door)
            if time.monotonic() - began < _CRASH_S:
                raise GatewayEnded(death)
            print(f"moe-pod: {death}; starting another", flush=True)
            door.rescue()
    finally:
        door.close()


async def _serve_once(env: PodEnv, door: Door) -> str:
    """Until the serving process has been killed; says how. Raises GatewayEnded when it ended by itself."""
    guard = Guard(pod_uid=env.pod_uid, socket_path=guard_socket_path(env), silence_s=SILENCE_S)
    boot = GatewayBoot(
        str(guard.socket_path), door.listener.fileno(), tuple(connection.fileno() for connection in door.waiting)
    )
    last_words.forget(_last_words(env))
    child = processes.start(
        [sys.executable, "-c", "from moe_runtime.gateway.pod import serve; serve()", json.dumps(asdict(boot))],
        env=ray_environment(env, os.environ),
        pass_fds=[boot.listener, *boot.waiting],
    )
    door.hand_over()
    began = time.monotonic()
    try:
        while (code := child.poll()) is None:
            if guard.state == "absent" and time.monotonic() - began > _BEGIN_S:
                child.kill()
            await asyncio.sleep(_TICK_S)
    finally:
        await asyncio.shield(asyncio.to_thread(_end, child))
        guard.close()
    if code >= 0:
        raise GatewayEnded(f"the gateway ended with code {code}{last_words.told(_last_words(env))}")
    return f"the gateway was killed by {signal.Signals(-code).name} ({guard.reason or 'before it was guarded'})"


def _last_words(env: PodEnv) -> Path:
    return env.state_dir / "gateway.last-words"


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def serve() -> None:
    """The child: `python -c '...serve()' BOOT_JSON`. Never returns: asyncio's and Ray's own ends wait for threads that
    may be blocked in a call to a head that is gone."""
    env, boot = read_pod_env(os.environ), GatewayBoot(**json.loads(sys.argv[1]))
    heart = Heartbeat(Path(boot.guard_socket), pod_uid=env.pod_uid)
    code = 1
    try:
        asyncio.run(_serve_until_told(env, boot, heart))
        code = 0
    except (TokenizerMissing, OSError) as error:
        last_words.leave(_last_words(env), error)
    except BaseException as error:
        last_words.leave(_last_words(env), error)
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _serve_until_told(env: PodEnv, boot: GatewayBoot, heart: Heartbeat) -> None:
    from moe_runtime.gateway.process import serve_gateway

    listener, waiting = socket.socket(fileno=boot.listener), [socket.socket(fileno=fd) for fd in boot.waiting]
    serving = asyncio.create_task(serve_gateway(env, listener, waiting, ready=heart.settle))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
