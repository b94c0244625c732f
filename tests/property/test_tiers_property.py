"""EP groups side by side: a token stays in its group as long as a copy lives there, and finds one elsewhere if not."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.choice import NO_SLOT, choose_slots
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import mirrors
from moe_core.experts.tiers import Tiers, side_by_side
from moe_core.outcome import InvalidInput


@dataclass(frozen=True)
class Scene:
    expert_map: ExpertMap
    group_ranks: int
    live: list[int]
    nodes: list[str]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Groups of ranks with a few slots each, of which some have died; nodes that may cut through groups."""
    num_groups, group_ranks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_experts, layers = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    slots = tuple(draw(st.lists(st.integers(1, 4), min_size=group_ranks, max_size=group_ranks)))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=sum(slots), max_size=sum(slots))
    rows = tuple(tuple(draw(row)) for _ in range(layers))
    group = ExpertMap(generation=0, num_logical_experts=num_experts, slots_of_rank=slots, logical_of_slot=rows)
    num_ranks = num_groups * group_ranks
    live = sorted(draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)))
    nodes = draw(st.lists(st.sampled_from("xyz"), min_size=num_ranks, max_size=num_ranks))
    return Scene(side_by_side(group, num_groups), group_ranks, live, nodes)


@settings(max_examples=150)
@given(scenes())
def test_a_token_leaves_its_group_only_for_what_has_no_live_copy_there(scene: Scene) -> None:
    emap, size = scene.expert_map, scene.group_ranks
    tiers = Tiers(emap, scene.live, group_ranks=size, domain_of_rank=scene.nodes)
    rank_of_slot = np.asarray(emap.rank_of_slot)
    held = [
        [{e for s in emap.slot_range(rank) if (e := row[s]) >= 0} for rank in range(emap.num_ranks)]
        for row in emap.logical_of_slot
    ]
    for source in scene.live:
        chosen_WLE = tiers.of_source(source)
        for layer, of_rank in enumerate(held):
            for expert in range(emap.num_logical_experts):
                slots = chosen_WLE[:, layer, expert]
                holders = {rank for rank in scene.live if expert in of_rank[rank]}
                near = {rank for rank in holders if rank // size == source // size}
                if not holders:
                    assert set(slots.tolist()) == {NO_SLOT}
                    continue
                assert set(rank_of_slot[slots].tolist()) <= (near or holders)
                assert {emap.logical_of_slot[layer][slot] for slot in slots.tolist()} == {expert}


@settings(max_examples=50)
@given(scenes())
def test_without_groups_the_choice_is_the_one_among_all_copies(scene: Scene) -> None:
    tiers = Tiers(scene.expert_map, scene.live, domain_of_rank=scene.nodes)
    for source in scene.live:
        expected = choose_slots(scene.expert_map, scene.live, source_rank=source, domain_of_rank=scene.nodes)
        np.testing.assert_array_equal(tiers.of_source(source), expected)


def test_ranks_of_one_number_in_their_groups_are_mirrors() -> None:
    group = ExpertMap(
        generation=3, num_logical_experts=4, slots_of_rank=(2, 2), logical_of_slot=((0, 1, 2, 3), (3, 1, 2, 0))
    )
    three = side_by_side(group, 3)
    assert three.generation == 3
    assert three.slots_of_rank == (2,) * 6
    held_LRS = np.asarray(three.logical_of_slot).reshape(2, 6, 2)
    found = mirrors(held_LRS, Fleet(three.slots_of_rank))
    assert found is not None
    assert found.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_no_group_is_refused() -> None:
    group = ExpertMap(generation=0, num_logical_experts=1, slots_of_rank=(1,), logical_of_slot=((0,),))
    with pytest.raises(InvalidInput, match="num_groups must be at least 1, got 0"):
        side_by_side(group, 0)
