"""Subgroups, spares, whole nodes, replacement and relaxations on small drawn clusters."""

from collections.abc import Mapping

import pytest

from moe_core.facts import NodeFact, Taint
from moe_core.outcome import InvalidInput, NoFit
from moe_core.topology.fit import Fit, fit, tree_of
from moe_core.topology.room import Needs
from moe_core.topology.score import score
from moe_core.topology.shape import Pack, Subgroups
from moe_core.topology.tree import build_tree

LEVELS = (("block", "net/block"), ("rack", "net/rack"))
GPU = Needs(request={"gpu": 1})
ANYWHERE = Pack(LEVELS)
EP4 = Subgroups(size=4, level="rack")


def node(name: str, rack: str, gpu: int = 4, **more: object) -> NodeFact:
    """`rack` as block.rack."""
    block, _, of_block = rack.partition(".")
    labels = {"net/block": block, "net/rack": of_block}
    return NodeFact(name=name, labels=labels, allocatable={"gpu": gpu}, **more)  # type: ignore[arg-type]


def racks_of(found: Fit | NoFit, nodes: tuple[NodeFact, ...]) -> list[str]:
    """Rack of each rank in rank order."""
    assert isinstance(found, Fit), str(found)
    rack = {n.name: f"{n.labels['net/block']}.{n.labels['net/rack']}" for n in nodes}
    return [rack[found.node_of_rank[rank]] for rank in sorted(found.node_of_rank)]


def own_of(kept: Mapping[int, str]) -> dict[str, dict[str, int]]:
    own: dict[str, dict[str, int]] = {}
    for name in kept.values():
        own[name] = {"gpu": own.get(name, {}).get("gpu", 0) + 1}
    return own


def refused(found: Fit | NoFit) -> NoFit:
    assert isinstance(found, NoFit), found
    return found


#   b1 ── r1: a(4) b(2)     b2 ── r1: e(4) f(4)
#      └─ r2: c(4) d(1)
CLUSTER = (
    *(node("a", "b1.r1"), node("b", "b1.r1", 2), node("c", "b1.r2"), node("d", "b1.r2", 1)),
    *(node("e", "b2.r1"), node("f", "b2.r1")),
)


def test_every_subgroup_lies_in_one_rack_and_two_may_share_one() -> None:
    found = fit(CLUSTER, range(8), needs=GPU, pack=ANYWHERE, subgroups=EP4)
    assert racks_of(found, CLUSTER) == ["b2.r1"] * 8
    found = fit(CLUSTER, range(16), needs=GPU, pack=ANYWHERE, subgroups=EP4)
    assert racks_of(found, CLUSTER) == ["b1.r1"] * 4 + ["b1.r2"] * 4 + ["b2.r1"] * 8


def test_subgroups_of_a_broad_level_take_the_fewest_domains_of_a_narrower_preferred_one() -> None:
    nodes = (node("a", "b1.r1", 3), node("b", "b1.r2", 1), node("c", "b2.r1", 6))
    pairs = Subgroups(2, "block")
    found = fit(nodes, range(4), needs=GPU, pack=Pack(LEVELS, preferred="rack"), subgroups=pairs)
    assert racks_of(found, nodes) == ["b2.r1"] * 4, "the tighter block would take two racks"


def test_subgroups_that_must_be_apart_share_no_rack() -> None:
    found = fit(CLUSTER, range(8), needs=GPU, pack=ANYWHERE, subgroups=Subgroups(4, "rack", apart=True))
    assert racks_of(found, CLUSTER) == ["b1.r1"] * 4 + ["b1.r2"] * 4


def test_subgroups_fit_all_or_none_and_the_message_names_them() -> None:
    found = refused(fit(CLUSTER, range(20), needs=GPU, pack=ANYWHERE, subgroups=EP4))
    assert str(found) == (
        "needs room for 20 ranks in the cluster in 5 subgroups of 4, each in one rack; best is 16; "
        "excluded: too few for a subgroup 3; ask for 16 ranks instead of 20"
    )


