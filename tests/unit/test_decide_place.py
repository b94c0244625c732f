"""Where a gang goes: ranks per node, spares, and both again when ranks are lost, join, or wait for room."""

from collections import Counter
from dataclasses import replace
from typing import Any

from moe_core.contract.names import ROLE_RANK
from moe_core.facts import NodeFact
from simcluster import Sim, edit, gpu_template, make, service_spec

TOPOLOGY = {"net": (("rack", "net/rack"),)}
IN_RACKS = {"topologyName": "net", "pack": {"preferred": "rack"}}


def node(name: str, gpus: int, **more: Any) -> NodeFact:
    """Its rack is the first letter of its name."""
    allocatable = {"nvidia.com/gpu": gpus, "pods": 110, "cpu": 8000, "memory": 2**35}
    return NodeFact(name=name, labels={"net/rack": name[0]}, allocatable=allocatable, **more)


def service(ranks: int, *nodes: NodeFact, **more: Any) -> Sim:
    spec = service_spec(ranks, template=gpu_template(), **more)
    return make("MoEService", spec, nodes, topologies=TOPOLOGY)


def settled(ranks: int, *nodes: NodeFact, **more: Any) -> Sim:
    sim = service(ranks, *nodes, **more)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive"), sim.message("Placed")
    return sim


def where(sim: Sim) -> dict[str, int]:
    """Ranks per node."""
    return dict(sorted(Counter(pod.node for pod in sim.ranks() if pod.node).items()))


def take(sim: Sim, name: str, gpus: int) -> None:
    """Others come to this node."""
    sim.nodes = tuple(replace(n, used={"nvidia.com/gpu": gpus}) if n.name == name else n for n in sim.nodes)


def two_per_node(**pack: str) -> dict[str, Any]:
    return {"topologyConstraint": {"topologyName": "net", "pack": {**pack, "ranksPerNode": 2}}}


def test_every_node_of_a_new_gang_has_exactly_the_ranks_it_asks_for() -> None:
    sim = settled(4, node("a1", 3), node("a2", 1), node("b1", 4), node("b2", 1), **two_per_node())
    assert where(sim) == {"a1": 2, "b1": 2}


def test_a_gang_waits_for_nodes_that_hold_so_many_ranks_and_says_so() -> None:
    sim = service(4, node("a1", 3), *(node(f"b{i}", 1) for i in range(8)), **two_per_node())
    sim.settle()
    assert where(sim) == {}
    assert sim.message("Placed") == (
        "needs room for 4 ranks in the cluster 2 per node; best is 2; excluded: fewer than 2 free on a node 9; "
        "drop pack.ranksPerNode 2: nodes may then hold any number of ranks"
    )


def test_a_lost_rank_returns_to_the_node_that_has_too_few() -> None:
    sim = settled(4, node("a1", 8), node("b1", 8), **two_per_node())
    sim.kill(1)
    sim.settle()
    assert where(sim) == {"a1": 2, "b1": 2}


def test_where_no_node_holds_so_many_a_lost_rank_may_be_alone_rather_than_away() -> None:
    sim = settled(4, node("a1", 2), node("b1", 2), node("c1", 1), node("d1", 1), **two_per_node())
    sim.nodes = tuple(n for n in sim.nodes if n.name != "b1")
    sim.settle()
    assert where(sim) == {"a1": 2, "c1": 1, "d1": 1}
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_gang_whose_nodes_lost_their_labels_is_replaced_all_the_same() -> None:
    sim = settled(4, node("a1", 2), node("b1", 2), node("c1", 1), **two_per_node(preferred="rack"))
    sim.nodes = tuple(replace(n, labels={}) if n.name in ("a1", "b1") else n for n in sim.nodes)
    sim.kill(1)
    sim.settle()
    assert where(sim) == {"a1": 1, "b1": 2, "c1": 1}


def test_a_gang_leaves_its_spares_free_in_every_rack_that_it_takes() -> None:
    racks = (node("a1", 4), node("b1", 3), node("c1", 3))
    assert where(settled(4, *racks, topologyConstraint=IN_RACKS)) == {"a1": 4}
    spared = settled(4, *racks, topologyConstraint=IN_RACKS, spares={"perDomain": 1})
    assert where(spared) == {"a1": 2, "b1": 2}, "three places would do in a, and one in b"


def test_a_spare_of_whole_nodes_is_on_a_node_that_is_not_full_yet() -> None:
    nodes = (node("a1", 2), node("a2", 3), node("b1", 2), node("b2", 2), node("b3", 1))
    pack = {"required": "rack", "ranksPerNode": 2}
    sim = settled(4, *nodes, topologyConstraint={"topologyName": "net", "pack": pack}, spares={"perDomain": 1})
    assert where(sim) == {"b1": 2, "b2": 2}, "the third place of a2 is none for a rank"
    sim.kill(0)
    take(sim, "b1", 1)
    sim.settle()
    assert where(sim) == {"b1": 1, "b2": 2, "b3": 1}


def test_without_a_topology_the_spares_are_of_the_cluster() -> None:
    sim = service(4, node("a1", 2), node("b1", 3), spares={"perDomain": 2})
    sim.settle()
    assert sim.message("Placed") == (
        "needs room for 4 ranks in the cluster with 2 spares per cluster; best is 3; excluded: for spares 2; "
        "set spares.perDomain to 1 instead of 2"
    )


def test_an_edit_of_the_spares_lets_a_gang_that_waits_be_placed() -> None:
    sim = service(4, node("a1", 2), node("b1", 3), spares={"perDomain": 2})
    sim.settle()
    edit(sim, spares={"perDomain": 1})
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_lost_rank_takes_the_spare_in_the_rack_of_the_others() -> None:
    sim = settled(4, node("a1", 4), node("a2", 1), node("b1", 9), topologyConstraint=IN_RACKS, spares={"perDomain": 1})
    assert where(sim) == {"a1": 3, "a2": 1}
    sim.kill(0)
    take(sim, "a1", 1)
    sim.settle()
    assert where(sim)["a1"] == 3
    assert sim.condition("Ready") == ("True", "AllActive")


def test_ranks_that_join_leave_the_spares_free() -> None:
    sim = settled(2, node("a1", 4), topologyConstraint=IN_RACKS, spares={"perDomain": 1})
    edit(sim, parallelism={"expert": 4})
    sim.settle()
    assert sim.condition("Placed") == ("False", "NoFit")
    assert "with 1 spare per rack" in sim.message("Placed")
    sim.nodes = (*sim.nodes, node("b1", 3))
    sim.settle()
    assert where(sim) == {"a1": 3, "b1": 1}


def test_a_gang_that_was_half_started_is_completed_on_its_spares_when_no_other_room_is_left() -> None:
    sim = service(4, node("a1", 5), topologyConstraint=IN_RACKS, spares={"perDomain": 1})
    sim.step()
    sim.step(crash_after=2)
    assert len([pod for pod in sim.pods if pod.role == ROLE_RANK and pod.node]) == 2
    take(sim, "a1", 1)
    sim.settle()
    assert where(sim) == {"a1": 4}
    assert sim.condition("Ready") == ("True", "AllActive")
