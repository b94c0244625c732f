"""Kubernetes objects become facts: quantities, pods, nodes, owners; and the caches tell who is touched by a change."""

from __future__ import annotations

from typing import Any

import pytest

from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.protocol import Key
from moe_operator.observe import node_fact, pod_record

Object = dict[str, Any]
JOB = Key("MoEJob", "default", "tiny")
OTHER = Key("MoEJob", "default", "other")


def job(name: str = "tiny", *, version: int = 1, uid: str = "", status: Object | None = None) -> Object:
    metadata = {
        "name": name,
        "namespace": "default",
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "generation": 1,
    }
    return {"kind": "MoEJob", "metadata": metadata, "spec": {}, "status": status or {}}


def pod(name: str, *, owner: str = "", version: int = 1, uid: str = "", **spec: Any) -> Object:
    metadata: Object = {
        "name": name,
        "namespace": "default",
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
    }
    if owner:
        reference = {"apiVersion": "moerator.dev/v1alpha1", "kind": "MoEJob", "name": owner, "uid": f"uid-{owner}"}
        metadata["ownerReferences"] = [{**reference, "controller": True}]
        metadata["labels"] = {"moerator.dev/role": "rank", "moerator.dev/rank": "3", "moerator.dev/incarnation": "2"}
    containers = [{"name": "main", "resources": {"requests": {"cpu": "500m"}}}]
    return {
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": containers, **spec},
        "status": {"phase": "Pending"},
    }


def node(name: str, *, version: int = 1, ready: str = "True", heartbeat: str = "", hostname: str = "") -> Object:
    labels = {"kubernetes.io/hostname": hostname} if hostname else {}
    condition = {
        "type": "Ready",
        "status": ready,
        "lastHeartbeatTime": heartbeat,
        "lastTransitionTime": "1970-01-01T00:01:00Z",
    }
    return {
        "kind": "Node",
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version), "labels": labels},
        "status": {"allocatable": {"cpu": "4", "memory": "8Gi"}, "conditions": [condition]},
    }


@pytest.fixture
def marked() -> list[Key]:
    return []


@pytest.fixture
def cache(marked: list[Key]) -> Cache:
    return Cache(marked.append)


def test_a_node_offers_rounded_down_what_a_pod_asks_for_rounded_up() -> None:
    offering = {**node("a"), "status": {"allocatable": {"cpu": "1900u", "memory": "1500m"}}}
    assert node_fact(offering).allocatable == {"cpu": 1, "memory": 1}


def test_a_node_that_is_not_ready_says_since_when() -> None:
    assert node_fact(node("n", ready="True")).not_ready_since is None
    unknown = node_fact(node("n", ready="Unknown"))
    assert (unknown.ready, unknown.not_ready_since) == (False, 60)


def test_a_node_that_is_being_deleted_is_not_ready() -> None:
    going = node("n")
    going["metadata"]["deletionTimestamp"] = "1970-01-01T00:02:00Z"
    assert (node_fact(going).ready, node_fact(going).not_ready_since) == (False, 120)


def test_a_pods_requests_count_as_the_scheduler_counts_them() -> None:
    def asks(cpu: str, **more: Any) -> Object:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {
        "containers": [asks("1"), {"resources": {"limits": {"cpu": "1", "nvidia.com/gpu": "2"}}}],
        "initContainers": [asks("500m", restartPolicy="Always"), asks("4")],
        "overhead": {"cpu": "100m"},
    }
    record = pod_record(pod("p") | {"spec": spec})
    assert record.requests == {"cpu": 4600, "nvidia.com/gpu": 2, "pods": 1}


def test_a_finished_pod_takes_nothing() -> None:
    done = pod("p")
    done["status"] = {"phase": "Succeeded"}
    assert pod_record(done).requests == {}


def test_a_pod_of_ours_carries_its_rank_and_why_it_is_in_trouble() -> None:
    obj = pod("tiny-job-rank-3-2", owner="tiny", schedulingGates=[{"name": "moerator.dev/gang"}])
    state = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    obj["status"] = {"phase": "Failed", "containerStatuses": [{"state": state}]}
    fact = pod_record(obj).fact
    assert (fact.role, fact.index, fact.incarnation, fact.gated) == ("rank", 3, 2, True)
    assert fact.message == "OOMKilled (exit code 137)"


def test_a_container_that_is_started_again_and_again_tells_the_last_line_of_its_last_end() -> None:
    obj = pod("tiny-job-gateway-0-1", owner="tiny")
    ended = {"reason": "Error", "exitCode": 1, "message": "loading\nmoe-pod: no tokenizer.json\n"}
    waits = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting"}
    container = {"ready": False, "state": {"waiting": waits}, "lastState": {"terminated": ended}}
    obj["status"] = {"phase": "Running", "containerStatuses": [container]}
    assert pod_record(obj).fact.message == "Error (exit code 1): moe-pod: no tokenizer.json"


def test_an_owner_reference_that_does_not_control_makes_no_owner() -> None:
    obj = pod("p", owner="tiny")
    del obj["metadata"]["ownerReferences"][0]["controller"]
    assert pod_record(obj).owner is None


# caches


