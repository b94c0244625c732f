"""Replanning from the map there is: what holds for any load, ranks, prices and budget."""

from dataclasses import replace

import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.align import arrivals, copies_in, slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.bounds import bound_of_copies, bound_of_slots
from moe_core.experts.carry import carry_over
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.measure import load_of_ranks
from moe_core.experts.pack import pack
from moe_core.experts.replan import Prices, Rows, replan
from moe_core.experts.shelf import Shelf
from planner_cases import copies_of, problems

FREE = Prices()


def too_near(row: tuple[int, ...], load: FloatArray, fleet: Fleet) -> int:
    """Copies beside another of their expert: on its rank, or in its domain without need."""
    slots = slots_on_ranks([row], fleet, num_experts=load.shape[1])
    shelf = Shelf.of(load[:1], copies_in(slots, load.shape[1]), fleet, slots)
    return int((shelf.repeats_LRS() | shelf.crowded_LRS()).sum())


def packed(load: FloatArray, fleet: Fleet) -> Rows:
    return pack(load, copies_of(load, fleet), fleet).rows()


@st.composite
def drifted(draw: st.DrawFn) -> tuple[FloatArray, Fleet, Rows]:
    """A load, the ranks, and a map that was made for another load."""
    load, fleet = draw(problems())
    order = draw(st.permutations(range(load.shape[1])))
    return load, fleet, packed(load[:, order], fleet)


@st.composite
def prices(draw: st.DrawFn) -> Prices:
    return Prices(
        seconds_per_pick=draw(st.sampled_from([1e-7, 1e-6])),
        bytes_per_expert=draw(st.sampled_from([0, 1000, 10**6])),
        horizon=draw(st.sampled_from([1.0, 50.0])),
        most_moves=draw(st.none() | st.integers(0, 12)),
    )


def slots_by_rank(fleet: Fleet) -> list[range]:
    starts = [sum(fleet.slots_of_rank[:rank]) for rank in range(fleet.num_ranks)]
    return [range(start, start + count) for start, count in zip(starts, fleet.slots_of_rank, strict=True)]


@given(drifted(), prices())
def test_every_expert_keeps_a_slot_and_no_rank_holds_two_copies(
    case: tuple[FloatArray, Fleet, Rows], price: Prices
) -> None:
    load, fleet, current = case
    planned = replan(load, fleet, current, prices=price)
    for row in planned.logical_of_slot:
        assert {e for e in row if e != EMPTY_SLOT} == set(range(load.shape[1]))
        for slots in slots_by_rank(fleet):
            held = [row[s] for s in slots if row[s] != EMPTY_SLOT]
            assert len(held) == len(set(held))


@given(drifted(), prices())
def test_moves_are_counted_and_within_the_budget_and_pay(case: tuple[FloatArray, Fleet, Rows], price: Prices) -> None:
    load, fleet, current = case
    planned = replan(load, fleet, current, prices=price)
    num_experts = load.shape[1]
    start, end = (slots_on_ranks(rows, fleet, num_experts=num_experts) for rows in (current, planned.logical_of_slot))
    assert arrivals(start, end, num_experts).sum() == planned.moves
    assert price.most_moves is None or planned.moves <= price.most_moves
    assert planned.gain_s >= planned.cost_s
    assert planned.gain_s > 0 or planned.moves == 0


@given(drifted(), prices())
def test_what_stays_on_its_rank_stays_in_its_slot(case: tuple[FloatArray, Fleet, Rows], price: Prices) -> None:
    load, fleet, current = case
    planned = replan(load, fleet, current, prices=price)
    for before, after in zip(current, planned.logical_of_slot, strict=True):
        for slots in slots_by_rank(fleet):
            for slot in slots:
                if before[slot] != EMPTY_SLOT and before[slot] in [after[s] for s in slots]:
                    assert after[slot] == before[slot]


@given(drifted())
def test_a_plan_stays_where_it_has_come_to(case: tuple[FloatArray, Fleet, Rows]) -> None:
    load, fleet, current = case
    dear = Prices(bytes_per_expert=1000, horizon=1e6)
    first = replan(load, fleet, current, prices=dear)
    again = replan(load, fleet, first.logical_of_slot, prices=dear, current_shares=first.share_of_slot)
    assert again.gain_s >= again.cost_s
    assert sum(again.worst_after) <= sum(first.worst_after) + 1e-9


@settings(max_examples=40)
@given(drifted(), prices())
def test_what_is_predicted_is_what_the_map_would_measure(case: tuple[FloatArray, Fleet, Rows], price: Prices) -> None:
    load, fleet, current = case
    planned = replan(load, fleet, current, prices=price)
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=load.shape[1],
        slots_of_rank=fleet.slots_of_rank,
        logical_of_slot=planned.logical_of_slot,
        share_of_slot=planned.share_of_slot,
    )
    measured_LR = load_of_ranks(expert_map, load) / fleet.speed_R[fleet.slots_R > 0]
    np.testing.assert_allclose(measured_LR.max(1), planned.worst_after, atol=1e-6)


@settings(max_examples=40)
@given(drifted(), prices())
def test_no_layer_is_slower_than_before(case: tuple[FloatArray, Fleet, Rows], price: Prices) -> None:
    load, fleet, current = case
    planned = replan(load, fleet, current, prices=price)
    assert (np.asarray(planned.worst_after) <= np.asarray(planned.worst_before) + 1e-9).all()


