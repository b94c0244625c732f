"""The operator does all its work with the rights that the chart gives it, and the chart gives none that it never uses.

Every request of a whole life (a job, a service, a drill; a pod that fails, a scale, a time to live, the lease given
back) goes through a proxy that notes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.controlplane.api import Api
from cluster.controlplane.faults import Seen, faulty
from cluster.controlplane.helm import Helm
from cluster.controlplane.nodes import KubeletControls, Node, kubelets
from cluster.controlplane.start import ControlPlane
from cluster.coordinators import Coordinator, coordinators
from cluster.documents import GPU, drill, job, path_of, service
from cluster.operators import operator
from cluster.waiting import eventually
from cluster.world import World

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("crds")]

CHART = Path(__file__).resolve().parents[2] / "helm" / "moerator"
NAMESPACE, RELEASE = "moerator-rights", "rights"
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}

NEVER_USED_HERE = {
    # Asked for when owner references are written, where OwnerReferencesPermissionEnforcement is on.
    *("update moerator.dev/moejobs/finalizers", "update moerator.dev/moeservices/finalizers"),
    # A newer operator changes or removes what an older one made; a map of many slices shrinks.
    *("patch services", "delete services", "delete moerator.dev/expertmaps"),
    *(f"{verb} networking.k8s.io/networkpolicies" for verb in ("patch", "delete")),
}


@dataclass(frozen=True)
class Rights:
    """What `helm template` gives: the rules, and the environment that its Deployment sets."""

    rules: frozenset[str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def rights(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Rights:
    """The chart's accounts and roles on the cluster, its Deployment not: the operator runs beside the cluster."""
    helm = Helm(tmp_path_factory.mktemp("helm"))
    text = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", "1.36.3")
    documents = [document for document in yaml.safe_load_all(text) if document]
    granted = [document for document in documents if document["kind"] not in ("Deployment", "Service")]
    cluster.kubectl("create", "namespace", NAMESPACE)
    for document in granted:
        if not document["kind"].startswith("Cluster"):
            document["metadata"].setdefault("namespace", NAMESPACE)
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(granted))
    [deployment] = [document for document in documents if document["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return Rights(
        rules=frozenset(
            f"{verb} {group}/{resource}".replace(" /", " ")
            for document in granted
            if document["kind"] in ("Role", "ClusterRole")
            for rule in document["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        ),
        environment={
            entry["name"]: entry["value"]
            for entry in container["env"]
            if entry["name"].startswith("MOERATOR_") and "value" in entry
        },
    )


@pytest.fixture
def nodes(cluster: ControlPlane) -> Iterator[KubeletControls]:
    with kubelets(cluster, [Node(f"rights-{i}", {}, {GPU: "4"}) for i in range(2)]) as controls:
        yield controls


def used(seen: Seen) -> str:
    """The right that a request needed, such as `patch moerator.dev/moejobs/status`."""
    parts = seen.path.strip("/").split("/")
    if len(parts) < (3 if parts[0] == "api" else 4):
        return f"read {seen.path}"  # discovery, which everybody may
    group, rest = ([], parts[2:]) if parts[0] == "api" else ([parts[1]], parts[3:])
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    verb = VERBS.get(seen.method) or ("watch" if "watch=" in seen.query else "list" if seen.is_list else "get")
    return f"{verb} {'/'.join([*group, *rest[:1], *rest[2:]])}"


def as_reading(right: str) -> str:
    """Who may list may as well get and watch: one right, `read`."""
    verb, resource = right.split(" ", 1)
    return f"read {resource}" if verb in ("get", "list", "watch") else right


async def live_a_whole_life(world: World, nodes: KubeletControls, coordinator: Coordinator) -> None:
    await world.apply(job("study", ranks=2, ttlSecondsAfterFinished=1))
    await world.until_running(2)
    nodes.fail_pod(world.namespace, "study-job-rank-1-1")
    await world.until_pods(
        lambda pods: [pod["metadata"]["name"] for pod in pods] == ["study-job-rank-0-1", "study-job-rank-1-2"],
        what="a replacement",
    )
    await world.until_running(2)
    coordinator.trained.add(f"{world.namespace}/study")
    await eventually(lambda: world.find("moejobs", "study"), lambda seen: seen is None, what="its time to live")

    await world.apply(service("chat", ranks=2))
    await world.until_condition("moeservices", "chat", "Ready", "True")
    await world.apply(service("chat", ranks=3))
    await world.until_running(3)
    await world.until_condition("moeservices", "chat", "Ready", "True", reason="AllActive")
    await world.apply(drill("lose-a-rank", target="absent", rank=0))
    await eventually(
        lambda: world.find("moedrills", "lose-a-rank"),
        lambda seen: bool(seen and seen.get("status", {}).get("conditions")),
        what="the drill's status",
    )
    await world.api.delete(path_of("moeservices", world.namespace, "chat"))
    # The garbage collector looks for new kinds every 30 s: pods of a kind just installed are collected no sooner.
    await world.until_pods(lambda pods: pods == [], what="the end of its pods", timeout_s=90)


async def test_the_operator_needs_all_of_the_charts_rights_and_no_other(
    cluster: ControlPlane, api: Api, namespace: str, nodes: KubeletControls, rights: Rights
) -> None:
    token = cluster.kubectl("create", "token", RELEASE, "-n", NAMESPACE, "--duration=1h").strip()
    with faulty(cluster, user="chart", token=token) as proxy, coordinators(cluster) as coordinator:
        environment = rights.environment | {"MOERATOR_OPERATOR_NAMESPACE": NAMESPACE}
        environment |= {"MOERATOR_COORDINATOR_URL": coordinator.url, "MOERATOR_RESYNC_S": "5"}
        environment.pop("MOERATOR_HTTP_BIND")
        with operator(cluster, kubeconfig=proxy.kubeconfig, name="rights", **environment) as running:
            await live_a_whole_life(World(api, namespace), nodes, coordinator)
            running.process.terminate()
        refused = {used(seen) for seen in proxy.seen if seen.status == 403}
        assert refused == set()
        needed = {used(seen) for seen in proxy.seen if 0 < seen.status < 400 or seen.status in (404, 409)}
        unused = {as_reading(right) for right in rights.rules} - {as_reading(right) for right in needed}
        assert unused == NEVER_USED_HERE
