"""The rank's Ray actor: what gateways call, around the step loop; and how a guard has it created.

The actor is detached: the process that creates it ends at once. What ends the rank is its guard.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pydantic import TypeAdapter
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_core.contract.names import rank_actor_name
from moe_core.contract.runtime_config import RuntimeConfig
from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.host import last_words
from moe_runtime.host.heartbeat import Heartbeat
from moe_runtime.host.ray_driver import join_ray
from moe_runtime.rank.boot import RankBoot
from moe_runtime.rank.desk import Desk, Poll

if TYPE_CHECKING:
    from moe_runtime.rank.loop import StepLoop

_CREATE_S = 120.0
_EXIT_STEP_LOOP = 71


class RankActor:
    """Async methods only: they answer while the step loop, a thread of its own, is in a collective."""

    def __init__(self, boot: dict[str, Any]) -> None:
        self._boot = TypeAdapter(RankBoot).validate_python(boot)
        self._desk: Desk | None = None
        self._loop: StepLoop | None = None

    async def start(self) -> int:
        """Begin in the background; returns the pid."""
        _redirect_output(Path(self._boot.log_path))
        self._desk = Desk(asyncio.get_running_loop())
        threading.Thread(target=self._begin, name="rank-begin", daemon=True).start()
        return os.getpid()

    def _begin(self) -> None:
        """Imports torch and transformers, which takes seconds: not in the event loop."""
        boot = self._boot
        assert self._desk is not None
        try:
            config = RuntimeConfig.parse(Path(boot.config_path).read_bytes())
            token = Path(boot.token_path).read_text(encoding="utf-8").strip()
            # Before the imports, so that the guard sees a death among them. Without a guard this raises.
            self._heartbeat = Heartbeat(Path(boot.guard_socket), pod_uid=boot.pod_uid)
            from moe_runtime.rank.assembly import assemble

            self._loop = assemble(
                config,
                token=token,
                rank=boot.rank,
                pod_uid=boot.pod_uid,
                pod_ip=boot.pod_ip,
                node_name=boot.node_name,
                guard_address=boot.guard_address,
                coordinator_url=boot.coordinator_url,
                desk=self._desk,
                settled=self._heartbeat.settle,
            )
            self._loop.run()
        except BaseException as error:
            last_words.leave(boot.last_words_path, error)
            raise
        finally:
            # The loop only ends by a mistake of ours: the guard has to see that, not a rank that answers nothing.
            if self._loop is None or self._loop.crashed is not None:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(_EXIT_STEP_LOOP)

    def _at_desk(self) -> Desk:
        assert self._desk is not None, "start comes first"
        return self._desk

    async def submit(self, request: GenerationRequest, wait_s: float) -> Poll:
        desk = self._at_desk()
        desk.submit(request)
        return await desk.poll(request.request_id, have=0, wait_s=wait_s)

    async def poll(self, request_id: str, have: int, wait_s: float) -> Poll:
        """Raises UnknownRequest."""
        return await self._at_desk().poll(request_id, have=have, wait_s=wait_s)

    async def cancel(self, request_id: str) -> None:
        self._at_desk().cancel(request_id)

    async def view(self) -> str:
        """The committed membership (JSON) while this rank is in it, else nothing."""
        membership = self._loop.membership if self._loop is not None else None
        return membership.canonical() if membership is not None else ""


def _redirect_output(path: Path) -> None:
    """Into the pod's own log: Ray's folder of logs is shared by ranks on one node, and nobody looks there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def create() -> None:
    """Run by the guard in a process that ends then: `python -c '...create()' BOOT_JSON`. Exit code 0: it began."""
    boot: dict[str, Any] = json.loads(sys.argv[1])
    try:
        join_ray(
            address=boot["ray_address"],
            namespace=boot["ray_namespace"],
            node_ip=boot["pod_ip"],
            temp_dir=boot["ray_temp_dir"],
        )
    except ConnectionError as error:
        print(f"no Ray node to start the rank on: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    config = RuntimeConfig.parse(Path(boot["config_path"]).read_bytes())
    node_id = ray.get_runtime_context().get_node_id()
    name = rank_actor_name(boot["pod_uid"])
    actor = (
        ray.remote(RankActor)
        .options(
            name=name,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=512,
            num_cpus=0,
            num_gpus=1 if config.device == "cuda" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(boot)
    )
    try:
        pid = ray.get(actor.start.remote(), timeout=_CREATE_S)
    except (RayError, TimeoutError) as error:
        print(f"rank {boot['rank']} did not start: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    print(f"rank {boot['rank']} runs as pid {pid}", flush=True)
    with contextlib.suppress(RayError):
        ray.shutdown()
    os._exit(0)
