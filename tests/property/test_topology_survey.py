"""The room of a domain, as `explain` tells it, is what a fit finds there; and what takes the rest adds up."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.facts import NodeFact
from moe_core.outcome import NoFit
from moe_core.topology.fit import Fit, fit, tree_of
from moe_core.topology.room import Needs
from moe_core.topology.shape import Pack
from moe_core.topology.survey import survey

LEVELS = (("block", "b"), ("rack", "r"))
NAMES = ("", "block", "rack")
GPU = Needs(request={"gpu": 1})
Nodes = tuple[NodeFact, ...]


@st.composite
def clusters(draw: st.DrawFn) -> Nodes:
    return tuple(
        NodeFact(
            name=f"n{i}",
            labels={"b": draw(st.sampled_from("xy"))} | draw(st.sampled_from([{}, {"r": "p"}, {"r": "q"}])),
            allocatable={"gpu": draw(st.integers(0, 5))},
            used={"gpu": draw(st.integers(0, 2))},
            ready=draw(st.integers(0, 3)) > 0,
            unschedulable=draw(st.integers(0, 3)) == 0,
        )
        for i in range(draw(st.integers(1, 6)))
    )


@settings(max_examples=150, deadline=None)
@given(clusters(), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_the_room_of_a_domain_is_the_most_that_fits_into_it(
    nodes: Nodes, required: int, preferred: int, spares: int, block: int
) -> None:
    pack = Pack(LEVELS, required=NAMES[required], preferred=NAMES[preferred] if preferred > required else "")
    most = 4 * max(1, block)

    def found(of: Nodes, wanted: int) -> Fit | NoFit:
        return fit(of, range(wanted), needs=GPU, pack=pack, ranks_per_node=block, spares_per_domain=spares)

    tree = tree_of(nodes, pack)
    rooms = survey(tree, most, needs=GPU, pack=pack, ranks_per_node=block, spares_per_domain=spares)
    for domain in rooms:
        labels = [label for _, label in LEVELS[: len(domain.path)]]
        inside = tuple(n for n in tree.nodes if tuple(n.labels[label] for label in labels) == domain.path)
        assert len(inside) == domain.num_nodes
        for wanted in range(max(1, block), most + 1, max(1, block)):
            assert isinstance(found(inside, wanted), Fit) == (wanted <= domain.room)
    assert sum(domain.num_nodes for domain in rooms) == len(tree.nodes)
    whole = found(nodes, most)
    if isinstance(whole, NoFit) and rooms:
        assert rooms[0].room == whole.best
