"""The rules of moe_core/topology/fit.py against every way to place a gang on a small cluster."""

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.facts import NodeFact, Taint
from moe_core.outcome import NoFit
from moe_core.topology.fit import Fit, fit
from moe_core.topology.room import Needs, Tolerated, rooms
from moe_core.topology.score import score
from moe_core.topology.shape import Pack, Subgroups
from moe_core.topology.tree import build_tree
from topology_reference import Case, Way, room_on, squares

LEVELS = (("zone", "z"), ("block", "b"), ("rack", "r"))
NAMES = ("", "zone", "block", "rack")
GPU = Needs(request={"gpu": 1})


@st.composite
def clusters(draw: st.DrawFn, *, most: int = 6) -> tuple[NodeFact, ...]:
    return tuple(
        NodeFact(
            name=f"n{i}",
            labels={label: draw(st.sampled_from("xy" if label != "r" else "pqs")) for _, label in LEVELS},
            allocatable={"gpu": draw(st.integers(0, 4))},
        )
        for i in range(draw(st.integers(1, most)))
    )


def free_of(nodes: tuple[NodeFact, ...], kept: Way) -> Way:
    return tuple(node.allocatable["gpu"] - count for node, count in zip(nodes, kept, strict=True))


def own_of(nodes: tuple[NodeFact, ...], kept: Way) -> dict[str, dict[str, int]]:
    return {node.name: {"gpu": count} for node, count in zip(nodes, kept, strict=True) if count}


def way_of(found: Fit, nodes: tuple[NodeFact, ...]) -> Way:
    names = list(found.node_of_rank.values())
    return tuple(names.count(node.name) for node in nodes)


@st.composite
def packs(draw: st.DrawFn) -> tuple[int, int]:
    required = draw(st.integers(0, 3))
    return required, draw(st.sampled_from([0, *range(required, 4)]))


def pack_of(required: int, preferred: int) -> Pack:
    return Pack(LEVELS, required=NAMES[required], preferred=NAMES[preferred])


def assert_fewest(case: Case, way: Way, ways: list[Way]) -> None:
    """Rule 2: the narrowest domain, in it the fewest of the next level, in these the fewest of the one after."""
    depth = case.narrowest(way)
    assert depth == max(map(case.narrowest, ways))
    as_good = [w for w in ways if case.narrowest(w) == depth]
    for level in range(depth + 1, case.dealt_over + 1):
        assert len(case.domains_used(way, level)) == min(len(case.domains_used(w, level)) for w in as_good)
        as_good = [w for w in as_good if case.domains_used(w, level) == case.domains_used(way, level)]


def assert_best(case: Case, found: Fit | NoFit, nodes: tuple[NodeFact, ...]) -> None:
    ways = case.ways()
    assert isinstance(found, Fit) == bool(ways), f"{len(ways)} ways, found {found}"
    if isinstance(found, NoFit):
        return
    way = way_of(found, nodes)
    assert way in ways
    assert_fewest(case, way, ways)
    same_domains = [w for w in ways if case.domains_used(w, case.dealt_over) == case.domains_used(way, case.dealt_over)]
    assert case.even_key(way) == min(map(case.even_key, same_domains))
    if not case.ranks_per_node:
        shares = case.by_domain(way, case.dealt_over)
        same_shares = [case.loads(w) for w in same_domains if case.by_domain(w, case.dealt_over) == shares]
        assert squares(case.loads(way)) == min(map(squares, same_shares)), "even over nodes"


@settings(max_examples=300, deadline=None)
@given(clusters(), st.integers(1, 9), packs(), st.integers(0, 2))
def test_a_new_gang_is_placed_as_well_as_any_way_can(
    nodes: tuple[NodeFact, ...], wanted: int, pack: tuple[int, int], spares: int
) -> None:
    none = (0,) * len(nodes)
    case = Case(LEVELS, nodes, free_of(nodes, none), wanted, *pack, kept=none, spares=spares)
    found = fit(nodes, range(wanted), needs=GPU, pack=pack_of(*pack), spares_per_domain=spares)
    assert_best(case, found, nodes)
    if isinstance(found, Fit):
        way = way_of(found, nodes)
        assert len(found.spare_nodes) == spares * len(case.domains_used(way, case.dealt_over))
        taken = [found.spare_nodes.count(n.name) + count for n, count in zip(nodes, way, strict=True)]
        assert all(count <= room for count, room in zip(taken, case.free, strict=True))


