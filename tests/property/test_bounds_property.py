"""Bounds below, plans above, and between them what an exact solver finds."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_planner import exact_of_copies, exact_of_shares, exact_of_slots
from moe_core.experts.anew import pack_anew
from moe_core.experts.bounds import bound_of_copies, bound_of_slots
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import pack
from moe_core.experts.split import best_shares, level_of_ranks
from planner_cases import copies_of

NEAR = 1e-6
"""The solver's own tolerance, of the load."""


@st.composite
def tiny_problems(draw: st.DrawFn) -> tuple[FloatArray, Fleet]:
    """Few enough to be solved exactly in a few hundredths of a second."""
    num_experts, num_ranks = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    slots = draw(st.lists(st.integers(1, 4), min_size=num_ranks, max_size=num_ranks))
    while sum(min(s, num_experts) for s in slots) < num_experts:
        slots[draw(st.integers(0, num_ranks - 1))] += 1
    speeds = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=num_ranks, max_size=num_ranks))
    load = draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    return np.asarray([load], dtype=np.float64), Fleet(tuple(slots), tuple(speeds))


def is_ordered(*values: float) -> bool:
    return all(low <= high + NEAR * max(1.0, high) for low, high in pairwise(values))


@settings(max_examples=40)
@given(tiny_problems())
def test_the_best_packing_of_given_copies_is_between_the_bound_and_ours(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack(load, copies_of(load, fleet), fleet)
    exact = exact_of_copies(load[0], shelf.copies_LE[0], fleet)
    assert is_ordered(bound_of_copies(load, shelf.copies_LE, fleet)[0], exact, shelf.load_LR.max())


@settings(max_examples=25)
@given(tiny_problems())
def test_the_best_plan_with_even_shares_is_between_the_bound_and_ours(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    exact = exact_of_slots(load[0], fleet)
    assert is_ordered(bound_of_slots(load, fleet)[0], exact, pack_anew(load, fleet).load_LR.max())


@settings(max_examples=40)
@given(tiny_problems())
def test_the_best_plan_with_any_shares_is_between_the_bound_and_ours(problem: tuple[FloatArray, Fleet]) -> None:
    load, fleet = problem
    shelf = pack_anew(load, fleet)
    share_LRS = best_shares(load, shelf.logical_LRS, fleet)
    exact = exact_of_shares(load[0], fleet)
    worst = level_of_ranks(load, shelf.logical_LRS, share_LRS, fleet).max()
    assert is_ordered(bound_of_slots(load, fleet)[0], exact, worst)
