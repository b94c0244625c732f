"""A MoEService in pods that really run: installed by helm, applied with kubectl, asked through its Service."""

import contextlib
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
            "drills": "Allowed",
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
    """One completion through the Service's own address, as a client in the cluster asks; degraded ones say so."""
    address = node.cluster.kubectl("get", "service", "tiny-svc-gateway", "-o", "jsonpath={.spec.clusterIP}")
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://{address}:8000/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=90) as answer:
        whole = json.load(answer)
    text = whole["choices"][0]["text"]
    assert isinstance(text, str)
    lost = whole["moerator"]["degraded_tokens"]
    return f"{text} (degraded: {lost})" if lost else text


def test_a_completion_comes_through_the_service(serving: Node) -> None:
    assert len(complete(serving)) > 0
    assert complete(serving) == complete(serving)


@contextlib.contextmanager
def steady_requests(node: Node, *, clients: int = 2) -> Iterator[list[str]]:
    """Clients that ask one after the other within the block; gives the answers so far. A failed request raises."""
    ended: Future[None] = Future()
    answers: list[str] = []
    stop = time.monotonic() + 400

    def ask() -> None:
        while not ended.done() and time.monotonic() < stop:
            answers.append(complete(node))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            ended.set_result(None)
        for task in asking:
            task.result()


def healed(node: Node) -> None:
    """Return once Ready has been lost and has come back: right after a pod was deleted it is still what it was."""
    until(lambda: condition(node, "Ready") != "True", within_s=60, what=lambda: picture(node))
    until(lambda: condition(node, "Ready") == "True", within_s=240, what=lambda: picture(node))


def rank_pods(node: Node, rank: int) -> list[str]:
    return names(node, f"moerator.dev/owner-name=tiny,moerator.dev/rank={rank}")


def lives(node: Node) -> dict[str, tuple[str, int]]:
    """name -> (uid, restarts) of every pod of the service."""
    shown = node.cluster.kubectl("get", "pods", "-l", "moerator.dev/owner-name=tiny", "-o", "json")
    pods = [(pod["metadata"], pod["status"].get("containerStatuses", [])) for pod in json.loads(shown)["items"]]
    return {meta["name"]: (meta["uid"], sum(c["restartCount"] for c in containers)) for meta, containers in pods}


def coordinator_pod(node: Node) -> str:
    """The newest: one that was asked to go may still be ending."""
    return names(node, "moerator.dev/owner-name=tiny,moerator.dev/role=coordinator")[-1]


AT_ONCE = ("--wait=false", "--grace-period=0", "--force")


def test_requests_go_on_while_a_deleted_rank_is_replaced(serving: Node) -> None:
    undisturbed = complete(serving)
    [victim] = rank_pods(serving, 0)
    with steady_requests(serving) as answers:
        serving.cluster.kubectl("delete", victim, *AT_ONCE)
        healed(serving)
    assert rank_pods(serving, 0) not in ([], [victim])
    assert len(answers) > 2
    assert set(answers) == {undisturbed}, "every expert had a live copy, so every answer is exact"


@pytest.mark.parametrize(("how", "rank"), [(AT_ONCE, 1), (("--wait=false",), 2)], ids=["at once", "with grace"])
def test_a_coordinators_pod_and_a_rank_deleted_together_cost_no_request_and_no_other_pod(
    serving: Node, how: tuple[str, ...], rank: int
) -> None:
    undisturbed = complete(serving)
    coordinator, [victim], before = coordinator_pod(serving), rank_pods(serving, rank), lives(serving)
    kept = {name: life for name, life in before.items() if f"pod/{name}" not in (coordinator, victim)}
    assert len(kept) == 4, "two ranks, two gateways"
    with steady_requests(serving) as answers:
        began = time.monotonic()
        serving.cluster.kubectl("delete", victim, coordinator, *how)
        healed(serving)
        after = lives(serving)
        whole_s = time.monotonic() - began
        answered = len(answers)
        until(lambda: len(answers) > answered + 6, within_s=60, what=lambda: picture(serving))
    log = serving.cluster.kubectl("logs", coordinator_pod(serving))
    print(f"Ready again after {whole_s:.0f} s, {len(answers)} requests, none failed;", log.strip().replace("\n", "; "))
    assert set(answers) == {undisturbed}, "every expert had a live copy, so every answer is exact"
    assert rank_pods(serving, rank) not in ([], [victim])
    assert {name: life for name, life in after.items() if name in kept} == kept, picture(serving)
    assert "the Ray head's store is copy" in log


def test_a_drill_applied_with_kubectl_passes(serving: Node) -> None:
    drill = {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEDrill",
        "metadata": {"name": "kill-rank-2"},
        "spec": {"target": {"kind": "MoEService", "name": "tiny", "rank": 2}, "fault": {"type": "KillRank"}},
    }

    def shown(path: str) -> str:
        return serving.cluster.kubectl("get", "moedrill", "kill-rank-2", "-o", f"jsonpath={path}")

    with steady_requests(serving):
        serving.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(drill))
        until(lambda: shown("{.status.verdict}"), within_s=240, what=lambda: picture(serving))
    assert shown("{.status.verdict}") == "Passed", shown("{.status}")
    assert shown("{.status.requestsFailed}") == "0"
    assert float(shown("{.status.detectedSeconds}")) < float(shown("{.status.restoredSeconds}"))


def test_a_pod_of_the_group_has_no_api_token(serving: Node) -> None:
    pod = names(serving, "moerator.dev/rank=1")[0]
    listed = serving.cluster.run_kubectl("exec", pod, "--", "ls", "/var/run/secrets/kubernetes.io")
    assert "No such file" in listed.stderr