@st.composite
def gangs(draw: st.DrawFn, *, most: int = 6) -> tuple[tuple[NodeFact, ...], Way]:
    """A cluster and ranks of the gang that stay, somewhere on it."""
    nodes = draw(clusters(most=most))
    return nodes, tuple(draw(st.integers(0, node.allocatable["gpu"])) for node in nodes)


@settings(max_examples=300, deadline=None)
@given(gangs(), st.integers(1, 6), packs())
def test_lost_ranks_are_replaced_as_well_as_any_way_can(
    gang: tuple[tuple[NodeFact, ...], Way], wanted: int, pack: tuple[int, int]
) -> None:
    nodes, kept = gang
    required, preferred = pack
    ranks = [name for node, count in zip(nodes, kept, strict=True) for name in [node.name] * count]
    stays = dict(enumerate(ranks, start=wanted))
    case = Case(LEVELS, nodes, free_of(nodes, kept), wanted, required, preferred, kept=kept)
    if len(case.domains_used((0,) * len(nodes), required)) > 1:
        return  # kept ranks broke the required level: a label moved
    found = fit(nodes, range(wanted), needs=GPU, pack=pack_of(*pack), kept=stays, own=own_of(nodes, kept))
    assert_best(case, found, nodes)


@settings(max_examples=300, deadline=None)
@given(clusters(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.data())
def test_subgroups_are_placed_as_well_as_any_way_can(
    nodes: tuple[NodeFact, ...], size: int, groups: int, level: int, data: st.DataObject
) -> None:
    required = data.draw(st.integers(0, level))
    spares = data.draw(st.integers(0, 1))
    none = (0,) * len(nodes)
    case = Case(
        LEVELS, nodes, free_of(nodes, none), size * groups, required, kept=none, spares=spares, subgroup=(size, level)
    )
    subgroups = Subgroups(size, NAMES[level])
    ranks, pack = range(size * groups), pack_of(required, 0)
    found = fit(nodes, ranks, needs=GPU, pack=pack, subgroups=subgroups, spares_per_domain=spares)
    ways = case.ways()
    assert isinstance(found, Fit) == bool(ways)
    if isinstance(found, NoFit):
        return
    way = way_of(found, nodes)
    assert way in ways
    assert_fewest(case, way, ways)
    by_name = {node.name: index for index, node in enumerate(nodes)}
    for first in range(0, size * groups, size):
        homes = {case.path(by_name[found.node_of_rank[rank]], level) for rank in range(first, first + size)}
        assert len(homes) == 1, "one subgroup, one domain"


@settings(max_examples=200, deadline=None)
@given(clusters(), st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_ranks_return_to_the_domain_of_their_subgroup(
    nodes: tuple[NodeFact, ...], size: int, groups: int, level: int, data: st.DataObject
) -> None:
    subgroups = Subgroups(size, NAMES[level])
    whole = fit(nodes, range(size * groups), needs=GPU, pack=Pack(LEVELS), subgroups=subgroups)
    if isinstance(whole, NoFit):
        return
    lost = data.draw(st.sets(st.integers(0, size * groups - 1), min_size=1))
    stays = {rank: name for rank, name in whole.node_of_rank.items() if rank not in lost}
    kept = tuple(list(stays.values()).count(node.name) for node in nodes)
    by_name = {node.name: index for index, node in enumerate(nodes)}
    case = Case(LEVELS, nodes, free_of(nodes, kept), len(lost), kept=kept, subgroup=(size, level))
    again = fit(
        nodes, sorted(lost), needs=GPU, pack=Pack(LEVELS), kept=stays, own=own_of(nodes, kept), subgroups=subgroups
    )
    assert isinstance(again, Fit), "where they were is free"
    everyone = {**stays, **again.node_of_rank}
    for first in range(0, size * groups, size):
        homes = {case.path(by_name[everyone[rank]], level) for rank in range(first, first + size)}
        assert len(homes) == 1
    assert all(count <= room for count, room in zip(way_of(again, nodes), case.free, strict=True))


@settings(max_examples=200, deadline=None)
@given(clusters(), st.integers(1, 4), st.integers(1, 3), packs())
def test_a_new_gang_fills_whole_nodes_if_it_is_told_to(
    nodes: tuple[NodeFact, ...], num_nodes: int, block: int, pack: tuple[int, int]
) -> None:
    none, wanted = (0,) * len(nodes), num_nodes * block
    case = Case(LEVELS, nodes, free_of(nodes, none), wanted, *pack, kept=none, ranks_per_node=block)
    assert_best(case, fit(nodes, range(wanted), needs=GPU, pack=pack_of(*pack), ranks_per_node=block), nodes)


@dataclass(frozen=True)
class Wanted:
    """Everything that a fit can be asked for at once."""

    pack: Pack
    subgroups: Subgroups | None
    ranks_per_node: int
    spares: int
    num_ranks: int


@st.composite
def wishes(draw: st.DrawFn) -> Wanted:
    required, preferred = draw(packs())
    block = draw(st.integers(0, 2))
    size = draw(st.integers(1, 2)) * max(1, block)
    level = NAMES[draw(st.integers(0, 3))]
    subgroups = Subgroups(size, level, apart=draw(st.booleans())) if draw(st.booleans()) else None
    num = draw(st.integers(1, 4)) * size
    return Wanted(pack_of(required, preferred), subgroups, block, draw(st.integers(0, 1)), num)


@settings(max_examples=200, deadline=None)
@given(clusters(), wishes(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_changes_nothing_whatever_is_asked(
    nodes: tuple[NodeFact, ...], wish: Wanted, chance: random.Random
) -> None:
    def ask(of: tuple[NodeFact, ...]) -> Fit | NoFit:
        return fit(
            of,
            range(wish.num_ranks),
            needs=GPU,
            pack=wish.pack,
            subgroups=wish.subgroups,
            ranks_per_node=wish.ranks_per_node,
            spares_per_domain=wish.spares,
        )

    mixed = list(nodes)
    chance.shuffle(mixed)
    first = ask(nodes)
    assert ask(tuple(mixed)) == first
    if isinstance(first, Fit) and wish.subgroups is not None and wish.subgroups.apart and wish.subgroups.level:
        depth = NAMES.index(wish.subgroups.level)
        by_name = {node.name: tuple(node.labels[label] for _, label in LEVELS[:depth]) for node in nodes}
        homes = {by_name[name] for name in first.node_of_rank.values()}
        assert len(homes) == wish.num_ranks // wish.subgroups.size


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_room_is_counted_as_a_look_at_one_node_counts_it(data: st.DataObject) -> None:
    taints = [Taint("gpu", "reserved"), Taint("old"), Taint("soft", "", "PreferNoSchedule")]
    amounts = st.dictionaries(st.sampled_from(["gpu", "cpu", "pods"]), st.integers(0, 9), max_size=3)
    nodes = tuple(
        NodeFact(
            name=f"n{i}",
            labels={"pool": data.draw(st.sampled_from("ab"))},
            allocatable=data.draw(amounts),
            used=data.draw(amounts),
            ready=data.draw(st.booleans()),
            unschedulable=data.draw(st.booleans()),
            taints=tuple(data.draw(st.sets(st.sampled_from(taints), max_size=2))),
        )
        for i in range(data.draw(st.integers(1, 4)))
    )
    needs = Needs(
        request=data.draw(st.dictionaries(st.sampled_from(["gpu", "cpu"]), st.integers(1, 3))),
        node_selector=data.draw(st.sampled_from([{}, {"pool": "a"}])),
        tolerations=data.draw(st.sampled_from([(), (Tolerated(key="old", operator="Exists"),)])),
    )
    own = {node.name: data.draw(amounts) for node in nodes if data.draw(st.booleans())}
    most = data.draw(st.integers(1, 6))
    tree = build_tree(nodes)
    found = rooms(tree, needs, own=own, most=most)
    for index, node in enumerate(tree.nodes):
        ranks, excluded = room_on(node, needs, own=own.get(node.name, {}), most=most)
        assert found.ranks[index] == ranks
        assert found.excluded((index, index + 1)) == excluded


@settings(max_examples=100, deadline=None)
@given(clusters(), st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 3))
def test_the_score_counts_every_pair_by_the_narrowest_domain_that_holds_both(
    nodes: tuple[NodeFact, ...], places: list[int], size: int
) -> None:
    node_of_rank = {rank: nodes[place % len(nodes)].name for rank, place in enumerate(places)}
    tree = build_tree(nodes, LEVELS)
    by_name = {node.name: node for node in nodes}
    counts = dict.fromkeys(("rank", "node", "rack", "block", "zone", "cluster"), 0)
    for a, name_a in node_of_rank.items():
        for b, name_b in node_of_rank.items():
            if size and a // size != b // size:
                continue
            paths = [[by_name[n].labels[label] for _, label in LEVELS] for n in (name_a, name_b)]
            shared = next((d for d in range(3, 0, -1) if paths[0][:d] == paths[1][:d]), 0)
            scope = "rank" if a == b else "node" if name_a == name_b else ("cluster", "zone", "block", "rack")[shared]
            counts[scope] += 1
    found = score(tree, node_of_rank, subgroup_size=size)
    assert dict(zip(found.scopes, found.pairs, strict=True)) == counts