def test_a_heartbeat_marks_nobody(cache: Cache, marked: list[Key]) -> None:
    cache.put("moejobs", job())
    cache.put("nodes", node("n", heartbeat="1"))
    marked.clear()
    cache.put("nodes", node("n", heartbeat="2", version=2))
    assert marked == []
    cache.put("nodes", node("n", ready="False", version=3))
    assert marked == [JOB]


def test_an_older_state_never_replaces_a_newer_one(cache: Cache) -> None:
    cache.put("moejobs", job(version=7, status={"epoch": 2}))
    cache.put("moejobs", job(version=6, status={"epoch": 1}))
    seen = cache.wish(JOB)
    assert seen is not None and seen.status == {"epoch": 2}


def test_a_deleted_object_does_not_come_back_by_a_late_answer(cache: Cache) -> None:
    cache.put("pods", pod("tiny-job-rank-3-2", owner="tiny"))
    cache.drop("uid-tiny-job-rank-3-2")
    cache.put("pods", pod("tiny-job-rank-3-2", owner="tiny", version=9))
    assert cache.pods("uid-tiny") == ()


def test_a_successor_of_the_same_name_survives_the_end_of_the_first(cache: Cache) -> None:
    cache.put("moejobs", job(uid="first"))
    cache.put("moejobs", job(uid="second", version=5))
    cache.drop("first")
    seen = cache.wish(JOB)
    assert seen is not None and seen.uid == "second"


def test_use_of_a_node_leaves_out_the_owners_own_pods(cache: Cache) -> None:
    cache.put("nodes", node("n", hostname="n"))
    cache.put("pods", pod("stranger", nodeName="n"))
    cache.put("pods", pod("tiny-job-rank-3-2", owner="tiny", nodeName="n"))
    assert cache.nodes("uid-tiny")[0].used == {"cpu": 500, "pods": 1}
    assert cache.nodes("uid-other")[0].used == {"cpu": 1000, "pods": 2}
    cache.drop("uid-stranger")
    assert cache.nodes("uid-other")[0].used == {"cpu": 500, "pods": 1}


def test_a_pod_that_is_bound_but_not_scheduled_takes_its_place_already(cache: Cache) -> None:
    cache.put("nodes", node("ip-10", hostname="worker-7"))
    waiting = pod("tiny-job-rank-3-2", owner="tiny", nodeSelector={"kubernetes.io/hostname": "worker-7"})
    cache.put("pods", waiting)
    assert cache.pods("uid-tiny")[0].node == "ip-10"
    assert cache.nodes("uid-other")[0].used == {"cpu": 500, "pods": 1}
    assert cache.hostname("ip-10") == "worker-7"


def test_a_gated_pod_takes_no_place(cache: Cache) -> None:
    cache.put("nodes", node("n", hostname="n"))
    selector, gates = {"kubernetes.io/hostname": "n"}, [{"name": "moerator.dev/gang"}]
    cache.put("pods", pod("tiny-job-rank-3-2", owner="tiny", nodeSelector=selector, schedulingGates=gates))
    assert cache.nodes("uid-other")[0].used == {}


def test_a_pod_with_a_childs_name_that_is_not_a_child_is_foreign(cache: Cache, marked: list[Key]) -> None:
    cache.put("moejobs", job())
    marked.clear()
    cache.put("pods", pod("tiny-job-rank-0-1"))
    assert marked == [JOB]
    wish = cache.wish(JOB)
    assert wish is not None
    assert cache.foreign_pods(wish) == ("Pod/tiny-job-rank-0-1",)
    cache.drop("uid-tiny-job-rank-0-1")
    assert cache.foreign_pods(wish) == ()


def test_room_that_comes_or_goes_is_news_only_for_those_that_wait_for_it(cache: Cache, marked: list[Key]) -> None:
    no_fit = {"conditions": [{"type": "Placed", "status": "False", "reason": "NoFit"}]}
    cache.put("moejobs", job("tiny", status=no_fit))
    cache.put("moejobs", job("other"))
    cache.put("pods", pod("stranger", nodeName="n"))
    marked.clear()
    cache.drop("uid-stranger")
    assert marked == [JOB]


def test_a_drill_and_its_target_hear_of_each_other(cache: Cache, marked: list[Key]) -> None:
    drill = job("ouch", uid="uid-drill") | {
        "kind": "MoEDrill",
        "spec": {"target": {"kind": "MoEJob", "name": "tiny", "rank": 1}},
    }
    cache.put("moedrills", drill)
    assert set(marked) == {Key("MoEDrill", "default", "ouch"), JOB}
    marked.clear()
    cache.put("pods", pod("tiny-job-rank-3-2", owner="tiny"))
    assert set(marked) == {Key("MoEDrill", "default", "ouch"), JOB}
    assert [wish.name for wish in cache.drills_at(JOB)] == ["ouch"]


def test_children_that_change_hands_leave_their_first_owner(cache: Cache) -> None:
    child = pod("tiny-job-map", owner="tiny") | {"kind": "ExpertMap"}
    cache.put("expertmaps", child)
    assert [fact.name for fact in cache.objects("uid-tiny")] == ["tiny-job-map"]
    cache.put("expertmaps", pod("tiny-job-map", version=2) | {"kind": "ExpertMap"})
    assert cache.objects("uid-tiny") == ()
