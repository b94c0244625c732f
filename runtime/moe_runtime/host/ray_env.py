"""The environment every Ray process of ours runs in; no Ray is imported here.

Ray reads its settings from the environment of each process, so head, nodes, drivers and actors must agree on them.
"""

import asyncio
import os
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from moe_core.contract.names import ROLE_GATEWAY, ROLE_NODE, ROLE_RANK
from moe_runtime.host.pod_env import PodEnv, ray_token

_RECONNECT_S = 7 * 24 * 3600
"""How long nodes, actors and drivers wait for a dead head; Ray's default of 60 s would end them."""

OBJECT_STORE_BYTES = 78643200
"""Ray's smallest object store (75 MiB): nothing large goes through it here."""


def ray_environment(env: PodEnv, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` plus what Ray needs. Writes the derived token to a private file in the pod's state folder."""
    token_path = write_ray_token(env)
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(_RECONNECT_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "3600000",  # else the head writes counters into its store every 5 s
        "RAY_enable_metrics_collection": "false",
        # A head that is lost with its node closes no connection: after 300 + 120 s by default, here after 20 s, its
        # nodes and drivers go to the new one. Seen with the old one cut off: not within 150 s, and after 10 s.
        "RAY_grpc_client_keepalive_time_ms": "10000",
        "RAY_grpc_client_keepalive_timeout_ms": "10000",
        "RAY_timeout_ms_task_wait_for_death_info": "100",  # default 1000: how long a caller waits to learn why
        "RAY_worker_register_timeout_seconds": "120",
        "RAY_agent_register_timeout_ms": "120000",  # a node on busy cores: its agent needs its imports first
        "RAY_DEDUP_LOGS": "0",
        "PYTHONFAULTHANDLER": "1",
    }
    if is_loopback(env.pod_ip):
        # Without it Ray replaces 127.0.0.1 by the machine's outer address, where its head does not listen.
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    threads = {name: environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**environ, **settings, **threads}


def head_environment(env: PodEnv, environ: Mapping[str, str]) -> dict[str, str]:
    """For the head: its state lies in an embedded store, so that a new head on the same folder takes its nodes back."""
    store = head_store_dir(env)
    store.mkdir(parents=True, exist_ok=True)
    return {**ray_environment(env, environ), "RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(store)}


def head_store_dir(env: PodEnv) -> Path:
    """Where the head keeps its state, in the coordinator's pod."""
    return env.state_dir / "gcs"


def write_ray_token(env: PodEnv) -> Path:
    """The file that RAY_AUTH_TOKEN_PATH names, readable by its owner only."""
    env.state_dir.mkdir(parents=True, exist_ok=True)
    path = env.state_dir / "ray-token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(ray_token(env.token))
    return path


def ray_temp_dir(env: PodEnv) -> Path:
    """Where a pod's node keeps its sockets and logs: a short path, because a socket's must stay under 108 bytes.

    The same for every incarnation on one state folder, so that a new head takes the old one's place. A driver finds its
    node by this path (several may run on one machine), so a shared node's follows from what all its pods know.
    """
    if env.role == ROLE_NODE or uses_shared_node(env):
        # Not below TMPDIR: that may differ from pod to pod.
        return env.run_folder / f"moe-{_short(f'shared:{env.config.uid}:{env.config.ray_port}')}"
    return Path(tempfile.gettempdir()) / f"moe-{_short(str(env.state_dir))}"


def uses_shared_node(env: PodEnv) -> bool:
    """Whether this pod has no Ray node of its own. The coordinator always has one: the head."""
    return env.shared_ray and env.role in (ROLE_RANK, ROLE_GATEWAY)


def _short(key: str) -> str:
    return sha256(key.encode()).hexdigest()[:12]


async def head_listens(env: PodEnv) -> None:
    """Waits until Ray's head takes connections. Ray's own clients wait in steps of 40 s when they come too early."""
    host, port = env.config.coordinator_host, env.config.ray_port
    while True:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 1.0)
        except (OSError, TimeoutError):
            await asyncio.sleep(0.1)
            continue
        writer.close()
        return


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("localhost", "::1")
