"""Replanning from the map there is: what holds for any load, ranks, prices and budget."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.experts.align import arrivals, slots_on_ranks
from moe_core.experts.bounds import bound_of_copies, bound_of_slots
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import pack
from moe_core.experts.replan import Prices, Rows, replan
from planner_cases import copies_of, problems

FREE = Prices()


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


@settings(max_examples=60)
@given(problems(), st.data())
def test_the_names_of_the_experts_do_not_matter(problem: tuple[FloatArray, Fleet], data: st.DataObject) -> None:
    load, fleet = problem
    assume(all(len(set(row)) == len(row) for row in load.tolist()))  # without ties
    order = data.draw(st.permutations(range(load.shape[1])))
    plain = replan(load, fleet, packed(load, fleet), prices=FREE)
    renamed = replan(load[:, order], fleet, packed(load[:, order], fleet), prices=FREE)
    np.testing.assert_allclose(renamed.worst_after, plain.worst_after)


@given(problems())
def test_no_packing_beats_the_bounds(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), fleet)
    worst = shelf.load_LR.max(1)
    assert (worst >= bound_of_copies(load, shelf.copies_LE, fleet) - 1e-9).all()
    assert (worst >= bound_of_slots(load, fleet) - 1e-9).all()