def test_a_lost_rank_returns_to_the_rack_of_its_subgroup_even_when_another_has_more_room() -> None:
    nodes = (node("a", "b1.r1"), node("b", "b1.r1", 1), node("c", "b1.r2", 8))
    kept = {0: "a", 1: "a", 3: "b", **dict.fromkeys(range(4, 8), "c")}
    own = own_of(kept)
    found = fit(nodes, [2], needs=GPU, pack=ANYWHERE, subgroups=EP4, kept=kept, own=own)
    assert racks_of(found, nodes) == ["b1.r1"]
    own["a"] = {"gpu": 4}
    full = refused(fit(nodes, [2], needs=GPU, pack=ANYWHERE, subgroups=EP4, kept=kept, own=own))
    assert str(full).startswith(
        "needs room for 1 rank in one rack beside the rest of their subgroup; best is rack b1/r1 with 0; "
        "let a subgroup spread over one block"
    )


def test_a_rank_whose_subgroup_is_on_nodes_that_are_gone_is_placed_with_the_lost_of_its_subgroup() -> None:
    kept = {**dict.fromkeys(range(4), "a"), 4: "gone", 5: "gone"}
    found = fit(CLUSTER, [6, 7], needs=GPU, pack=ANYWHERE, subgroups=EP4, kept=kept, own=own_of(kept))
    assert racks_of(found, CLUSTER) == ["b1.r1"] * 2, "one rack for both, the tightest that holds them"


def test_ranks_of_several_subgroups_lost_at_once_each_return_home() -> None:
    whole = fit(CLUSTER, range(16), needs=GPU, pack=ANYWHERE, subgroups=EP4)
    assert isinstance(whole, Fit)
    lost = [1, 2, 6, *range(8, 12), 15]
    kept = {rank: name for rank, name in whole.node_of_rank.items() if rank not in lost}
    again = fit(CLUSTER, lost, needs=GPU, pack=ANYWHERE, subgroups=EP4, kept=kept, own=own_of(kept))
    assert racks_of(again, CLUSTER) == ["b1.r1"] * 2 + ["b1.r2"] + ["b2.r1"] * 5


def test_spares_stay_free_in_every_rack_that_is_used_away_from_the_ranks() -> None:
    preferred = Pack(LEVELS, preferred="rack")
    found = fit(CLUSTER, range(6), needs=GPU, pack=preferred, spares_per_domain=2)
    assert racks_of(found, CLUSTER) == ["b2.r1"] * 6, "six of six in b1.r1 would leave no spare"
    assert isinstance(found, Fit)
    assert found.spare_nodes == ("e", "f")


def test_fewer_spares_are_the_cheapest_relaxation() -> None:
    one_rack = Pack(LEVELS, required="rack")
    found = refused(fit(CLUSTER, range(7), needs=GPU, pack=one_rack, spares_per_domain=3))
    assert str(found) == (
        "needs room for 7 ranks in one rack with 3 spares per rack; best is rack b2/r1 with 5; "
        "excluded: for spares 9; set spares.perDomain to 1 instead of 3"
    )
    assert [r.kind for r in found.relaxations] == ["spares", "required", "add nodes", "fewer ranks"]


def test_whole_nodes_are_filled_and_a_node_with_too_little_room_is_counted() -> None:
    found = fit(CLUSTER, range(8), needs=GPU, pack=Pack(LEVELS, preferred="rack"), ranks_per_node=4)
    assert isinstance(found, Fit)
    assert list(found.node_of_rank.values()) == ["e"] * 4 + ["f"] * 4
    full = refused(fit(CLUSTER, range(20), needs=GPU, pack=ANYWHERE, ranks_per_node=4))
    assert full.excluded == {"fewer than 4 free on a node": 3}
    assert full.best == 16


