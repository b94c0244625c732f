"""Gang fit on small drawn clusters."""

import re

import pytest

from moe_core.facts import NodeFact, Taint
from moe_core.outcome import InvalidInput, NoFit
from moe_core.topology.fit import Fit, fit
from moe_core.topology.quantity import base_units, listed, request_of
from moe_core.topology.room import Needs, Tolerated
from moe_core.topology.shape import Pack

LEVELS = (("block", "net/block"), ("rack", "net/rack"))
GPU = Needs(request={"gpu": 1})
ONE_RACK = Pack(levels=LEVELS, required="rack")


def node(name: str, block: str = "b1", rack: str = "r1", gpu: int = 4, **more: object) -> NodeFact:
    labels = {"net/block": block, "net/rack": rack, "kubernetes.io/hostname": name}
    return NodeFact(name=name, labels=labels, allocatable={"gpu": gpu, "pods": 110}, **more)  # type: ignore[arg-type]


#   b1 ── r1: n1(4) n2(4)      b2 ── r1: n4(4)
#      └─ r2: n3(4)               └─ r7: n5(4) n6(4) n7(4)
CLUSTER = (
    node("n1"),
    node("n2"),
    node("n3", rack="r2"),
    node("n4", block="b2", rack="r1"),
    node("n5", block="b2", rack="r7"),
    node("n6", block="b2", rack="r7"),
    node("n7", block="b2", rack="r7"),
)


def nodes_of(found: Fit | NoFit) -> list[str]:
    assert isinstance(found, Fit), found
    return [found.node_of_rank[rank] for rank in sorted(found.node_of_rank)]


def test_a_gang_goes_to_the_tightest_rack_that_holds_all_of_it() -> None:
    assert nodes_of(fit(CLUSTER, range(8), needs=GPU, pack=ONE_RACK)) == ["n1"] * 4 + ["n2"] * 4
    assert nodes_of(fit(CLUSTER, range(4), needs=GPU, pack=ONE_RACK)) == ["n3"] * 4


def test_racks_that_share_a_name_in_two_blocks_are_two_racks() -> None:
    small = (node("n1"), node("n4", block="b2"))
    found = fit(small, range(8), needs=GPU, pack=ONE_RACK)
    assert isinstance(found, NoFit)
    assert found.best == 4


def test_a_gang_that_does_not_fit_says_what_is_in_the_way_and_what_would_help() -> None:
    cluster = (
        node("n1", taints=(Taint("gpu", "reserved"),)),
        node("n2", used={"gpu": 3}),
        node("n3", unschedulable=True),
        node("n4", ready=False),
    )
    found = fit(cluster, range(12), needs=GPU, pack=ONE_RACK)
    assert isinstance(found, NoFit)
    assert str(found) == (
        "needs room for 12 ranks in one rack; best is rack b1/r1 with 1; excluded: cordoned 4, in use 3, not ready 4, "
        "taint gpu=reserved 4; add nodes with room for 11 more (each asks for gpu 1)"
    )


def test_the_lever_is_the_cheapest_change_that_helps() -> None:
    tainted = (node("n1"), node("n2", taints=(Taint("gpu", "reserved"),)))
    found = fit(tainted, range(8), needs=GPU)
    assert isinstance(found, NoFit)
    assert found.lever == "tolerate taint gpu=reserved in template.spec.tolerations"
    both = fit((*tainted, node("n3", unschedulable=True)), range(8), needs=GPU)
    assert isinstance(both, NoFit)
    assert both.lever == "uncordon node n3"
    small = fit((node("n1"), node("n2", gpu=0), node("n3", gpu=0)), range(8), needs=GPU)
    assert isinstance(small, NoFit)
    assert small.excluded == {"nodes with too little gpu": 2}
    split = fit((node("n1"), node("n2", rack="r2")), range(8), needs=GPU, pack=ONE_RACK)
    assert isinstance(split, NoFit)
    assert "pack.preferred" in split.lever


def test_preferred_takes_one_rack_else_one_block_else_the_cluster() -> None:
    preferred = Pack(levels=LEVELS, preferred="rack")
    assert set(nodes_of(fit(CLUSTER, range(12), needs=GPU, pack=preferred))) == {"n5", "n6", "n7"}
    assert set(nodes_of(fit(CLUSTER, range(16), needs=GPU, pack=preferred))) == {"n4", "n5", "n6", "n7"}
    assert len(set(nodes_of(fit(CLUSTER, range(28), needs=GPU, pack=preferred)))) == 7


def test_ranks_are_spread_evenly_over_nodes_and_numbered_along_the_tree() -> None:
    assert nodes_of(fit(CLUSTER, range(6), needs=GPU, pack=ONE_RACK)) == ["n1"] * 3 + ["n2"] * 3


def test_without_levels_ranks_spread_over_all_nodes() -> None:
    assert nodes_of(fit(CLUSTER, range(7), needs=GPU)) == [f"n{i}" for i in range(1, 8)]


def test_a_replacement_stays_in_the_required_domain_of_those_that_stay() -> None:
    kept = {0: "n1", 1: "n2", 2: "n2"}
    own = {"n1": {"gpu": 4}, "n2": {"gpu": 3}}
    assert nodes_of(fit(CLUSTER, [3], needs=GPU, pack=ONE_RACK, kept=kept, own=own)) == ["n2"]
    full = fit(CLUSTER, [3, 4], needs=GPU, pack=ONE_RACK, kept=kept, own=own)
    assert isinstance(full, NoFit)
    assert full.best == 1


