"""Joining a Ray node of this machine as a driver: what creates ranks, and gateways, which call them."""

import time
from types import SimpleNamespace

import ray
from ray._private import services

_JOIN_S = 120.0
_LOOK_EVERY_S = 0.25
"""Ray looks for a node that is starting once a second; a look takes 4 ms."""


def join_ray(*, address: str, namespace: str, node_ip: str, temp_dir: str) -> None:
    """Connect this process to the node with this `temp_dir`; waits for it and for its head.

    Raises ConnectionError after two minutes.
    """
    deadline = time.monotonic() + _JOIN_S
    clock = services.time
    services.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(min(seconds, _LOOK_EVERY_S))})
    try:
        while True:
            try:
                ray.init(
                    address=address,
                    namespace=namespace,
                    _node_ip_address=node_ip,
                    _temp_dir=temp_dir,
                    log_to_driver=False,
                    configure_logging=False,
                )
                return
            except (ConnectionError, RuntimeError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(f"no Ray at {address}: {error}") from error
                time.sleep(_LOOK_EVERY_S)
    finally:
        services.time = clock
