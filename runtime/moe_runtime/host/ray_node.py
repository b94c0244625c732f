"""One Ray node, started as a child of the pod: `python -m moe_runtime.host.ray_node '{"head": true, ...}'`.

Not the `ray start` command: that one always brings the Ray Client server (a fixed port, one more process) and the API
server of the dashboard, 250 MiB that nothing here asks for. Prints one line when the node is up; ends when any process
of the node ends; the node's processes die with this one.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
READY_LINE = "ray node is up"
_REGISTER_S = 150.0
"""Ray gives a node 30 s to register; on two cores with a load of 14 that was not enough."""


def _patient(ask: Callable[..., T]) -> Callable[..., T]:
    """A question of Ray's to a node or a head that is starting, asked again and again instead of giving up."""

    def answered(*arguments: Any, **options: Any) -> T:
        deadline = time.monotonic() + _REGISTER_S
        while True:
            try:
                return ask(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    return answered


def _read(gcs_client: Any, key: str, namespace: bytes, **_: Any) -> bytes:
    """What a head has written under a key. Ray looks every two seconds, and a head writes a moment after it listens."""
    from ray.exceptions import RpcError

    try:
        value: bytes | None = gcs_client.internal_kv_get(key.encode(), namespace)
    except RpcError as error:
        raise RuntimeError(f"no head to read {key!r} from: {error}") from error
    if not value:
        raise RuntimeError(f"the head has not written {key!r}")
    return value


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    import ray._private.services as ray_services
    import ray._private.utils as ray_utils
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):  # type: ignore[misc]  # Ray publishes no types
        """A node without the dashboard's API server, which `include_dashboard=False` only strips."""

        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            """Nothing: no dashboard."""

    ray_services.get_node = _patient(ray_services.get_node)
    ray_utils.internal_kv_get_with_retry = _patient(_read)
    # The per-node agent is started in its minimal form: no dashboard modules, half the memory.
    ray_services.ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not wanted")
    head = bool(options["head"])
    params = RayParams(
        node_ip_address=options["ip"],
        gcs_server_port=options["port"] if head else None,
        gcs_address=None if head else options["address"],
        num_cpus=0,
        num_gpus=options.get("num_gpus", 0),
        object_store_memory=options["object_store_bytes"],
        temp_dir=options["temp_dir"],
        include_log_monitor=False,
        include_dashboard=False,
        no_monitor=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if head:
        # A head that was killed leaves this file; the next one on the same folder would take it for a running one.
        (Path(options["temp_dir"]) / "ray_current_cluster").unlink(missing_ok=True)
    node = LeanNode(params, head=head, shutdown_at_exit=True, spawn_reaper=True)
    print(READY_LINE, node.node_id, flush=True)
    while not node.dead_processes():
        time.sleep(0.2)
    print("a process of the Ray node ended:", [kind for kind, _ in node.dead_processes()], flush=True)
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    os._exit(1)


if __name__ == "__main__":
    main()