def test_a_replacement_prefers_the_domain_of_those_that_stay() -> None:
    preferred = Pack(levels=LEVELS, preferred="rack")
    kept = {0: "n5", 1: "n5", 2: "n6"}
    own = {"n5": {"gpu": 4}, "n6": {"gpu": 4}, "n7": {"gpu": 3}}
    assert nodes_of(fit(CLUSTER, [3], needs=GPU, pack=preferred, kept=kept, own=own)) == ["n7"]
    own["n7"] = {"gpu": 4}
    assert nodes_of(fit(CLUSTER, [3], needs=GPU, pack=preferred, kept=kept, own=own)) == ["n4"]  # the same block


def test_tolerations_work_as_kubernetes_defines_them() -> None:
    taint = Taint("gpu", "reserved", "NoExecute")
    assert Tolerated(key="gpu", operator="Exists").covers(taint)
    assert Tolerated(operator="Exists").covers(taint)
    assert Tolerated(key="gpu", value="reserved", effect="NoExecute").covers(taint)
    assert not Tolerated(key="gpu", value="other").covers(taint)
    assert not Tolerated(key="gpu", operator="Exists", effect="NoSchedule").covers(taint)
    assert not Tolerated().covers(taint)


def test_a_taint_that_only_prefers_keeps_nobody_away() -> None:
    soft = (node("n1", taints=(Taint("x", "", "PreferNoSchedule"),)),)
    assert nodes_of(fit(soft, range(4), needs=GPU)) == ["n1"] * 4


def test_a_node_without_the_needed_label_is_counted_not_guessed() -> None:
    found = fit((NodeFact(name="bare", allocatable={"gpu": 8}),), range(8), needs=GPU, pack=ONE_RACK)
    assert isinstance(found, NoFit)
    assert found.excluded == {"nodes without label net/block": 1}


def test_a_label_narrower_than_the_named_levels_is_not_needed() -> None:
    bare = NodeFact(name="n1", labels={"net/block": "b1"}, allocatable={"gpu": 4})
    assert nodes_of(fit((bare,), range(4), needs=GPU, pack=Pack(levels=LEVELS, required="block"))) == ["n1"] * 4


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="level 'row' is not in the topology; its levels are block, rack"):
        fit(CLUSTER, range(1), needs=GPU, pack=Pack(levels=LEVELS, required="row"))


def test_a_node_selector_and_too_few_pods_exclude() -> None:
    chosen = Needs(request={"gpu": 1}, node_selector={"kubernetes.io/hostname": "n7"})
    assert nodes_of(fit(CLUSTER, range(4), needs=chosen)) == ["n7"] * 4
    crowded = NodeFact(name="n1", allocatable={"gpu": 8, "pods": 5}, used={"pods": 3})
    found = fit((crowded,), range(4), needs=GPU)
    assert isinstance(found, NoFit)
    assert (found.best, found.excluded) == (2, {"in use": 2})


def test_no_nodes_at_all_is_said() -> None:
    found = fit((), range(2), needs=GPU)
    assert (
        str(found)
        == "needs room for 2 ranks in the cluster; best is 0; add nodes with room for 2 more (each asks for gpu 1)"
    )


@pytest.mark.parametrize(
    ("resource", "text", "units"),
    [
        ("cpu", "2", 2000),
        ("cpu", "0.0001", 1),
        ("cpu", "100m", 100),
        ("cpu", "1n", 1),
        ("memory", "1.5Gi", 1610612736),
        ("memory", "1k", 1000),
        ("memory", "1Ki", 1024),
        ("memory", "128974848", 128974848),
        ("memory", "129e6", 129000000),
        ("memory", "2E-1", 1),
        ("memory", "3Ei", 3 * 2**60),
        ("memory", "3E", 3 * 10**18),
        ("memory", ".5M", 500000),
        ("memory", "400m", 1),
        ("gpu", "8", 8),
        ("gpu", 8, 8),
    ],
)
def test_quantities_are_read_in_base_units(resource: str, text: object, units: int) -> None:
    assert base_units(resource, text) == units


def test_a_request_is_listed_in_the_units_that_people_write() -> None:
    request = {"nvidia.com/gpu": 1024, "memory": 768 << 20, "cpu": 100, "ephemeral-storage": 1000}
    assert listed(request) == "cpu 100m, ephemeral-storage 1000, memory 768Mi, nvidia.com/gpu 1024"
    assert listed({"cpu": 2000, "memory": 3 << 30}) == "cpu 2, memory 3Gi"


def test_a_bad_quantity_is_refused_by_name() -> None:
    for text in ("1Q", "", "1 Gi", "Gi", "1GiB", "..", ".", "0x10", "1e999999999", "1\n"):
        with pytest.raises(InvalidInput, match=f"memory must be a Kubernetes quantity, got {re.escape(repr(text))}"):
            base_units("memory", text)


def test_a_limit_counts_where_no_request_is_given() -> None:
    assert request_of({"cpu": "1"}, {"cpu": "4", "gpu": "1", "x": "0"}) == {"cpu": 1000, "gpu": 1}
