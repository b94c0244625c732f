"""Plans from scratch beside EPLB's: never less even, never less likely to keep every expert."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.align import copies_in
from moe_core.experts.anew import pack_anew
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.eplb import rebalance_experts
from moe_core.experts.fleet import Fleet
from moe_core.experts.hosts import chances, hosts_of, smallest, thin_out
from moe_core.experts.pack import pack
from moe_core.experts.shelf import Shelf
from moe_core.experts.split import best_shares, level_of_ranks
from moe_core.experts.survival import survival
from planner_cases import copies_of, problems

SPLIT_IS_FOUND_TO = 2e-4
"""Of the largest load: how near best_shares comes to the best split (split.py)."""


@st.composite
def even_problems(draw: st.DrawFn, *, nodes: int = 1) -> tuple[FloatArray, int, int]:
    """Load, ranks and slots of each: what EPLB can plan for, on so many nodes."""
    num_ranks = nodes * draw(st.integers(2 // nodes, 6 // nodes))
    num_experts = nodes * draw(st.integers(1, 12 // nodes))
    width = min(-(-num_experts // num_ranks) + draw(st.integers(0, 4)), num_experts)
    row = st.lists(st.integers(0, 1000) | st.sampled_from([0, 1]), min_size=num_experts, max_size=num_experts)
    load = draw(st.lists(row, min_size=1, max_size=3))
    return np.asarray(load, dtype=np.float64), num_ranks, width


def heaviest(load: FloatArray, shelf: Shelf) -> FloatArray:
    share_LRS = best_shares(load, shelf.logical_LRS, shelf.fleet)
    return np.asarray(level_of_ranks(load, shelf.logical_LRS, share_LRS, shelf.fleet).max(1))


def by_eplb(load: FloatArray, num_ranks: int, width: int, nodes: int) -> Shelf:
    logical: IntArray = rebalance_experts(load, num_ranks * width, nodes, nodes, num_ranks)[0]
    logical_LRS = logical.reshape(len(load), num_ranks, width)
    return Shelf.of(load, copies_in(logical_LRS, load.shape[1]), Fleet((width,) * num_ranks), logical_LRS)


def chance(shelf: Shelf, failures: int) -> float:
    slots = shelf.fleet.slots_of_rank
    placed = ExpertMap(
        generation=1, num_logical_experts=shelf.num_experts, slots_of_rank=slots, logical_of_slot=shelf.rows()
    )
    return survival(placed, failures=failures).chance


@settings(max_examples=60)
@given(even_problems())
def test_one_to_four_failures_lose_an_expert_no_sooner_than_by_eplb(problem: tuple[FloatArray, int, int]) -> None:
    load, num_ranks, width = problem
    ours, theirs = pack_anew(load, Fleet((width,) * num_ranks)), by_eplb(load, num_ranks, width, 1)
    for failures in range(1, min(4, num_ranks - 1) + 1):
        assert chance(ours, failures) >= chance(theirs, failures) - 1e-12


@settings(max_examples=60)
@given(even_problems())
def test_no_layer_is_less_even_than_by_eplb(problem: tuple[FloatArray, int, int]) -> None:
    load, num_ranks, width = problem
    ours, theirs = pack_anew(load, Fleet((width,) * num_ranks)), by_eplb(load, num_ranks, width, 1)
    assert (heaviest(load, ours) <= theirs.load_LR.max(1) * (1 + SPLIT_IS_FOUND_TO)).all()


@settings(max_examples=60)
@given(even_problems(nodes=2))
def test_no_layer_is_less_even_than_by_eplb_with_groups_on_nodes(problem: tuple[FloatArray, int, int]) -> None:
    load, num_ranks, width = problem
    ours, theirs = pack_anew(load, Fleet((width,) * num_ranks)), by_eplb(load, num_ranks, width, 2)
    assert (heaviest(load, ours) <= theirs.load_LR.max(1) * (1 + SPLIT_IS_FOUND_TO)).all()


@settings(max_examples=60)
@given(problems(), st.integers(1, 3))
def test_a_plan_from_scratch_fills_all_slots_and_keeps_copies_apart(
    problem: tuple[FloatArray, Fleet], least: int
) -> None:
    load, fleet = problem
    shelf = pack_anew(load, fleet, least_copies=least)
    held = copies_in(shelf.logical_LRS, load.shape[1])
    assert not shelf.repeats_LRS().any()
    assert (held.sum(1) == fleet.room_for(load.shape[1])).all()
    if fleet.room_for(load.shape[1]) >= least * load.shape[1] and fleet.ranks_with_slots >= least:
        assert held.min() >= least


@settings(max_examples=60)
@given(problems())
def test_thinning_out_keeps_the_limit_and_never_adds_a_smallest_set(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), fleet)
    limit, units = shelf.load_LR.max(1) * 1.05, np.arange(fleet.num_ranks)
    before = smallest(hosts_of(shelf.logical_LRS, shelf.num_experts, units).reshape(-1).tolist())
    thin_out(shelf, limit, most_steps=50)
    after = smallest(hosts_of(shelf.logical_LRS, shelf.num_experts, units).reshape(-1).tolist())
    least = min(mask.bit_count() for mask in before)
    assert (shelf.load_LR <= limit[:, None] * (1 + 1e-6) + 1e-9).all()
    assert not shelf.repeats_LRS().any()
    assert {m for m in after if m.bit_count() <= least} <= {m for m in before if m.bit_count() <= least}


@settings(max_examples=40)
@given(problems())
def test_chances_that_guide_the_plan_are_those_that_are_reported(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), Fleet(fleet.slots_of_rank))
    reported = [chance(shelf, failures) for failures in range(1, min(4, fleet.num_ranks - 1) + 1)]
    np.testing.assert_allclose(chances(shelf), reported)
