"""Every relaxation of a NoFit is applied by hand: then the gang fits, and for a plain gang with less it does not."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.facts import NodeFact
from moe_core.outcome import NoFit, Relaxation
from moe_core.topology.fit import Fit, fit
from moe_core.topology.room import Needs
from moe_core.topology.shape import Pack, Subgroups

LEVELS = (("block", "b"), ("rack", "r"))
NAMES = ("", "block", "rack")
GPU = Needs(request={"gpu": 1})
Nodes = tuple[NodeFact, ...]


@dataclass(frozen=True)
class Wish:
    num_ranks: int
    required: int = 0
    spares: int = 0
    block: int = 0
    size: int = 0
    group_level: int = 0

    def on(self, nodes: Nodes) -> Fit | NoFit:
        return fit(
            nodes,
            range(self.num_ranks),
            needs=GPU,
            pack=Pack(LEVELS, required=NAMES[self.required]),
            subgroups=Subgroups(self.size, NAMES[self.group_level]) if self.size else None,
            ranks_per_node=self.block,
            spares_per_domain=self.spares,
        )

    def fits(self, nodes: Nodes) -> bool:
        return isinstance(self.on(nodes), Fit)


@st.composite
def clusters(draw: st.DrawFn) -> Nodes:
    return tuple(
        NodeFact(
            name=f"n{i}",
            labels={"b": draw(st.sampled_from("xy")), "r": draw(st.sampled_from("pq"))},
            allocatable={"gpu": draw(st.integers(1, 4))},
            used={"gpu": draw(st.integers(0, 2))},
            ready=draw(st.integers(0, 3)) > 0,
            unschedulable=draw(st.integers(0, 3)) == 0,
        )
        for i in range(draw(st.integers(1, 5)))
    )


plain = st.builds(Wish, st.integers(1, 14), required=st.integers(0, 2))


@st.composite
def grouped(draw: st.DrawFn) -> Wish:
    block, level = draw(st.integers(0, 2)), st.integers(0, 2)
    size = draw(st.integers(1, 3)) * max(1, block)
    return Wish(draw(st.integers(1, 4)) * size, draw(level), draw(level), block, size, draw(level))


def freed(nodes: Nodes, amount: int) -> Iterable[Nodes]:
    """All ways to free that many places in use."""
    for per_node in product(*(range(min(n.used["gpu"], n.allocatable["gpu"]) + 1) for n in nodes)):
        if sum(per_node) == amount:
            used = [min(n.used["gpu"], n.allocatable["gpu"]) - count for n, count in zip(nodes, per_node, strict=True)]
            yield tuple(replace(n, used={"gpu": left}) for n, left in zip(nodes, used, strict=True))


def grown(nodes: Nodes, amount: int) -> Iterable[Nodes]:
    """All ways to add new nodes, of one place each, to the domains there are."""
    domains = sorted({(n.labels["b"], n.labels["r"]) for n in nodes})
    for b, r in domains:
        new = (NodeFact(name=f"new{i}", labels={"b": b, "r": r}, allocatable={"gpu": 1}) for i in range(amount))
        yield (*nodes, *new)


def opened(nodes: Nodes, change: dict[str, bool], amount: int) -> Iterable[Nodes]:
    for chosen in combinations(range(len(nodes)), amount):
        yield tuple(replace(n, **change) if i in chosen else n for i, n in enumerate(nodes))  # type: ignore[arg-type]


def applied(change: Relaxation, wish: Wish, nodes: Nodes, amount: int) -> Iterable[tuple[Wish, Nodes]]:
    """All ways to carry out so much of a change."""
    asks = {
        "spares": lambda: replace(wish, spares=wish.spares - amount),
        "ranks_per_node": lambda: replace(wish, block=0),
        "required": lambda: replace(wish, required=wish.required - amount),
        "subgroups": lambda: replace(wish, group_level=max(wish.group_level, wish.required) - amount),
        "fewer ranks": lambda: replace(wish, num_ranks=wish.num_ranks - amount),
    }
    facts = {
        "cordoned": lambda: opened(nodes, {"unschedulable": False}, amount),
        "not ready": lambda: opened(nodes, {"ready": True}, amount),
        "in use": lambda: freed(nodes, amount),
        "add nodes": lambda: grown(nodes, amount),
    }
    if change.kind in asks:
        return [(asks[change.kind](), nodes)] if amount else [(wish, nodes)]
    return ((wish, others) for others in facts[change.kind]())


@settings(max_examples=30, deadline=None)
@given(clusters(), plain)
def test_for_a_plain_gang_every_relaxation_is_enough_and_no_more_than_needed(nodes: Nodes, wish: Wish) -> None:
    found = wish.on(nodes)
    if isinstance(found, Fit):
        return
    for change in found.relaxations:
        assert any(w.fits(n) for w, n in applied(change, wish, nodes, change.amount)), change
        less = chain.from_iterable(applied(change, wish, nodes, less) for less in range(change.amount))
        assert not any(w.fits(n) for w, n in less), f"less than {change} would do"


@settings(max_examples=120, deadline=None)
@given(clusters(), grouped())
def test_with_subgroups_and_spares_too_every_relaxation_is_enough(nodes: Nodes, wish: Wish) -> None:
    found = wish.on(nodes)
    if isinstance(found, Fit):
        return
    for change in found.relaxations:
        if change.kind == "add nodes":
            continue  # several racks may each need a node: the number is checked for plain gangs
        if change.kind == "subgroups" and wish.spares:
            continue  # the spares stay per domain of the old level, which no field of the wish says
        assert any(w.fits(n) for w, n in applied(change, wish, nodes, change.amount)), change
