"""Fixed groups of ranks that hold the same experts."""

import numpy as np

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.anew import pack_anew
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.hosts import hosts_of
from moe_core.experts.mirror import mirror_groups, pack_mirrored
from moe_core.experts.shelf import Shelf
from moe_core.experts.survival import survival


def loads(num_layers: int, num_experts: int) -> FloatArray:
    return np.random.default_rng(0).lognormal(0, 0.5, (num_layers, num_experts))


def contains_a_group(shelf: Shelf, size: int) -> bool:
    groups = [sum(1 << rank for rank in group) for group in mirror_groups(shelf.fleet, size)]
    masks = hosts_of(shelf.logical_LRS, shelf.num_experts, np.arange(shelf.fleet.num_ranks))
    return all(any(mask & group == group for group in groups) for mask in masks.reshape(-1).tolist())


def test_members_of_a_group_are_in_distinct_domains_and_groups_in_the_same_ones() -> None:
    fleet = Fleet.even(32, 8, num_domains=4)
    groups = mirror_groups(fleet, 2)
    domains = [{int(fleet.domain_R[rank]) for rank in group} for group in groups]
    assert sorted(rank for group in groups for rank in group) == list(range(8))
    assert sorted(map(sorted, domains)) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_ranks_that_do_not_divide_make_one_group_larger() -> None:
    assert [len(group) for group in mirror_groups(Fleet((4,) * 7), 2)] == [3, 2, 2]


def test_a_rank_without_slots_is_in_no_group() -> None:
    assert sorted(rank for group in mirror_groups(Fleet((4, 0, 4, 4, 4)), 2) for rank in group) == [0, 2, 3, 4]


def test_every_expert_of_every_layer_is_on_a_whole_group() -> None:
    shelf = pack_mirrored(loads(3, 20), Fleet((6,) * 8, domain_of_rank=tuple("aabbccdd")), 2)
    assert shelf is not None
    assert contains_a_group(shelf, 2)
    assert not shelf.crowded_LRS().any()


def test_three_ranks_hold_pairs_in_all_their_slots() -> None:
    shelf = pack_mirrored(loads(2, 6), Fleet((4, 4, 4)), 2)
    assert shelf is not None
    assert (shelf.copies_LE == 2).all()
    assert not shelf.repeats_LRS().any()


def test_slots_beyond_whole_groups_take_further_copies() -> None:
    shelf = pack_mirrored(loads(2, 8), Fleet((5, 5, 4, 4)), 2)
    assert shelf is not None
    assert shelf.copies_LE.sum(1).tolist() == [18, 18]
    assert contains_a_group(shelf, 2)


def test_there_is_no_layout_on_groups_where_slots_are_too_few() -> None:
    assert pack_mirrored(loads(1, 9), Fleet((4,) * 4), 2) is None


def test_with_room_for_two_copies_of_all_only_the_pairs_are_fatal() -> None:
    fleet = Fleet.even(576, 32)
    load = loads(4, 256)
    shelf = pack_anew(load, fleet)
    placed = ExpertMap(
        generation=1, num_logical_experts=256, slots_of_rank=fleet.slots_of_rank, logical_of_slot=shelf.rows()
    )
    assert survival(placed, failures=1).chance == 1.0
    assert survival(placed, failures=2).chance == 1 - 16 / (32 * 31 / 2)
