"""The plan: addresses of living slots, own copies first, the lost ones named."""

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.plan import LOST, make_plan

# rank 0: experts 0 1 2, rank 1: none, rank 2: 3 0
MAP = ExpertMap(generation=1, num_logical_experts=4, slots_of_rank=(3, 0, 2), logical_of_slot=((0, 1, 2, 3, 0),))


def addresses(ranks: tuple[int, ...], rank: int) -> list[int]:
    """Of each expert, where it has but one."""
    ways: list[list[int]] = make_plan(MAP, ranks, rank=rank).layers[0].address_WE.tolist()
    assert all(way == ways[0] for way in ways)
    return ways[0]


def test_an_address_is_position_times_stride_plus_local_slot() -> None:
    assert addresses((0, 1, 2), 0) == [0, 1, 2, 2 * 3 + 0]


def test_a_copy_on_the_own_rank_is_used_first() -> None:
    assert addresses((0, 1, 2), 2)[0] == 2 * 3 + 1


def test_positions_close_up_when_a_rank_is_gone() -> None:
    assert addresses((1, 2), 1) == [2 * 1 + 1, LOST, LOST, 2 * 1 + 0]


def test_experts_without_a_live_copy_are_named_lost() -> None:
    assert make_plan(MAP, (1, 2), rank=1).layers[0].lost == (1, 2)
    assert make_plan(MAP, (0, 1, 2), rank=1).layers[0].lost == ()


def test_tokens_take_the_ways_in_turn_and_go_on_where_the_last_step_ended() -> None:
    layer = make_plan(MAP, (0, 1, 2), rank=1).layers[0]
    num_ways = len(layer.address_WE)
    both = layer.address_WE[:, 0].tolist()
    assert sorted(both) == [0] * (num_ways // 2) + [2 * 3 + 1] * (num_ways // 2)
    picks = torch.zeros(num_ways + 3, 2, dtype=torch.long)
    assert layer.addresses(picks)[:, 1].tolist() == [*both, *both[:3]]
    assert layer.addresses(picks, first_way=3)[:, 0].tolist() == [*both[3:], *both[:6]]


def test_a_copy_in_the_own_domain_is_preferred() -> None:
    emap = ExpertMap(generation=0, num_logical_experts=1, slots_of_rank=(1, 1, 0, 0), logical_of_slot=((0, 0),))
    for domains, position in (("abab", 0), ("abba", 1)):
        plan = make_plan(emap, range(4), rank=2, domains=domains)
        assert set(plan.layers[0].address_WE[:, 0].tolist()) == {position}


def test_ranks_that_own_nothing_still_have_a_plan() -> None:
    plan = make_plan(MAP, (1,), rank=1)
    assert plan.layers[0].lost == (0, 1, 2, 3)
    assert plan.slots_stride == 1


@pytest.mark.parametrize(("ranks", "rank"), [((2, 0), 0), ((0, 2), 1), ((0, 3), 0)])
def test_ranks_out_of_order_or_unknown_are_refused(ranks: tuple[int, ...], rank: int) -> None:
    with pytest.raises(InvalidInput):
        make_plan(MAP, ranks, rank=rank)
