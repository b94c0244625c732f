"""What holds for every choice among copies."""

from collections import Counter
from dataclasses import dataclass
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import IntArray
from moe_core.experts.choice import NO_SLOT, WAYS, choose_slots, deal_lanes
from moe_core.experts.measure import copies_of_logical, load_of_slots
from moe_core.experts.parts import live_slots, parts_of_slots

LAYERS = 2


@dataclass(frozen=True)
class Scene:
    expert_map: ExpertMap
    live: list[int]
    domains: list[str]


@st.composite
def scenes(draw: st.DrawFn, shared: bool | None = None) -> Scene:
    """Any assignment: copies may be many, meet on a rank, or be missing; ranks may have no slots or be gone."""
    num_logical = draw(st.integers(1, 5))
    slots_of_rank = draw(st.lists(st.integers(0, 4), min_size=1, max_size=7))
    num_ranks, num_slots = len(slots_of_rank), sum(slots_of_rank)
    row = st.lists(st.integers(EMPTY_SLOT, num_logical - 1), min_size=num_slots, max_size=num_slots)
    logical = draw(st.lists(row, min_size=LAYERS, max_size=LAYERS))
    share = st.integers(0, 4) | st.integers(0, 1000)
    has_shares = draw(st.booleans()) if shared is None else shared
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=num_logical,
        slots_of_rank=tuple(slots_of_rank),
        logical_of_slot=tuple(map(tuple, logical)),
        share_of_slot=tuple(tuple(0 if e == EMPTY_SLOT else draw(share) for e in r) for r in logical)
        if has_shares
        else (),
    )
    live = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
    domains = draw(st.lists(st.sampled_from("abc"), min_size=num_ranks, max_size=num_ranks))
    return Scene(expert_map, sorted(live), domains)


def chosen_RWLE(scene: Scene) -> IntArray:
    """Each live source asks for itself."""
    return np.stack(
        [
            choose_slots(scene.expert_map, scene.live, source_rank=rank, domain_of_rank=scene.domains)
            for rank in scene.live
        ]
    )


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_every_source_reaches_every_expert_that_lives_in_a_live_copy_of_it(scene: Scene) -> None:
    expert_map, copies_LE = scene.expert_map, copies_of_logical(scene.expert_map, scene.live)
    for chosen_WLE in chosen_RWLE(scene):
        for chosen_LE in chosen_WLE:
            assert np.array_equal(chosen_LE != NO_SLOT, copies_LE > 0)
            for layer_idx, logical in np.argwhere(chosen_LE != NO_SLOT).tolist():
                slot = int(chosen_LE[layer_idx, logical])
                assert expert_map.logical_of_slot[layer_idx][slot] == logical
                assert expert_map.rank_of_slot[slot] in scene.live


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_each_copy_answers_its_part_of_all_lanes_within_one(scene: Scene) -> None:
    chosen = chosen_RWLE(scene)
    num_lanes = chosen.shape[0] * chosen.shape[1]
    parts_LS = parts_of_slots(scene.expert_map, scene.live)
    for layer_idx in range(LAYERS):
        used = Counter(chosen[:, :, layer_idx].ravel().tolist())
        for slot, part in enumerate(parts_LS[layer_idx].tolist()):
            assert abs(used[slot] - part * num_lanes) < 1 + 1e-9


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_a_copy_serves_others_only_when_its_own_rank_has_no_use_for_it_and_far_ones_last(scene: Scene) -> None:
    chosen, expert_map, domains = chosen_RWLE(scene), scene.expert_map, scene.domains
    for layer_idx in range(LAYERS):
        for logical, copies in enumerate(expert_map.slots_of_logical(layer_idx)):
            holders = {slot: expert_map.rank_of_slot[slot] for slot in copies}
            sources_of: dict[int, set[int]] = {slot: set() for slot in copies}
            for source, slots_W in zip(scene.live, chosen[:, :, layer_idx, logical].tolist(), strict=True):
                for slot in set(slots_W) - {NO_SLOT}:
                    sources_of[slot].add(source)
            for source in scene.live:
                used = [slot for slot in copies if source in sources_of[slot]]
                leaves_rank = any(holders[slot] != source for slot in used)
                leaves_domain = any(domains[holders[slot]] != domains[source] for slot in used)
                for slot in copies:
                    if holders[slot] == source and leaves_rank:
                        assert sources_of[slot] <= {source}
                    if domains[holders[slot]] == domains[source] and leaves_domain:
                        assert all(domains[other] == domains[source] for other in sources_of[slot])


@settings(max_examples=80, deadline=None)
@given(scenes(), st.randoms(use_true_random=False))
def test_the_order_in_which_ranks_are_named_says_nothing(scene: Scene, random: Random) -> None:
    shuffled = [*scene.live, *scene.live]
    random.shuffle(shuffled)
    again = deal_lanes(scene.expert_map, shuffled, domain_of_rank=scene.domains)
    assert np.array_equal(chosen_RWLE(scene), np.stack([again.of_source(rank) for rank in scene.live]))


@settings(max_examples=80, deadline=None)
@given(scenes(shared=True), st.integers(1, 1000))
def test_only_the_proportions_of_shares_matter_and_equal_ones_are_even(scene: Scene, factor: int) -> None:
    expert_map = scene.expert_map
    larger = tuple(tuple(share * factor for share in row) for row in expert_map.share_of_slot)
    same = Scene(expert_map.model_copy(update={"share_of_slot": larger}), scene.live, scene.domains)
    assert np.array_equal(chosen_RWLE(scene), chosen_RWLE(same))
    equal = tuple(tuple(0 if e == EMPTY_SLOT else factor for e in row) for row in expert_map.logical_of_slot)
    even = Scene(expert_map.model_copy(update={"share_of_slot": ()}), scene.live, scene.domains)
    said = Scene(expert_map.model_copy(update={"share_of_slot": equal}), scene.live, scene.domains)
    assert np.array_equal(chosen_RWLE(even), chosen_RWLE(said))


@settings(max_examples=100, deadline=None)
@given(scenes(), st.data())
def test_the_load_of_the_slots_is_all_the_load_that_has_a_live_copy(scene: Scene, data: st.DataObject) -> None:
    expert_map = scene.expert_map
    row = st.lists(
        st.integers(0, 100), min_size=expert_map.num_logical_experts, max_size=expert_map.num_logical_experts
    )
    load = data.draw(st.lists(row, min_size=LAYERS, max_size=LAYERS))
    of_slot_LS = load_of_slots(expert_map, load, scene.live)
    has_copy_LE = copies_of_logical(expert_map, scene.live) > 0
    assert np.allclose(of_slot_LS.sum(1), (np.asarray(load) * has_copy_LE).sum(1))
    gone = sorted(set(range(of_slot_LS.shape[1])) - set(live_slots(expert_map, scene.live).tolist()))
    assert not of_slot_LS[:, gone].any()


def test_without_a_second_copy_there_is_one_way() -> None:
    expert_map = ExpertMap(generation=0, num_logical_experts=2, slots_of_rank=(1, 2), logical_of_slot=((0, 1, 0),))
    assert choose_slots(expert_map, [0, 1], source_rank=0).shape == (WAYS, 1, 2)
    assert choose_slots(expert_map, [1], source_rank=1).tolist() == [[[2, 1]]]
