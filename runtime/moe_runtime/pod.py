"""The entry point of every pod (`moe-pod`): the same in a container and under the local shell.

    coordinator   Ray head (a child) and the coordinator's HTTP face
    rank          guard of one rank: Ray node (or the shared one), the rank's actor, fencing
    gateway       guard of one gateway: Ray node (or the shared one), the process with the OpenAI face
    node          a bare Ray node that pods of one machine share

Exit codes: 0 after SIGTERM or SIGINT, 2 for a wrong environment, 1 for everything that broke.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY, ROLE_RANK
from moe_core.outcome import InvalidSpec
from moe_runtime.gateway.pod import GatewayEnded, guard_gateway
from moe_runtime.host import processes
from moe_runtime.host.head_keeper import HeadKeeper
from moe_runtime.host.head_store import has_store
from moe_runtime.host.pod_env import PodEnv, read_pod_env
from moe_runtime.host.ray_env import (
    OBJECT_STORE_BYTES,
    head_environment,
    head_listens,
    head_store_dir,
    ray_environment,
    ray_temp_dir,
    uses_shared_node,
)
from moe_runtime.host.ray_node import READY_LINE
from moe_runtime.rank.pod import RankEnded

if TYPE_CHECKING:
    from moe_runtime.coordinator.head_copies import HeadCopies

_NODE_START_S = 180.0
"""Seen: 7 s for a head, 6 s for a node (2 busy cores, 22 Nov); a cold disk takes ten times that."""
_GRACE_S = 3.0


class PodBroke(RuntimeError):
    """A part that this pod cannot do without ended or never came up."""


def main() -> None:
    try:
        env = read_pod_env(os.environ)
    except InvalidSpec as error:
        print(f"moe-pod: the environment is wrong:\n{error}", file=sys.stderr, flush=True)
        sys.exit(2)
    parent_pid = os.getppid()
    processes.lead_session()
    asyncio.run(_run_and_end(env, parent_pid))


async def _run_and_end(env: PodEnv, parent_pid: int) -> None:
    """Never returns: ends the process from within, because asyncio's and Ray's own ends wait for threads that may be
    blocked in a call to a head that is gone."""
    code = 1
    try:
        await _run(env, parent_pid)
        code = 0
    except (PodBroke, RankEnded, GatewayEnded, OSError) as error:
        print(f"moe-pod: {env.role}: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        processes.end_descendants(grace_s=_GRACE_S)
        if not uses_shared_node(env):
            shutil.rmtree(ray_temp_dir(env), ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _run(env: PodEnv, parent_pid: int) -> None:
    """Run the role until it ends, a signal arrives or the starting process dies."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    work = asyncio.ensure_future(_role(env)(env))
    watchers = [asyncio.create_task(stop.wait()), asyncio.create_task(_parent_gone(parent_pid))]
    done, pending = await asyncio.wait([work, *watchers], return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.wait([*pending, asyncio.create_task(asyncio.sleep(0))], timeout=_GRACE_S)
    if work in done:
        work.result()


async def _parent_gone(parent_pid: int) -> None:
    """Returns when the process that started this one died. Polled: the kernel's death signal follows a thread."""
    while parent_pid <= 1 or os.getppid() == parent_pid:
        await asyncio.sleep(0.5)


def _role(env: PodEnv) -> Callable[[PodEnv], Awaitable[None]]:
    if env.role == ROLE_COORDINATOR:
        return _coordinator
    if env.role == ROLE_RANK:
        return _rank
    if env.role == ROLE_GATEWAY:
        return _gateway
    return _node


async def _coordinator(env: PodEnv) -> None:
    is_newcomer = env.reattach and not has_store(head_store_dir(env))
    head = None if is_newcomer else start_ray_node(env, head=True)
    from moe_runtime.coordinator.face import serve_coordinator
    from moe_runtime.coordinator.head_copies import HeadCopies

    copies = HeadCopies(head_store_dir(env))
    await _first_end(serve_coordinator(env, copies), _keep_head(env, copies, head))


async def _keep_head(env: PodEnv, copies: "HeadCopies", head: "subprocess.Popen[bytes] | None") -> None:
    """Start the head, where it has to wait for its store; have it copied from then on."""
    if head is None:
        await copies.recover()
        head = start_ray_node(env, head=True)
    await _first_end(copies.watch(), _watch_child(head, "the Ray head"))


async def _gateway(env: PodEnv) -> None:
    node = await _own_node(env)
    await _first_end(guard_gateway(env), *([_watch_child(node, "the Ray node")] if node else []))


async def _rank(env: PodEnv) -> None:
    from moe_runtime.rank.pod import guard_rank

    node = await _own_node(env)
    guarding = asyncio.create_task(guard_rank(env))
    await _first_end(guarding, *([_watch_child(node, "the Ray node")] if node else []))


async def _node(env: PodEnv) -> None:
    _keep_copy(env)
    await head_listens(env)
    node = start_ray_node(env, head=False)
    await ray_node_ready(env, node)
    print("moe-pod: the shared Ray node is up", flush=True)
    await _watch_child(node, "the Ray node")


async def _own_node(env: PodEnv) -> "subprocess.Popen[bytes] | None":
    if uses_shared_node(env):
        return None
    _keep_copy(env)
    await head_listens(env)
    node = start_ray_node(env, head=False)
    await ray_node_ready(env, node)
    return node


def _keep_copy(env: PodEnv) -> None:
    HeadKeeper(env.coordinator_url, token=env.token, pod_uid=env.pod_uid).start()


async def _first_end(*parts: Awaitable[None]) -> None:
    """Runs until any part ends; raises what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


async def _watch_child(child: "subprocess.Popen[bytes]", what: str) -> None:
    while child.poll() is None:
        await asyncio.sleep(0.2)
    raise PodBroke(f"{what} ended with code {child.returncode}")


def _node_log(env: PodEnv) -> Path:
    return env.state_dir / "ray-node.log"


def start_ray_node(env: PodEnv, *, head: bool) -> "subprocess.Popen[bytes]":
    """Start the node's processes as a child that dies with this pod; its output goes to ray-node.log."""
    environment = (head_environment if head else ray_environment)(env, os.environ)
    temp_dir = ray_temp_dir(env)
    temp_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    options = {
        "head": head,
        "ip": env.pod_ip,
        "port": env.config.ray_port,
        "address": env.ray_address,
        "object_store_bytes": OBJECT_STORE_BYTES,
        "temp_dir": str(temp_dir),
        "num_gpus": 1 if env.config.device == "cuda" and env.role == ROLE_RANK else 0,
    }
    _node_log(env).write_bytes(b"")
    return processes.start(
        [sys.executable, "-m", "moe_runtime.host.ray_node", json.dumps(options)], env=environment, log=_node_log(env)
    )


async def ray_node_ready(env: PodEnv, node: "subprocess.Popen[bytes]") -> None:
    """Waits for the node to be up. Raises PodBroke when it ends or takes too long."""
    deadline = time.monotonic() + _NODE_START_S
    while READY_LINE not in (text := _node_log(env).read_text(errors="replace")):
        if node.poll() is not None:
            raise PodBroke(f"the Ray node ended with code {node.returncode} at its start:\n{text[-2000:]}")
        if time.monotonic() > deadline:
            raise PodBroke(f"the Ray node was not up after {_NODE_START_S:.0f} s:\n{text[-2000:]}")
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
