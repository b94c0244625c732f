"""The examples for a cluster, applied as NOTES of the chart say, up to a service whose every rank is active."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.controlplane.nodes import kubelets
from cluster.controlplane.start import ControlPlane
from cluster.coordinators import Coordinator
from cluster.operators import operator
from cluster.world import Room, World

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("crds")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = {
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "spec": {
        "accessModes": ["ReadWriteMany"],
        "capacity": {"storage": "1Gi"},
        "nfs": {"server": "127.0.0.1", "path": "/"},
        "persistentVolumeReclaimPolicy": "Delete",
    },
}


@pytest.fixture
def room(cluster: ControlPlane, namespace: str) -> Iterator[Room]:
    """One node, and a volume that the claim of models.yaml can have."""
    volume = {**SHARED, "metadata": {"name": namespace}}
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(volume))
    with kubelets(cluster) as controls:
        nodes = Room(controls, namespace.rsplit("-", 1)[1])
        nodes.add("a")
        yield nodes
    cluster.kubectl("delete", "pv", namespace, "--wait=false")


async def test_the_tiny_job_trains_to_its_end_and_the_tiny_service_serves_on_every_rank(
    cluster: ControlPlane, world: World, room: Room, coordinator: Coordinator
) -> None:
    def apply(*names: str) -> None:
        files = [argument for name in names for argument in ("-f", str(EXAMPLES / name))]
        cluster.kubectl("apply", "-n", world.namespace, *files)

    with operator(cluster, world.namespace, MOERATOR_COORDINATOR_URL=coordinator.url):
        await asyncio.to_thread(apply, "cluster/models.yaml", "cluster/job-tiny.yaml")
        await world.until_condition("moejobs", "tiny", "Accepted", "True")
        ranks = await world.until_running(4)
        assert {"name": "models", "mountPath": "/models"} in ranks[0]["spec"]["containers"][0]["volumeMounts"]
        coordinator.trained.add(f"{world.namespace}/tiny")
        await world.until_condition("moejobs", "tiny", "Complete", "True")
        coordinator.trained.clear()

        await asyncio.to_thread(apply, "cluster/service-tiny.yaml")
        await world.until_condition("moeservices", "tiny", "Accepted", "True")
        await world.until_condition("moeservices", "tiny", "Placed", "True")
        await world.until_condition("moeservices", "tiny", "Ready", "True")
        await asyncio.to_thread(apply, "drill-tiny.yaml")
        await world.until_condition("moedrills", "kill-rank-2", "Accepted", "True")
