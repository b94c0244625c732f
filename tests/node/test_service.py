"""A MoEService in pods that really run: installed by helm, applied with kubectl, asked through its Service."""

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.controlplane.build import ensure
from node.machine.images import OPERATOR, ROOT, RUNTIME
from node.machine.isolation import run
from node.machine.node import Node
from tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, write_checkpoint

pytestmark = [pytest.mark.node, pytest.mark.timeout(900)]

SITE_PACKAGES = next(path for path in sys.path if path.endswith("site-packages"))
DEPENDENCIES = {"name": "dependencies", "hostPath": {"path": SITE_PACKAGES, "type": "Directory"}}
MOUNT = {"name": "dependencies", "mountPath": "/opt/site-packages", "readOnly": True}
RANKS = 3
PROMPT = "def main("


def service(model: Path) -> dict[str, Any]:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEService",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"path": "/models/tiny", "numExperts": NUM_EXPERTS, "numMoeLayers": NUM_LAYERS},
            "parallelism": {"expert": RANKS},
            "experts": {"redundantPerRank": NUM_EXPERTS // RANKS, "minCopies": 2},
            "template": {
                "spec": {
                    "image": RUNTIME,
                    "imagePullPolicy": "Never",
                    "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}},
                    "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
                    "volumes": [DEPENDENCIES, {"name": "model", "hostPath": {"path": str(model)}}],
                    "volumeMounts": [MOUNT, {"name": "model", "mountPath": "/models/tiny", "readOnly": True}],
                }
            },
        },
    }


def until(condition: Callable[[], Any], *, within_s: float, what: Callable[[], str]) -> Any:
    """The first true answer; raises AssertionError with `what()` when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what()}"
        time.sleep(1)
    return answer


@pytest.fixture(scope="module")
def installed(real_node: Node) -> Node:
    values = {
        "image": {"operator": OPERATOR, "runtime": RUNTIME, "pullPolicy": "Never"},
        "extraVolumes": [DEPENDENCIES],
        "extraVolumeMounts": [MOUNT],
    }
    file = real_node.home / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    helm = ensure(["helm"])["helm"]
    where = ("--kubeconfig", real_node.cluster.kubeconfig, "--namespace", "moerator-system", "--create-namespace")
    run(
        helm,
        "install",
        "moerator",
        ROOT / "helm/moerator",
        *where,
        "--values",
        file,
        "--wait",
        "--timeout",
        "180s",
        timeout_s=200,
    )
    return real_node


@pytest.fixture(scope="module")
def serving(installed: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    model = tmp_path_factory.mktemp("model")
    write_checkpoint(model)
    for folder in (model, *model.parents[:3]):
        folder.chmod(0o755)
    installed.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(service(model)))
    until(lambda: condition(installed, "Ready") == "True", within_s=420, what=lambda: picture(installed))
    yield installed
    installed.cluster.kubectl("delete", "moeservice", "tiny", "--wait=false")
    until(lambda: not names(installed), within_s=120, what=lambda: picture(installed))


def condition(node: Node, type_: str) -> str:
    path = f'jsonpath={{.status.conditions[?(@.type=="{type_}")].status}}'
    return node.cluster.kubectl("get", "moeservice", "tiny", "-o", path)


def names(node: Node, selector: str = "moerator.dev/owner-name=tiny") -> list[str]:
    return node.cluster.kubectl("get", "pods", "-l", selector, "-o", "name").split()


def picture(node: Node) -> str:
    """What a person would look at."""
    shown = [node.cluster.run_kubectl("get", "pods", "-A", "-o", "wide").stdout]
    shown.append(node.cluster.run_kubectl("get", "moeservice", "tiny", "-o", "yaml").stdout[-4000:])
    for pod in names(node):
        tail = node.cluster.run_kubectl("logs", pod, "--tail=15")
        shown.append(f"--- {pod}\n{tail.stdout}{tail.stderr}")
    operator = node.cluster.run_kubectl("-n", "moerator-system", "logs", "deployment/moerator", "--tail=30")
    return "\n".join([*shown, "--- operator", operator.stdout, operator.stderr])


def complete(node: Node, *, max_tokens: int = 24) -> str:
    """One completion through the Service's own address, as a client in the cluster asks."""
    address = node.cluster.kubectl("get", "service", "tiny-svc-gateway", "-o", "jsonpath={.spec.clusterIP}")
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://{address}:8000/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=90) as answer:
        text = json.load(answer)["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def test_a_completion_comes_through_the_service(serving: Node) -> None:
    assert len(complete(serving)) > 0
    assert complete(serving) == complete(serving)


def test_requests_go_on_while_a_deleted_rank_is_replaced(serving: Node) -> None:
    undisturbed = complete(serving)
    [victim] = names(serving, "moerator.dev/owner-name=tiny,moerator.dev/rank=0")
    stop = time.monotonic() + 300
    answers: list[str] = []

    def ask_until(done: Future[None]) -> None:
        while not done.done() and time.monotonic() < stop:
            answers.append(complete(serving))

    done: Future[None] = Future()
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_until, done) for _ in range(2)]
        try:
            serving.cluster.kubectl("delete", victim, "--wait=false", "--grace-period=0", "--force")
            until(
                lambda: (
                    names(serving, "moerator.dev/owner-name=tiny,moerator.dev/rank=0") not in ([], [victim])
                    and condition(serving, "Ready") == "True"
                ),
                within_s=240,
                what=lambda: picture(serving),
            )
        finally:
            done.set_result(None)
        for task in asking:
            task.result()  # a failed request raises here
    assert len(answers) > 2
    assert set(answers) == {undisturbed}, "every expert had a live copy, so every answer is exact"


def test_a_pod_of_the_group_has_no_api_token(serving: Node) -> None:
    pod = names(serving, "moerator.dev/rank=1")[0]
    listed = serving.cluster.run_kubectl("exec", pod, "--", "ls", "/var/run/secrets/kubernetes.io")
    assert "No such file" in listed.stderr
