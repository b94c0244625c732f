"""Packing copies onto ranks from scratch: what holds for any load, any ranks, any domains."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_core.experts.anew import pack_anew
from moe_core.experts.checks import FloatArray
from moe_core.experts.counts import count_copies
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import deal, even, pack, part, settle
from planner_cases import copies_of, problems


@given(problems())
def test_every_copy_is_placed_and_no_rank_holds_two_of_one_expert(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), fleet)
    assert not shelf.repeats_LRS().any()
    for layer, row in enumerate(shelf.rows()):
        held = [logical for logical in row if logical >= 0]
        assert len(row) == fleet.num_slots
        assert np.bincount(held, minlength=load.shape[1]).tolist() == shelf.copies_LE[layer].tolist()
        assert shelf.copies_LE[layer].min() >= 1


@given(problems())
def test_the_running_loads_are_those_of_the_slots(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), fleet)
    np.testing.assert_allclose(shelf.load_LR, shelf.weight_LRS().sum(2) / fleet.speed_R, atol=1e-9)
    np.testing.assert_allclose((shelf.load_LR * fleet.speed_R).sum(1), load.sum(1))


@given(problems())
def test_evening_out_never_makes_the_worst_rank_worse(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = deal(load, copies_of(load, fleet), fleet)
    part(shelf)
    before, crowded = shelf.load_LR.max(1), shelf.crowded_LRS().sum()
    even(shelf, rounds=4)
    assert (shelf.load_LR.max(1) <= before + 1e-9).all()
    assert shelf.crowded_LRS().sum() <= crowded
    assert not shelf.repeats_LRS().any()


@given(problems())
def test_settling_leaves_no_exchange_that_would_relieve_the_heaviest_rank(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = deal(load, copies_of(load, fleet), fleet)
    part(shelf)
    before, crowded = shelf.load_LR.max(1), shelf.crowded_LRS().sum()
    settle(shelf)
    settled = shelf.load_LR.max(1)
    assert (settled <= before + 1e-9).all()
    assert shelf.crowded_LRS().sum() <= crowded
    assert not shelf.repeats_LRS().any()
    settle(shelf)
    np.testing.assert_allclose(shelf.load_LR.max(1), settled)


@given(problems(), st.sampled_from([3, 7, 1000]))
def test_the_unit_of_the_load_does_not_matter(problem: tuple[FloatArray, Fleet], unit: int) -> None:
    load, fleet = np.floor(problem[0]), problem[1]  # a product of whole numbers is exact
    assert pack_anew(load * unit, fleet).rows() == pack_anew(load, fleet).rows()


@given(problems(), st.integers(1, 4), st.one_of(st.integers(0, 30), st.integers(31, 3000)), st.sampled_from([5, 1000]))
def test_copies_are_counted_as_if_each_went_to_the_hottest_one_after_the_other(
    problem: tuple[FloatArray, Fleet], least: int, spare: int, most: int
) -> None:
    load, _ = problem
    num_experts = load.shape[1]
    counted = count_copies(load, num_experts + spare, most=most, least=least)
    slots = min(num_experts + spare, num_experts * most)
    assert counted.sum(1).tolist() == [slots] * len(load)
    assert counted.max(initial=1) <= most
    if slots >= num_experts * min(least, most):
        assert counted.min(initial=most) >= min(least, most)
    elif spare < num_experts:
        assert counted.max(initial=1) <= max(2, least)
    for load_E, copies_E in zip(load, counted, strict=True):  # no copy would do more good elsewhere
        takes_E = np.where(copies_E < most, load_E / copies_E, 0.0)
        gives_E = np.where(copies_E > max(1, min(least, most)), load_E / np.maximum(copies_E - 1, 1), np.inf)
        if slots >= num_experts * min(least, most):
            assert takes_E.max() <= gives_E.min() * (1 + 1e-6) + 1e-9


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 6), st.data())
def test_equal_ranks_in_equal_domains_part_all_copies(
    num_domains: int, ranks_per_domain: int, slots: int, data: st.DataObject
) -> None:
    num_ranks = num_domains * ranks_per_domain
    num_experts = data.draw(st.integers(max(slots, num_ranks * slots // num_domains), num_ranks * slots))
    load = np.asarray(
        [data.draw(st.lists(st.integers(0, 99), min_size=num_experts, max_size=num_experts))], dtype=float
    )
    fleet = Fleet.even(num_ranks * slots, num_ranks, num_domains=num_domains)
    copies = count_copies(load, fleet.num_slots, most=num_domains)
    assert not pack(load, copies, fleet).crowded_LRS().any()
