"""The faulty proxy lets everything through but what a test asks it to spoil."""

from __future__ import annotations

import pytest

from cluster.controlplane.faults import Proxy
from cluster.controlplane.start import ControlPlane

pytestmark = pytest.mark.cluster


def create(cluster: ControlPlane, proxy: Proxy, namespace: str, name: str) -> tuple[int, str]:
    done = cluster.run_kubectl("create", "configmap", name, "-n", namespace, kubeconfig=proxy.kubeconfig)
    return done.returncode, done.stderr


def test_requests_pass_and_are_noted(cluster: ControlPlane, proxy: Proxy, namespace: str) -> None:
    assert create(cluster, proxy, namespace, "a") == (0, "")
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    assert [(seen.method, seen.status) for seen in proxy.seen if seen.path == path] == [("POST", 201)]
    watched = cluster.run_kubectl(
        *("wait", "--for=create", "configmap/a", "-n", namespace, "--timeout=5s"), kubeconfig=proxy.kubeconfig
    )
    assert watched.returncode == 0
    cluster.kubectl("get", "configmaps", "-n", namespace, kubeconfig=proxy.kubeconfig)
    assert proxy.seen[-1].is_list
    assert not any(seen.is_list for seen in proxy.seen if seen.path.endswith("/a"))


def test_a_refusal_holds_as_often_as_asked(cluster: ControlPlane, proxy: Proxy, namespace: str) -> None:
    proxy.refuse("POST", "/configmaps$", status=409)
    code, said = create(cluster, proxy, namespace, "a")
    assert code == 1
    assert "made up by the test: 409" in said
    assert create(cluster, proxy, namespace, "a")[0] == 0


def test_too_many_requests_comes_with_its_retry_after(cluster: ControlPlane, proxy: Proxy, namespace: str) -> None:
    fault = proxy.refuse("POST", "/configmaps$", status=429, retry_after_s=1)
    assert create(cluster, proxy, namespace, "a")[0] == 0  # kubectl waits and asks again
    assert fault.times == 0
    assert [seen.status for seen in proxy.seen if seen.method == "POST"] == [429, 201]


def test_a_lost_answer_leaves_the_object_made(cluster: ControlPlane, proxy: Proxy, namespace: str) -> None:
    proxy.lose_answer("POST", "/configmaps$")
    assert create(cluster, proxy, namespace, "a")[0] == 1
    assert cluster.kubectl("get", "configmap", "a", "-n", namespace, "-o", "name") == "configmap/a\n"


def test_a_call_is_made_before_the_client_gets_its_answer(cluster: ControlPlane, proxy: Proxy, namespace: str) -> None:
    made: list[str] = []
    proxy.after("POST .*/configmaps$", lambda: made.append("called"))
    assert create(cluster, proxy, namespace, "a")[0] == 0
    assert made == ["called"]


def test_a_request_that_hangs_is_given_up_by_the_client(cluster: ControlPlane, proxy: Proxy, namespace: str) -> None:
    proxy.hang("POST", "/configmaps$")
    done = cluster.run_kubectl(
        *("create", "configmap", "a", "-n", namespace, "--request-timeout=1s"), kubeconfig=proxy.kubeconfig
    )
    assert done.returncode == 1
    assert create(cluster, proxy, namespace, "a")[0] == 0