def test_a_replacement_tops_up_the_nodes_of_those_that_stay_before_it_opens_another() -> None:
    kept = {0: "e", 1: "e", 2: "e", 4: "f", 5: "f", 6: "f", 7: "f"}
    found = fit(CLUSTER, [3], needs=GPU, pack=ANYWHERE, ranks_per_node=4, kept=kept, own=own_of(kept))
    assert isinstance(found, Fit)
    assert found.node_of_rank == {3: "e"}


def test_beside_ranks_on_nodes_that_are_gone_a_replacement_may_be_alone_on_its_node() -> None:
    found = fit(CLUSTER, [3], needs=GPU, pack=ANYWHERE, ranks_per_node=4, kept=dict.fromkeys(range(3), "gone"))
    assert isinstance(found, Fit)
    assert len(found.node_of_rank) == 1


def test_lost_ranks_fill_the_racks_in_use_before_they_open_another() -> None:
    nodes = (node("a", "b1.r1", 8), node("b", "b1.r2", 8), node("c", "b1.r3", 16))
    kept = {**dict.fromkeys(range(1, 6), "a"), **dict.fromkeys(range(9, 14), "b")}
    found = fit(nodes, [0, 6, 8, 14], needs=GPU, pack=Pack(LEVELS, preferred="rack"), kept=kept, own=own_of(kept))
    assert racks_of(found, nodes) == ["b1.r1", "b1.r1", "b1.r2", "b1.r2"], "not the one empty rack that holds all four"


def test_a_lost_rank_goes_where_its_neighbours_by_number_are() -> None:
    nodes = (node("a", "b1.r1"), node("b", "b1.r2"))
    kept = {0: "b", 2: "b", 3: "b", 4: "a", 5: "a", 7: "a"}
    found = fit(nodes, [1, 6], needs=GPU, pack=ANYWHERE, kept=kept, own=own_of(kept))
    assert isinstance(found, Fit)
    assert found.node_of_rank == {1: "b", 6: "a"}, "along the tree alone it would be the other way round"


def test_a_block_more_is_avoided_before_a_rack_more() -> None:
    nodes = (
        *(node("a", "b1.r1", 8), node("b", "b2.r1", 8), node("c", "b3.r1", 8)),
        *(node(f"{block}{rack}", f"{block}.{rack}", 4) for block in ("b4", "b5") for rack in ("r1", "r2", "r3")),
    )
    found = fit(nodes, range(24), needs=GPU, pack=Pack(LEVELS, preferred="rack"))
    assert {rack[:2] for rack in racks_of(found, nodes)} == {"b4", "b5"}, "three racks would do, in three blocks"


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"unschedulable": True}, "cordoned", "uncordon node b"),
        ({"taints": (Taint("gpu", "reserved"),)}, "taint", "tolerate taint gpu=reserved in template.spec.tolerations"),
        ({"ready": False}, "not ready", "bring back node b, not ready now"),
        ({"used": {"gpu": 3}}, "in use", "free room for 1 more"),
    ],
)
def test_a_relaxation_says_in_numbers_what_would_help(change: dict[str, object], kind: str, text: str) -> None:
    nodes = (node("a", "b1.r1"), node("b", "b1.r1", 4, **change), node("c", "b1.r2", unschedulable=True))
    found = refused(fit(nodes, range(6), needs=GPU, pack=Pack(LEVELS, required="rack")))
    assert (found.relaxations[0].kind, found.lever) == (kind, text)


def test_only_the_nodes_that_must_be_uncordoned_are_named() -> None:
    nodes = tuple(node(f"n{i}", f"b1.r{i // 3}", 2 + i % 3, unschedulable=i % 3 != 0) for i in range(6))
    found = refused(fit(nodes, range(6), needs=GPU, pack=Pack(LEVELS, required="rack")))
    assert found.lever == "uncordon node n2"


