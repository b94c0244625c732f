"""The chart with the real helm on a real API server: what it renders is taken, and its account may do what is needed.

A control plane of its own: what helm does to CustomResourceDefinitions cannot be seen where they are already there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.controlplane.api import Object
from cluster.controlplane.helm import Helm
from cluster.controlplane.nodes import Node, kubelets
from cluster.controlplane.start import ControlPlane, control_plane

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "moerator"
NAMESPACE, RELEASE = "moerator-system", "moerator"
VARIANTS = {
    "default": [],
    "two namespaces": ["--set", "namespaces={team-a,team-b}"],
    "standby": ["--set", "replicas=3"],
    "open network": ["--set", "networkPolicy.enabled=false"],
    "scraped": ["--set", "networkPolicy.metricsNamespaces={monitoring}"],
    "no metrics": ["--set", "metrics.service=false"],
    "own account": ["--set", "serviceAccount.name=robot,serviceAccount.annotations.cloud/role=a"],
    "placed": ["--set", "nodeSelector.pool=system,priorityClassName=system-cluster-critical,logLevel=debug"],
    "extras": [
        "--set-json",
        'extraEnv=[{"name":"A","value":"b"}]',
        "--set-json",
        'extraVolumes=[{"name":"v","emptyDir":{}}]',
        "--set-json",
        'extraVolumeMounts=[{"name":"v","mountPath":"/v"}]',
        "--set-json",
        'tolerations=[{"operator":"Exists"}]',
        "--set-json",
        'image.pullSecrets=["registry"]',
    ],
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster that has not seen moerator, with one simulated node."""
    with (
        control_plane(directory=tmp_path_factory.mktemp("chart")) as running,
        kubelets(running, [Node("n0")], heartbeat_s=1.5),
    ):
        for name in ("team-a", "team-b"):
            running.kubectl("create", "namespace", name)
        yield running


@pytest.fixture(scope="module")
def helm(fresh: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"), fresh.kubeconfig)


@pytest.fixture(scope="module")
def installed(fresh: ControlPlane, helm: Helm) -> Iterator[str]:
    """The release, ready; what helm said about it."""
    options = ("--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout", "60s")
    yield helm("install", RELEASE, str(CHART), *options)
    if helm.run("status", RELEASE, "--namespace", NAMESPACE).returncode == 0:
        helm("uninstall", RELEASE, "--namespace", NAMESPACE)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"))


def rendered(helm: Helm, *options: str) -> list[Object]:
    text = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", "1.36.3", *options)
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.mark.parametrize("variant", VARIANTS)
def test_lint_finds_nothing(offline: Helm, variant: str) -> None:
    answer = offline("lint", "--strict", str(CHART), *VARIANTS[variant])
    assert "0 chart(s) failed" in answer
    assert "[ERROR]" not in answer
    assert "[WARNING]" not in answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_it_renders_is_taken_by_the_api_server(
    fresh: ControlPlane, offline: Helm, tmp_path: Path, variant: str
) -> None:
    fresh.run_kubectl("create", "namespace", NAMESPACE)
    documents = rendered(offline, *VARIANTS[variant])
    assert {"Deployment", "ServiceAccount", "ClusterRole"} <= {document["kind"] for document in documents}
    for document in documents:
        if not document["kind"].startswith("Cluster"):
            document["metadata"].setdefault("namespace", NAMESPACE)  # as helm does
    answer = fresh.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "-f", "-"), stdin=yaml.safe_dump_all(documents)
    )
    assert answer.count("(server dry run)") == len(documents)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("replicas=0", "replicas"),
        ("replica=2", "replica"),
        ("image.tag=1", "tag"),
        ("logLevel=loud", "logLevel"),
        ("port=80", "port"),
        ("namespaces={Team}", "namespaces"),
        ("namespaces={a,a}", "namespaces"),
        ("metrics.service=perhaps", "service"),
        ("networkPolicy.enabled=maybe", "enabled"),
        ("networkPolicy.metricsNamespaces={Mon}", "metricsNamespaces"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("leaseName=", "leaseName"),
    ],
)
def test_a_wrong_value_is_refused_by_name(offline: Helm, given: str, words: str) -> None:
    done = offline.run("template", RELEASE, str(CHART), "--set", given)
    assert done.returncode != 0
    assert words in done.stderr


