"""`moerator explain`: what it says of a resource that fits, of one that does not, and of one that is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moe_operator.cli import app

TOPOLOGY = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "ClusterTopology",
    "metadata": {"name": "net"},
    "spec": {"levels": [{"name": "block", "nodeLabel": "net/block"}, {"name": "rack", "nodeLabel": "net/rack"}]},
}
GPU = "nvidia.com/gpu"


def service(ranks: int, *, pack: dict[str, Any] | None = None, spares: int = 0) -> dict[str, Any]:
    return {
        "apiVersion": "moerator.dev/v1alpha1",
        "kind": "MoEService",
        "metadata": {"name": "big"},
        "spec": {
            "model": {"path": "/models/big", "numExperts": 64, "numMoeLayers": 4},
            "parallelism": {"expert": ranks},
            "spares": {"perDomain": spares},
            "topologyConstraint": {"topologyName": "net", "pack": pack or {"required": "rack"}},
            "template": {"spec": {"resources": {"limits": {GPU: 1}}}},
        },
    }


def node(name: str, rack: str, gpus: int = 4, **spec: Any) -> dict[str, Any]:
    """`rack` as block/rack; without a rack the label is missing."""
    ready = spec.pop("ready", True)
    block, _, of_block = rack.partition("/")
    labels = {"net/block": block} | ({"net/rack": of_block} if of_block else {})
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
        "status": {
            "allocatable": {"cpu": "64", "memory": "64Gi", "pods": "110", GPU: str(gpus)},
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def pod(name: str, on: str, gpus: int, owner: str = "") -> dict[str, Any]:
    reference = {"apiVersion": "moerator.dev/v1alpha1", "kind": "MoEService", "uid": "u", "controller": True}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "ownerReferences": [reference | {"name": owner}] if owner else [],
        },
        "spec": {"nodeName": on, "containers": [{"name": "main", "resources": {"limits": {GPU: str(gpus)}}}]},
        "status": {"phase": "Running"},
    }


#   b1 ── r1: a(4) b(4)     b2 ── r1: e(4, reserved) f(4, cordoned)     one node of b2 has no rack
#      └─ r2: c(4) d(4, not ready)
NODES = (
    *(node("a", "b1/r1"), node("b", "b1/r1"), node("c", "b1/r2"), node("d", "b1/r2", ready=False)),
    node("e", "b2/r1", taints=[{"key": "gpu", "value": "reserved", "effect": "NoSchedule"}]),
    *(node("f", "b2/r1", unschedulable=True), node("g", "b2")),
)


def explain(folder: Path, resource: dict[str, Any], objects: Any, *more: str) -> tuple[int, str]:
    resources, nodes = folder / "resources.yaml", folder / "nodes.yaml"
    resources.write_text(yaml.safe_dump_all([TOPOLOGY, resource]))
    nodes.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
    result = CliRunner().invoke(app, ["explain", "-f", str(resources), "--nodes", str(nodes), *more])
    return result.exit_code, result.output


def explained(folder: Path, resource: dict[str, Any], objects: Any, *more: str) -> tuple[int, Any]:
    code, text = explain(folder, resource, objects, "--json", *more)
    (answer,) = json.loads(text)
    return code, answer


def test_what_does_not_fit_is_told_by_domain_with_what_takes_the_rest_and_what_would_help(tmp_path: Path) -> None:
    code, text = explain(tmp_path, service(10, spares=1), [*NODES, pod("x", "a", 3)])
    assert code == 1
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "MoEService/big does not fit: it needs room for 10 ranks in one rack with 1 spare",
        "per rack, and rack b1/r1 has room for 4.",
        "rack nodes room wanted what takes the rest",
        "b1/r1 2 4 10 for spares 1, in use 3",
        "b1/r2 2 3 10 for spares 1, not ready 4",
        "b2/r1 2 0 10 cordoned 4, taint gpu=reserved 4",
        "Outside the topology: 1 node without the label net/rack.",
        "What would help, each tried alone with the same placement, the cheapest first:",
        "1. add nodes with room for 6 more (each asks for nvidia.com/gpu 1)",
        "2. ask for 4 ranks instead of 10",
        "",
    ]


def test_what_is_in_the_way_beside_ranks_that_fit_is_told_instead_of_their_room(tmp_path: Path) -> None:
    nodes = [node(name, "b1/r1") for name in "ab"]
    for one in nodes:
        one["status"]["allocatable"]["pods"] = "4"
    code, text = explain(tmp_path, service(8), nodes)
    assert code == 1
    assert " ".join(text.split()).startswith(
        "MoEService/big does not fit: its 8 ranks have room in one rack, but beside them 3 pods of coordinator and "
        "gateways need cpu 100m, memory 768Mi each, and there is room for 0. The file holds no pods"
    )


def test_the_same_as_json_names_every_domain_and_every_change_that_helps(tmp_path: Path) -> None:
    code, answer = explained(tmp_path, service(8), NODES[2:6])
    assert (code, answer["accepted"], answer["fits"], answer["ranks"]) == (1, True, False, 8)
    assert [(one["path"], one["room"], one["excluded"]) for one in answer["domains"]] == [
        (["b1", "r2"], 4, {"not ready": 4}),
        (["b2", "r1"], 0, {"cordoned": 4, "taint gpu=reserved": 4}),
    ]
    assert answer["relaxations"][0] == {
        "kind": "not ready",
        "amount": 1,
        "text": "bring back node d, not ready now",
    }


def test_what_fits_says_where_what_a_loss_would_do_and_how_many_more_there_is_room_for(tmp_path: Path) -> None:
    code, text = explain(tmp_path, service(3, spares=1), NODES[:4])
    assert code == 0
    assert [" ".join(line.split()) for line in text.splitlines()[:4]] == [
        "MoEService/big fits: 3 ranks on 1 node of 1 rack.",
        "rack ranks nodes room left a lost rank goes a lost node's ranks go",
        "b1/r2 3 1 1 to the same rack to b1/r1",
        "2 more such gangs would fit beside it.",
    ]


def test_a_node_whose_ranks_nothing_else_holds_is_told_before_it_is_lost(tmp_path: Path) -> None:
    answer = explained(tmp_path, service(6), NODES[:2])[1]
    assert [(one["rankLostGoesTo"], one["nodeLostGoesTo"]) for one in answer["homes"]] == [([["b1", "r1"]], None)]


def test_a_gang_over_several_domains_tells_where_lost_ranks_would_go_from_each(tmp_path: Path) -> None:
    pack = {"required": "block", "preferred": "rack"}
    code, answer = explained(tmp_path, service(10, pack=pack), NODES[:3])
    assert code == 0
    homes = [(one["path"], one["ranks"], one["roomLeft"], one["rankLostGoesTo"]) for one in answer["homes"]]
    assert homes == [(["b1", "r1"], 6, 2, [["b1", "r1"]]), (["b1", "r2"], 4, 0, [["b1", "r1"]])]
    assert answer["moreGangs"] == 0


def test_the_resource_is_not_in_its_own_way(tmp_path: Path) -> None:
    others, own = [pod("x", "a", 4)], [pod("x", "a", 4, owner="big")]
    assert explained(tmp_path, service(8), [*NODES[:2], *others])[0] == 1
    assert explained(tmp_path, service(8), [*NODES[:2], *own])[0] == 0


def test_a_file_without_pods_is_told_from_a_cluster_without_use(tmp_path: Path) -> None:
    words = "The file holds no pods, so nothing counts as in use"
    assert words in explain(tmp_path, service(2), NODES)[1]
    assert words not in explain(tmp_path, service(2), [*NODES, pod("x", "a", 1)])[1]


def test_ranks_per_node_and_room_for_the_coordinator_count_as_when_the_operator_places(tmp_path: Path) -> None:
    odd = [node("a", "b1/r1", 3), node("b", "b1/r1", 3)]
    code, answer = explained(tmp_path, service(4, pack={"ranksPerNode": 4}), odd)
    assert (code, answer["domains"][0]["excluded"]) == (1, {"fewer than 4 free on a node": 6})
    for one in odd:
        one["status"]["allocatable"]["pods"] = "2"
    code, answer = explained(tmp_path, service(4), odd)
    assert code == 1
    assert "3 pods of coordinator and gateways" in answer["message"]


def test_a_place_on_a_node_that_is_full_for_this_gang_is_no_room_left(tmp_path: Path) -> None:
    pack = {"required": "rack", "ranksPerNode": 2}
    answer = explained(tmp_path, service(4, pack=pack), [node(name, "b1/r1", 3) for name in "abc"])[1]
    assert [one["roomLeft"] for one in answer["homes"]] == [2]


def test_other_numbers_of_ranks_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    code, text = explain(tmp_path, service(4), NODES[:4], "--ranks", "4..16", "--json")
    assert code == 1
    assert [(one["ranks"], one["fits"]) for one in json.loads(text)] == [(4, True), (8, True), (16, False)]


def test_a_resource_that_is_refused_says_why_and_what_there_is(tmp_path: Path) -> None:
    code, text = explain(tmp_path, service(4, pack={"required": "row"}), NODES)
    assert code == 1
    assert "MoEService/big is refused, TopologyNotFound:" in text
    assert "level 'row' is not in the topology; its levels are block, rack" in " ".join(text.split())
    answer = explained(tmp_path, service(4, pack={"required": "row"}), NODES)[1]
    assert (answer["accepted"], answer["fits"], answer["reason"]) == (False, False, "TopologyNotFound")


def test_json_of_kubectl_is_read_as_its_yaml_is_and_from_standard_input_too(tmp_path: Path) -> None:
    resources = tmp_path / "resources.yaml"
    resources.write_text(yaml.safe_dump_all([TOPOLOGY, service(4)]))
    items = {"apiVersion": "v1", "kind": "List", "items": [*NODES, pod("x", "a", 1)]}
    answers = [
        CliRunner().invoke(app, ["explain", "-f", str(resources), "--nodes", "-"], input=text).output
        for text in (json.dumps(items), yaml.safe_dump(items))
    ]
    assert "fits: 4 ranks" in answers[0]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", "is not what `kubectl get nodes -o yaml` prints"),
        ("kind: Node\nmetadata: 5", "is not what `kubectl get nodes -o yaml` prints"),
        ("kind: ConfigMap\nmetadata: {name: a}", "must hold nodes and pods, got ConfigMap"),
        ("kind: List\nitems: []", "must hold nodes, got none"),
        (
            "kind: Node\nmetadata: {name: a}\nstatus: {allocatable: {cpu: many}}",
            "object 1: cpu must be a Kubernetes quantity",
        ),
    ],
)
def test_a_file_of_nodes_that_is_none_is_named(tmp_path: Path, text: str, words: str) -> None:
    resources, nodes = tmp_path / "resources.yaml", tmp_path / "nodes.yaml"
    resources.write_text(yaml.safe_dump_all([TOPOLOGY, service(4)]))
    nodes.write_text(text)
    result = CliRunner().invoke(app, ["explain", "-f", str(resources), "--nodes", str(nodes)])
    assert result.exit_code == 2
    assert words in result.output
    assert "nodes.yaml" in result.output


def test_what_a_running_gang_has_measured_is_told_where_it_would_fit(tmp_path: Path) -> None:
    status = {"pace": {"nanosecondsPerPick": 500, "ranksPercent": {"1": 25}}}
    code, text = explain(tmp_path, {**service(3), "status": status}, NODES[:4])
    told = "Measured while it ran: 500 ns for a token at an expert; rank 1 is 0.25 times as fast as most."
    assert (code, told in " ".join(text.split())) == (0, True)
    assert explained(tmp_path, {**service(3), "status": status}, NODES[:4])[1]["measured"] == status


def test_a_number_of_ranks_that_ep_groups_cannot_share_is_refused(tmp_path: Path) -> None:
    resource = service(2)
    resource["spec"]["parallelism"] = {"expert": 1, "data": 2}
    code, text = explain(tmp_path, resource, NODES[:4], "--ranks", "3")
    assert (code, text) == (2, "--ranks: 3 ranks are not 2 EP groups of equally many\n")
