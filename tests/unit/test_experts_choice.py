"""The choice among copies, by example; what always holds is in tests/property/test_choice_property.py."""

from collections import Counter
from typing import Any

import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.assign import assign
from moe_core.experts.choice import NO_SLOT, WAYS, choose_slots, deal_lanes
from moe_core.experts.measure import balance, load_of_ranks
from moe_core.outcome import InvalidInput


def hot(*shares: int, slots_of_rank: tuple[int, ...] = (1, 1, 1, 1)) -> ExpertMap:
    """One layer; expert 0 in every slot but the last, which holds expert 1."""
    num_slots = sum(slots_of_rank)
    return ExpertMap(
        generation=0,
        num_logical_experts=2,
        slots_of_rank=slots_of_rank,
        logical_of_slot=((0,) * (num_slots - 1) + (1,),),
        share_of_slot=((*shares, 1),) if shares else (),
    )


def lanes_of(expert_map: ExpertMap) -> Counter[int]:
    """Lanes of expert 0 by slot, all ranks living."""
    lanes = deal_lanes(expert_map, range(expert_map.num_ranks))
    return Counter(s for rank in lanes.ranks for s in lanes.of_source(rank)[:, 0, 0].tolist())


def test_a_source_uses_its_own_copy_first() -> None:
    expert_map = assign("linear", num_layers=1, num_logical_experts=16, slots_of_rank=(6, 6, 6, 6))
    for rank in range(4):
        for slots in choose_slots(expert_map, range(4), source_rank=rank)[:, 0]:
            for slot in expert_map.slot_range(rank):
                assert slots[expert_map.logical_of_slot[0][slot]] == slot


def test_a_hot_experts_lanes_are_split_as_the_shares_say() -> None:
    assert lanes_of(hot(5, 2, 1)) == {0: 5 * WAYS // 2, 1: WAYS, 2: WAYS // 2}


def test_a_copy_without_a_share_is_left_alone_until_the_others_are_lost() -> None:
    expert_map = hot(1, 0, 1)
    assert lanes_of(expert_map)[1] == 0
    assert set(choose_slots(expert_map, [1, 3], source_rank=3)[:, 0, 0].tolist()) == {1}


def test_few_tokens_of_one_source_already_meet_its_parts() -> None:
    slots_W = choose_slots(hot(1, 1, slots_of_rank=(1, 1, 1)), [0, 1, 2], source_rank=2)[:, 0, 0].tolist()
    for first in range(WAYS):
        assert {slots_W[first], slots_W[(first + 1) % WAYS]} == {0, 1}


def test_a_way_of_all_sources_meets_the_parts_too() -> None:
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=1,
        slots_of_rank=(1, 1, *[0] * 30),
        logical_of_slot=((0, 0),),
        share_of_slot=((1, 1),),
    )
    lanes = deal_lanes(expert_map, range(32))
    for way in range(WAYS):
        used = Counter(int(lanes.of_source(rank)[way, 0, 0]) for rank in range(32))
        assert abs(used[0] - used[1]) <= 2


def test_a_near_copy_is_taken_before_a_far_one_of_the_same_part() -> None:
    expert_map = hot(slots_of_rank=(1, 0, 1, 1))
    lanes = deal_lanes(expert_map, range(4), domain_of_rank=["a", "a", "b", "b"])
    assert set(lanes.of_source(1)[:, 0, 0].tolist()) == {0}
    assert set(lanes.of_source(3)[:, 0, 0].tolist()) == {1}


def test_lanes_that_cannot_be_dealt_evenly_fall_on_all_ranks_in_turn() -> None:
    """64 lanes for three copies: 21, 21 and 22, and not the same one more each time."""
    expert_map = assign("linear", num_layers=1, num_logical_experts=6, slots_of_rank=(6, 6, 6, 0))
    lanes = deal_lanes(expert_map, range(4))
    used = Counter(expert_map.rank_of_slot[s] for rank in range(4) for s in lanes.of_source(rank).ravel().tolist())
    assert (used[0], used[1], used[2]) == (8 * WAYS, 8 * WAYS, 8 * WAYS)


def test_sources_that_cannot_all_stay_in_their_domain_leave_it_in_turn() -> None:
    """The near copy has 10 lanes for three sources."""
    num_experts = 24
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=num_experts,
        slots_of_rank=(num_experts, 0, 0, 0, num_experts),
        logical_of_slot=((*range(num_experts), *range(num_experts)),),
        share_of_slot=((1,) * num_experts + (2,) * num_experts,),
    )
    lanes = deal_lanes(expert_map, range(5), domain_of_rank="aaaab")
    stays = [int((lanes.of_source(rank) < num_experts).sum()) for rank in (1, 2, 3)]
    assert max(stays) - min(stays) <= 4


def test_an_experts_load_falls_where_its_shares_say() -> None:
    expert_map = hot(5, 2, 1)
    assert load_of_ranks(expert_map, [[80, 10]]).tolist() == [[50, 20, 10, 10]]
    assert load_of_ranks(expert_map, [[80, 10]], [1, 2, 3])[0].tolist() == pytest.approx([160 / 3, 80 / 3, 10])
    assert balance(expert_map, [[80, 10]]).balancedness == pytest.approx(22.5 / 50)


def test_an_expert_without_a_live_copy_has_no_slot() -> None:
    expert_map = assign("linear", num_layers=1, num_logical_experts=4, slots_of_rank=(2, 2))
    assert choose_slots(expert_map, [0], source_rank=0).tolist() == [[[0, 1, NO_SLOT, NO_SLOT]]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"source_rank": 7}, "source_rank must be one of live_ranks"),
        ({"domain_of_rank": ["a"]}, "domain_of_rank must name 4 ranks, got 1"),
    ],
)
def test_what_is_no_choice_is_refused_by_name_and_value(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        choose_slots(hot(), range(4), **({"source_rank": 0} | bad))
