"""This machine as the one node of the local shell, and the ports the shell borrows from it."""

import os
import random
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_core.facts import NodeFact
from moe_core.topology.quantity import request_of
from moe_operator.cluster.local_pod import LocalPod

NODE_NAME = "localhost"
MAX_PODS = 110
"""A kubelet's own default."""

PORTS_BELOW_EPHEMERAL = range(20000, 32000)
"""Ray and Gloo draw from the kernel's ephemeral range (32768 and up); ports given ahead of time lie below it."""


def requests_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """What all containers of a pod ask for, and the pod's own place."""
    total = {"pods": 1}
    for container in manifest["spec"]["containers"]:
        resources = container.get("resources", {})
        for resource, amount in request_of(resources.get("requests", {}), resources.get("limits", {})).items():
            total[resource] = total.get(resource, 0) + amount
    return total


def node_fact(pods: list[LocalPod], *, own: frozenset[str]) -> NodeFact:
    """The machine with all its processors and memory; it offers no devices. `own`: uids of the owner's pods."""
    used: dict[str, int] = {}
    for pod in pods:
        if pod.node is not None and pod.uid not in own:
            for resource, amount in requests_of(pod.manifest).items():
                used[resource] = used.get(resource, 0) + amount
    return NodeFact(
        name=NODE_NAME,
        labels={"kubernetes.io/hostname": NODE_NAME},
        allocatable={
            "cpu": 1000 * len(os.sched_getaffinity(0)),
            "memory": memory_bytes(),
            "pods": MAX_PODS,
        },
        used=used,
    )


def memory_bytes() -> int:
    """The machine's memory, or the smaller limit of the control group this process runs in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


class Ports:
    """Free loopback ports, each given out once."""

    def __init__(self) -> None:
        self._given: set[int] = set()

    def take(self, preferred: int | None = None) -> int:
        """A port nobody listens on now; `preferred` if it is free."""
        candidates = random.sample(PORTS_BELOW_EPHEMERAL, 200)
        for port in [preferred, *candidates] if preferred else candidates:
            if port not in self._given and is_free(port):
                self._given.add(port)
                return port
        raise OSError(f"no free port among 200 tried in {PORTS_BELOW_EPHEMERAL}")


def is_free(port: int) -> bool:
    """Whether nobody listens there; connections that a former listener has just closed do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