def test_a_broader_level_is_offered_with_what_it_holds() -> None:
    found = refused(fit(CLUSTER, range(11), needs=GPU, pack=Pack(LEVELS, required="rack")))
    assert found.lever == (
        "one block has room for 11 outside one rack: set pack.required to block, pack.preferred to rack"
    )
    found = refused(fit(CLUSTER, range(12), needs=GPU, pack=Pack(LEVELS, required="block")))
    assert found.lever == ("the cluster has room for 12 outside one block: drop pack.required, pack.preferred to block")


def test_few_ranks_less_come_before_new_nodes_and_many_after() -> None:
    few, many = (refused(fit(CLUSTER, range(wanted), needs=GPU, pack=ANYWHERE)) for wanted in (20, 60))
    assert [(r.kind, r.amount) for r in few.relaxations] == [("fewer ranks", 1), ("add nodes", 1)]
    assert [(r.kind, r.amount) for r in many.relaxations] == [("add nodes", 41), ("fewer ranks", 41)]


def test_a_refusal_that_nobody_reads_can_leave_the_relaxations_out() -> None:
    found = refused(fit(CLUSTER, range(20), needs=GPU, pack=ANYWHERE, explain=False))
    assert str(found) == "needs room for 20 ranks in the cluster; best is 19"


def test_a_rank_that_stays_is_no_rank_to_do_without() -> None:
    kept = dict.fromkeys(range(4), "a")
    nodes = (node("a", "b1.r1"),)
    found = refused(fit(nodes, [4], needs=GPU, pack=ANYWHERE, kept=kept, own=own_of(kept)))
    assert [r.kind for r in found.relaxations] == ["add nodes"]


@pytest.mark.parametrize(
    ("ranks", "more", "message"),
    [
        (6, {"subgroups": EP4}, "6 ranks must be whole subgroups of 4"),
        (6, {"ranks_per_node": 4}, "6 ranks must be whole nodes of 4"),
        (4, {"subgroups": EP4, "ranks_per_node": 3}, "a subgroup must be whole nodes of 3, got 4 ranks"),
        (4, {"spares_per_domain": -1}, "spares_per_domain must not be negative, got -1"),
        (4, {"kept": {2: "a"}}, "rank 2 is both kept and to be placed"),
        (4, {"subgroups": Subgroups(4, "row")}, "level 'row' is not in the topology"),
    ],
)
def test_what_does_not_go_together_is_refused(ranks: int, more: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        fit(CLUSTER, range(ranks), needs=GPU, pack=ANYWHERE, **more)  # type: ignore[arg-type]


def test_one_tree_serves_several_fits_and_a_tree_of_other_levels_is_refused() -> None:
    pack = Pack(LEVELS, required="rack")
    tree = tree_of(CLUSTER, pack)
    assert fit(tree, range(8), needs=GPU, pack=pack) == fit(CLUSTER, range(8), needs=GPU, pack=pack)
    with pytest.raises(InvalidInput, match="the tree has 0 levels"):
        fit(build_tree(CLUSTER), range(8), needs=GPU, pack=pack)


def test_the_better_of_two_placements_has_the_smaller_score() -> None:
    tree = build_tree(CLUSTER, LEVELS)
    near = score(tree, {0: "a", 1: "a", 2: "b", 3: "b"})
    far = score(tree, {0: "a", 1: "a", 2: "e", 3: "e"})
    assert near.crossing < far.crossing
    assert str(near) == "rank 25.0%, node 25.0%, rack 50.0%, block 0.0%, cluster 0.0%"
    assert far.share["cluster"] == 0.5
    assert far.busiest == (0.1875, 0.25, 0.25, 0.25), "a quarter of all bytes leaves each block"


def test_a_score_of_a_node_outside_the_tree_is_refused() -> None:
    with pytest.raises(InvalidInput, match="node 'z' is not in the tree"):
        score(build_tree(CLUSTER, LEVELS), {0: "z"})
