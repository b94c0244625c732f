"""Gang fit against brute force on small clusters."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.facts import NodeFact
from moe_core.outcome import NoFit
from moe_core.topology.fit import Fit, fit
from moe_core.topology.room import Needs
from moe_core.topology.shape import Pack

LEVELS = (("block", "b"), ("rack", "r"))
GPU = Needs(request={"gpu": 1})


@st.composite
def clusters(draw: st.DrawFn) -> tuple[NodeFact, ...]:
    count = draw(st.integers(1, 6))
    return tuple(
        NodeFact(
            name=f"n{i}",
            labels={"b": draw(st.sampled_from("xy")), "r": draw(st.sampled_from("pq"))},
            allocatable={"gpu": draw(st.integers(0, 4))},
            used={"gpu": draw(st.integers(0, 2))},
            ready=draw(st.integers(0, 5)) > 0,
            unschedulable=draw(st.integers(0, 5)) == 0,
        )
        for i in range(count)
    )


def room(node: NodeFact) -> int:
    if not node.ready or node.unschedulable:
        return 0
    return max(0, node.allocatable["gpu"] - node.used["gpu"])


def path(node: NodeFact, depth: int) -> tuple[str, ...]:
    return (node.labels["b"], node.labels["r"])[:depth]


def rooms(nodes: tuple[NodeFact, ...], depth: int, inside: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    for node in nodes:
        if path(node, len(inside)) == inside:
            found[path(node, depth)] = found.get(path(node, depth), 0) + room(node)
    return found


PACKS = st.sampled_from(
    [
        Pack(LEVELS),
        Pack(LEVELS, required="rack"),
        Pack(LEVELS, required="block"),
        Pack(LEVELS, preferred="rack"),
        Pack(LEVELS, preferred="block"),
        Pack(LEVELS, required="block", preferred="rack"),
    ]
)
DEPTH = {"": 0, "block": 1, "rack": 2}


@settings(max_examples=120, deadline=None)
@given(clusters(), st.integers(1, 8), PACKS)
def test_a_fit_is_found_exactly_when_there_is_one_and_never_overfills(
    nodes: tuple[NodeFact, ...], wanted: int, pack: Pack
) -> None:
    found = fit(nodes, range(wanted), needs=GPU, pack=pack)
    possible = max(rooms(nodes, DEPTH[pack.required]).values()) >= wanted
    assert isinstance(found, Fit) == possible
    if isinstance(found, NoFit):
        assert found.best == max(rooms(nodes, DEPTH[pack.required]).values())
        return
    by_name = {node.name: node for node in nodes}
    names = [found.node_of_rank[rank] for rank in range(wanted)]
    assert all(names.count(name) <= room(by_name[name]) for name in set(names))
    assert len({path(by_name[name], DEPTH[pack.required]) for name in names}) == 1
    assert names == sorted(names, key=lambda name: (path(by_name[name], 2), name)), "neighbours by number are near"


@settings(max_examples=120, deadline=None)
@given(clusters(), st.integers(1, 8), st.sampled_from(["", "block"]))
def test_preferred_racks_are_as_few_as_brute_force_finds(
    nodes: tuple[NodeFact, ...], wanted: int, required: str
) -> None:
    found = fit(nodes, range(wanted), needs=GPU, pack=Pack(LEVELS, required=required, preferred="rack"))
    if isinstance(found, NoFit):
        return
    by_name = {node.name: node for node in nodes}
    used = {path(by_name[name], 2) for name in found.node_of_rank.values()}
    blocks = sorted({path(node, 1) for node in nodes})
    within = [block for block in blocks if sum(rooms(nodes, 2, block).values()) >= wanted] or [()]
    fewest = min(
        size
        for block in within
        for size in range(1, 5)
        for chosen in combinations(rooms(nodes, 2, block).values(), size)
        if sum(chosen) >= wanted
    )
    assert len(used) == fewest
    if within != [()]:
        assert len({rack[:1] for rack in used}) == 1, "one block holds them all, so one block is used"


@settings(max_examples=80, deadline=None)
@given(clusters(), st.integers(1, 6), PACKS, st.randoms(use_true_random=False))
def test_the_order_of_nodes_changes_nothing(
    nodes: tuple[NodeFact, ...], wanted: int, pack: Pack, chance: object
) -> None:
    mixed = list(nodes)
    chance.shuffle(mixed)  # type: ignore[attr-defined]
    assert fit(mixed, range(wanted), needs=GPU, pack=pack) == fit(nodes, range(wanted), needs=GPU, pack=pack)


@settings(max_examples=80, deadline=None)
@given(clusters(), st.integers(1, 6), st.data())
def test_the_missing_ranks_stay_in_the_required_domain_of_the_kept_ones(
    nodes: tuple[NodeFact, ...], wanted: int, data: st.DataObject
) -> None:
    pack = Pack(LEVELS, required="rack")
    whole = fit(nodes, range(wanted), needs=GPU, pack=pack)
    if isinstance(whole, NoFit) or wanted < 2:
        return
    lost = data.draw(st.sets(st.integers(0, wanted - 1), min_size=1, max_size=wanted - 1))
    kept = {rank: node for rank, node in whole.node_of_rank.items() if rank not in lost}
    own: dict[str, dict[str, int]] = {}
    for node in kept.values():
        own[node] = {"gpu": own.get(node, {}).get("gpu", 0) + 1}
    again = fit(nodes, sorted(lost), needs=GPU, pack=pack, kept=kept, own=own)
    assert isinstance(again, Fit), "what fitted whole still fits"
    by_name = {node.name: node for node in nodes}
    everyone = [*kept.values(), *again.node_of_rank.values()]
    assert len({path(by_name[name], 2) for name in everyone}) == 1
    assert all(everyone.count(name) <= room(by_name[name]) for name in set(everyone))