def test_every_value_has_its_comment() -> None:
    for paragraph in (CHART / "values.yaml").read_text().split("\n\n"):
        comments = 0
        for line in paragraph.splitlines():
            comments += line.strip().startswith("#")
            assert comments or line.strip().endswith(":"), f"no comment above {line!r}"


def test_the_charts_crds_are_those_of_the_repository() -> None:
    ours = {path.name: path.read_text() for path in (REPOSITORY / "crds").glob("*.yaml")}
    assert {path.name: path.read_text() for path in (CHART / "crds").glob("*.yaml")} == ours


def test_the_operators_pod_may_run_where_only_restricted_pods_may(offline: Helm, fresh: ControlPlane) -> None:
    fresh.run_kubectl("create", "namespace", "restricted")
    fresh.kubectl(
        *("label", "--overwrite", "namespace", "restricted", "pod-security.kubernetes.io/enforce=restricted"),
        "pod-security.kubernetes.io/enforce-version=latest",
    )
    [deployment] = [document for document in rendered(offline) if document["kind"] == "Deployment"]
    template = deployment["spec"]["template"]
    # A bare pod is refused at once where a Deployment only warns.
    spec = {key: value for key, value in template["spec"].items() if key != "serviceAccountName"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": spec}
    done = fresh.run_kubectl("apply", "--dry-run=server", "-n", "restricted", "-f", "-", stdin=json.dumps(pod))
    assert done.returncode == 0, done.stderr
    [container] = template["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert "livenessProbe" in container


def test_the_install_says_what_to_do_next(installed: str) -> None:
    assert "STATUS: deployed" in installed
    assert "kubectl apply -f examples/cluster/service-tiny.yaml" in installed


def test_the_install_brings_the_five_kinds_and_a_ready_operator(fresh: ControlPlane, installed: str) -> None:
    names = fresh.kubectl("api-resources", "--api-group=moerator.dev", "--no-headers", "-o", "name").split()
    assert sorted(names) == [
        f"{plural}.moerator.dev"
        for plural in ("clustertopologies", "expertmaps", "moedrills", "moejobs", "moeservices")
    ]
    ready = fresh.kubectl(
        "get", "deployment", RELEASE, "-n", NAMESPACE, "-o", "jsonpath={.status.readyReplicas}/{.spec.replicas}"
    )
    assert ready == "1/1"


MAY = [
    *(f"{verb} moeservices.moerator.dev -A" for verb in ("get", "list", "watch")),
    *(f"{verb} moejobs.moerator.dev -A" for verb in ("get", "list", "watch", "delete")),
    *(f"{verb} moedrills.moerator.dev -A" for verb in ("get", "list", "watch")),
    *(f"{verb} clustertopologies.moerator.dev" for verb in ("get", "list", "watch")),
    *(
        f"patch {kind}.moerator.dev --subresource=status -A"
        for kind in ("moejobs", "moeservices", "moedrills", "expertmaps")
    ),
    *(f"{verb} expertmaps.moerator.dev -A" for verb in ("get", "list", "watch", "create", "patch", "delete")),
    *(f"{verb} pods -n team-a" for verb in ("get", "list", "watch", "create", "patch", "delete")),
    *(f"{verb} services -n team-a" for verb in ("get", "create", "patch", "delete")),
    *(f"{verb} networkpolicies.networking.k8s.io -n team-a" for verb in ("get", "list", "create", "patch", "delete")),
    *(f"{verb} nodes" for verb in ("get", "list", "watch")),
    "create events.events.k8s.io -n team-a",
    f"create leases.coordination.k8s.io -n {NAMESPACE}",
    f"get leases.coordination.k8s.io/moerator -n {NAMESPACE}",
    f"update leases.coordination.k8s.io/moerator -n {NAMESPACE}",
]
MAY_NOT = [
    *(f"{verb} nodes" for verb in ("create", "update", "patch", "delete")),
    *(f"{verb} moeservices.moerator.dev -A" for verb in ("create", "update", "patch", "delete")),
    *(f"{verb} moejobs.moerator.dev -A" for verb in ("create", "update", "patch")),
    *(f"{verb} clustertopologies.moerator.dev" for verb in ("create", "update", "patch", "delete")),
    *(f"{verb} secrets -A" for verb in ("list", "watch", "update", "patch", "delete")),
    *(f"{verb} serviceaccounts -A" for verb in ("create", "update", "impersonate")),
    *(f"{verb} clusterroles.rbac.authorization.k8s.io" for verb in ("create", "update", "bind", "escalate")),
    *(f"{verb} customresourcedefinitions.apiextensions.k8s.io" for verb in ("create", "update", "patch", "delete")),
    *(f"create pods --subresource={face} -A" for face in ("exec", "attach", "portforward", "binding", "eviction")),
    *("deletecollection pods -A", "deletecollection moejobs.moerator.dev -A", "create namespaces", "delete namespaces"),
    *(
        "create deployments.apps -A",
        "create daemonsets.apps -A",
        "create persistentvolumes",
        "get nodes --subresource=proxy",
    ),
    "create serviceaccounts --subresource=token -A",
    "get leases.coordination.k8s.io/moerator -n kube-system",
    f"update leases.coordination.k8s.io/another -n {NAMESPACE}",
    "* *",
]


@pytest.fixture(scope="module")
def account(fresh: ControlPlane, installed: str) -> Path:
    """The kubeconfig of the chart's ServiceAccount."""
    return fresh.service_account_kubeconfig(NAMESPACE, RELEASE)


def may(cluster: ControlPlane, kubeconfig: Path, question: str) -> bool:
    return cluster.run_kubectl("auth", "can-i", *question.split(), kubeconfig=kubeconfig).stdout.strip() == "yes"


def test_the_operators_account_may_do_what_the_operator_does(fresh: ControlPlane, account: Path) -> None:
    assert [question for question in MAY if not may(fresh, account, question)] == []


def test_the_operators_account_may_do_nothing_beyond(fresh: ControlPlane, account: Path) -> None:
    assert [question for question in MAY_NOT if may(fresh, account, question)] == []


def test_no_rule_of_the_chart_has_a_wildcard(offline: Helm) -> None:
    roles = [document for document in rendered(offline) if document["kind"] in ("Role", "ClusterRole")]
    assert roles
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in (*rule["apiGroups"], *rule.get("resources", ()), *rule["verbs"]), role["metadata"]["name"]


def test_an_operator_of_two_namespaces_has_no_rights_in_a_third(
    fresh: ControlPlane, helm: Helm, installed: str
) -> None:
    options = ("--namespace", "moerator-two", "--create-namespace", "--set", "namespaces={team-a,team-b}")
    helm("install", "two", str(CHART), *options)
    try:
        account = fresh.service_account_kubeconfig("moerator-two", "two")
        for question in ("create pods", "patch pods", "create services", "list moeservices.moerator.dev"):
            for namespace in ("team-a", "team-b"):
                assert may(fresh, account, f"{question} -n {namespace}"), question
            assert not may(fresh, account, f"{question} -n default"), question
        assert not may(fresh, account, "get secrets -n default")
        assert may(fresh, account, "list pods -A")  # a node's free room is what the pods of every namespace leave
    finally:
        helm("uninstall", "two", "--namespace", "moerator-two")


def test_an_upgrade_changes_the_operator_and_a_rollback_returns(
    fresh: ControlPlane, helm: Helm, installed: str
) -> None:
    def replicas() -> str:
        return fresh.kubectl("get", "deployment", RELEASE, "-n", NAMESPACE, "-o", "jsonpath={.spec.replicas}")

    helm("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE, "--set", "replicas=2", "--wait", "--timeout", "60s")
    assert replicas() == "2"
    helm("rollback", RELEASE, "1", "--namespace", NAMESPACE, "--wait", "--timeout", "60s")
    assert replicas() == "1"


def test_uninstalling_leaves_the_kinds_and_nothing_else(fresh: ControlPlane, helm: Helm, installed: str) -> None:
    helm("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "60s")
    kinds = "deployments,services,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,networkpolicies"
    left = fresh.kubectl("get", kinds, "-A", "-l", f"app.kubernetes.io/instance={RELEASE}", "-o", "name")
    assert left == ""
    assert "moeservices.moerator.dev" in fresh.kubectl("get", "crd", "-o", "name")