@settings(max_examples=40)
@given(drifted(), prices())
def test_copies_come_no_nearer_to_each_other(case: tuple[FloatArray, Fleet, Rows], price: Prices) -> None:
    load, fleet, current = case
    planned = replan(load, fleet, current, prices=price)
    for before, after in zip(current, planned.logical_of_slot, strict=True):
        assert too_near(after, load, fleet) <= too_near(before, load, fleet)


@settings(max_examples=40)
@given(drifted(), st.integers(1, 3))
def test_no_expert_falls_below_the_least_copies_it_has(case: tuple[FloatArray, Fleet, Rows], least: int) -> None:
    load, fleet, current = case
    assume(load.shape[1] * min(least, fleet.ranks_with_slots) <= fleet.room_for(load.shape[1]))
    planned = replan(load, fleet, current, prices=FREE, least_copies=least)
    for before, after in zip(current, planned.logical_of_slot, strict=True):
        for expert in range(load.shape[1]):
            assert after.count(expert) >= min(before.count(expert), least)


@settings(max_examples=40)
@given(drifted(), st.sampled_from([3, 7, 1000]))
def test_a_load_in_another_unit_gets_the_same_plan(case: tuple[FloatArray, Fleet, Rows], unit: int) -> None:
    load, fleet, current = case
    load = np.floor(load)  # a product of whole numbers is exact
    plain, same = (replan(of_unit, fleet, current, prices=FREE) for of_unit in (load, load * unit))
    assert (same.logical_of_slot, same.share_of_slot) == (plain.logical_of_slot, plain.share_of_slot)
    np.testing.assert_allclose(np.asarray(same.worst_after) / unit, plain.worst_after)


@settings(max_examples=40)
@given(drifted())
def test_a_layer_without_load_stays(case: tuple[FloatArray, Fleet, Rows]) -> None:
    load, fleet, current = case
    load[0] = 0
    assert replan(load, fleet, current, prices=FREE).logical_of_slot[0] == current[0]


def named(order_LE: IntArray, rows: Rows) -> Rows:
    """The same layout where expert order_LE[l][n] is called n."""
    names = np.argsort(order_LE, axis=1)
    return tuple(
        tuple(EMPTY_SLOT if e == EMPTY_SLOT else int(own[e]) for e in row) for own, row in zip(names, rows, strict=True)
    )


@st.composite
def renamed(draw: st.DrawFn) -> tuple[FloatArray, Fleet, Rows, IntArray]:
    """A load, the ranks, a map, and other names for the experts of each layer."""
    load, fleet, current = draw(drifted())
    orders = [draw(st.permutations(range(load.shape[1]))) for _ in load]
    return load, fleet, current, np.asarray(orders)


SIXTEENS = np.asarray([[0.0, 1, 2, 3, 4, 5, 6, 8, 9, 16]])
UNEVEN = Fleet((0, 1, 4, 7))


@settings(max_examples=40)
@given(renamed(), prices(), st.integers(1, 2))
@example((SIXTEENS, UNEVEN, packed(SIXTEENS, UNEVEN), np.asarray([[0, 1, 2, 3, 4, 5, 6, 8, 9, 7]])), FREE, 1)
def test_the_names_of_the_experts_do_not_matter(
    case: tuple[FloatArray, Fleet, Rows, IntArray], price: Prices, least: int
) -> None:
    load, fleet, current, order_LE = case
    assume(load.shape[1] * min(least, fleet.ranks_with_slots) <= fleet.room_for(load.shape[1]))
    plain = replan(load, fleet, current, prices=price, least_copies=least)
    other_load = np.take_along_axis(load, order_LE, axis=1)
    other = replan(other_load, fleet, named(order_LE, current), prices=price, least_copies=least)
    assert other == replace(plain, logical_of_slot=named(order_LE, plain.logical_of_slot))


@settings(max_examples=20)
@given(renamed())
@example((SIXTEENS, UNEVEN, packed(SIXTEENS, UNEVEN), np.asarray([[0, 1, 2, 3, 4, 5, 6, 8, 9, 7]])))
def test_a_plan_from_scratch_is_as_even_whatever_the_experts_are_called(
    case: tuple[FloatArray, Fleet, Rows, IntArray],
) -> None:
    load, fleet, _, order_LE = case
    other = np.take_along_axis(load, order_LE, axis=1)
    plain_LR, other_LR = (pack(one, copies_of(one, fleet), fleet).load_LR for one in (load, other))
    assert (plain_LR == other_LR).all()
    assert (pack_anew(load, fleet).load_LR == pack_anew(other, fleet).load_LR).all()


@settings(max_examples=20)
@given(renamed(), st.integers(1, 2))
def test_a_map_for_another_size_does_not_depend_on_the_names(
    case: tuple[FloatArray, Fleet, Rows, IntArray], least: int
) -> None:
    load, fleet, current, order_LE = case
    wider = Fleet((*fleet.slots_of_rank, 2))
    assume(load.shape[1] * min(least, wider.ranks_with_slots) <= wider.room_for(load.shape[1]))
    plain, other = (
        carry_over(
            ExpertMap(
                generation=1,
                num_logical_experts=load.shape[1],
                slots_of_rank=fleet.slots_of_rank,
                logical_of_slot=rows,
            ),
            of_names,
            wider,
            least_copies=least,
        )
        for of_names, rows in ((load, current), (np.take_along_axis(load, order_LE, axis=1), named(order_LE, current)))
    )
    assert other == named(order_LE, plain)


@given(problems())
def test_no_packing_beats_the_bounds(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), fleet)
    worst = shelf.load_LR.max(1)
    assert (worst >= bound_of_copies(load, shelf.copies_LE, fleet) - 1e-9).all()
    assert (worst >= bound_of_slots(load, fleet) - 1e-9).all()
