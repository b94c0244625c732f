"""One real control plane for the whole test run, and a namespace of its own for every test."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cluster.controlplane.api import Api, Object
from cluster.controlplane.build import CLUSTER_PROGRAMS, ensure
from cluster.controlplane.faults import Proxy, faulty
from cluster.controlplane.start import ADMIN, ControlPlane, Settings, control_plane
from cluster.coordinators import Coordinator, coordinators
from cluster.world import World

REPOSITORY = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd, kube-apiserver, kube-controller-manager and kube-scheduler; logs stay in pytest's temporary folder."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # the first build takes minutes: show that something happens
        ensure(CLUSTER_PROGRAMS)
    with control_plane(Settings(), directory=tmp_path_factory.mktemp("control-plane")) as running:
        yield running


@pytest.fixture
def namespace(cluster: ControlPlane, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace, usable at once; deleted afterwards without waiting for it."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].strip("-")
    name = f"{words}-{next(_numbers)}"
    cluster.kubectl("create", "namespace", name)
    # Pods are refused until the controller manager has made it.
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=30s")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
async def api(cluster: ControlPlane) -> AsyncIterator[Api]:
    """The administrator's connection."""
    async with Api(cluster.url, cluster.tokens[ADMIN], cluster.ca_file) as connection:
        yield connection


@pytest.fixture(scope="session")
def crds(cluster: ControlPlane) -> list[Object]:
    """crds/ applied and served; the control plane is thrown away with them."""
    folder = str(REPOSITORY / "crds")
    cluster.kubectl("apply", "--server-side", "-f", folder)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", folder)
    items: list[Object] = json.loads(cluster.kubectl("get", "-f", folder, "-o", "json"))["items"]
    return items


@pytest.fixture
def proxy(cluster: ControlPlane) -> Iterator[Proxy]:
    """A face of the API server that can be told to fail."""
    with faulty(cluster) as running:
        yield running


@pytest.fixture(scope="module")
def coordinator(cluster: ControlPlane) -> Iterator[Coordinator]:
    """Answers where the runtime's coordinators would: kubelets are simulated here."""
    with coordinators(cluster) as answering:
        yield answering


@pytest.fixture
def world(api: Api, namespace: str) -> World:
    return World(api, namespace)
