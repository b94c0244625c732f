"""Many nodes at once: kwok's simulation, in Go and deaf to a test's wishes. nodes.py has nodes that misbehave."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.controlplane.api import Api
from cluster.controlplane.build import ensure
from cluster.controlplane.kubelet import Node
from cluster.controlplane.process import Process
from cluster.controlplane.start import ControlPlane

STAGES = Path(__file__).with_suffix(".yaml")
LABEL, VALUE = "moerator.dev/simulated-by", "kwok"


@contextlib.contextmanager
def kwok(cluster: ControlPlane) -> Iterator[Process]:
    """Looks after the nodes that `add_nodes` made, and runs the pods on them, while the block lasts."""
    program = ensure(["kwok"])["kwok"]
    # A lease is renewed after a quarter of its duration, well within the node controller's grace.
    mine = (f"--manage-nodes-with-label-selector={LABEL}={VALUE}", "--node-lease-duration-seconds=8")
    command: list[str | Path] = [program, "--kubeconfig", cluster.kubeconfig, "--config", STAGES, *mine]
    running = Process("kwok", command, cluster.directory / "kwok.log")
    running.start()
    try:
        yield running
    finally:
        running.kill()
        with contextlib.suppress(subprocess.SubprocessError):
            cluster.kubectl("delete", "nodes", "-l", f"{LABEL}={VALUE}", "--wait=false")


async def add_nodes(api: Api, count: int, *, prefix: str, resources: Mapping[str, str]) -> None:
    """Nodes with these resources beside the usual ones; kwok makes them Ready and keeps them so."""
    for number in range(count):
        node = Node(f"{prefix}-{number}", {LABEL: VALUE}, resources)
        await api.create("/api/v1/nodes", node.manifest() | {"status": node.status(is_ready=False)})
