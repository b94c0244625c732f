"""A rank's pod as its guard sees it: have the rank created, watch it, end with it.

This process imports neither torch nor Ray, so that it stays small and alive when they do not; the rank's actor is
created by a child that ends at once.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from moe_runtime.host import last_words, processes
from moe_runtime.host.guard import Guard, guard_socket_path
from moe_runtime.host.guard_face import GuardFace
from moe_runtime.host.pod_env import PodEnv
from moe_runtime.host.ray_env import head_listens, ray_environment, ray_temp_dir
from moe_runtime.rank.boot import RankBoot

_CREATE = "from moe_runtime.rank.actor import create; create()"
_BEGIN_S = 300.0
"""To the first heartbeat: the creator's own bounds on finding a Ray node and on making the actor, and a minute."""


class RankEnded(RuntimeError):
    """The rank is gone, so its pod is."""


async def guard_rank(env: PodEnv) -> None:
    """Runs until the rank has ended (RankEnded) or this is cancelled, which ends the rank."""
    assert env.rank is not None
    env.state_dir.mkdir(parents=True, exist_ok=True)
    guard = Guard(pod_uid=env.pod_uid, socket_path=guard_socket_path(env))
    face = GuardFace(guard, token=env.token, host=env.pod_ip, faults_enabled=env.config.faults_enabled)
    log = env.state_dir / "rank.log"
    boot = _boot(env, guard, face.address, log)
    last_words.forget(boot.last_words_path)
    following = asyncio.create_task(_follow(log))
    try:
        await _create(env, guard, boot)
        while not guard.ended.is_set():
            await asyncio.sleep(0.1)
        raise RankEnded(f"rank {env.rank}: {guard.reason}{last_words.told(boot.last_words_path)}")
    finally:
        await asyncio.shield(asyncio.to_thread(guard.fence, "its pod ends"))
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        face.close()
        guard.close()


def _boot(env: PodEnv, guard: Guard, guard_address: str, log: Path) -> RankBoot:
    return RankBoot(
        config_path=str(env.config_path),
        token_path=str(env.token_path),
        rank=env.rank if env.rank is not None else -1,
        pod_uid=env.pod_uid,
        pod_ip=env.pod_ip,
        node_name=env.node_name,
        guard_socket=str(guard.socket_path),
        guard_address=guard_address,
        coordinator_url=env.coordinator_url,
        log_path=str(log),
        ray_address=env.ray_address,
        ray_namespace=env.ray_namespace,
        ray_temp_dir=str(ray_temp_dir(env)),
    )


async def _create(env: PodEnv, guard: Guard, boot: RankBoot) -> None:
    log = Path(boot.log_path)
    command = [sys.executable, "-c", _CREATE, json.dumps(asdict(boot))]
    await head_listens(env)
    creator = processes.start(command, env=ray_environment(env, os.environ), log=log)
    deadline = time.monotonic() + _BEGIN_S
    while guard.state == "absent":
        if creator.poll() not in (None, 0):  # the actor could not be made, or died in its first steps
            raise RankEnded(f"rank {env.rank} was not created (code {creator.returncode}):\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise RankEnded(f"rank {env.rank} gave no sign of life in {_BEGIN_S:.0f} s:\n{_tail(log)}")
        await asyncio.sleep(0.05)
    while creator.poll() is None and not guard.ended.is_set():
        await asyncio.sleep(0.1)


def _tail(log: Path) -> str:
    try:
        return log.read_text(errors="replace")[-2000:]
    except FileNotFoundError:
        return ""


async def _follow(log: Path) -> None:
    """The rank's output becomes this pod's, as people expect of `kubectl logs`."""
    log.touch()
    with log.open(errors="replace") as file:
        while True:
            text = file.read()
            if text:
                sys.stdout.write(text)
                sys.stdout.flush()
            await asyncio.sleep(0.3)
