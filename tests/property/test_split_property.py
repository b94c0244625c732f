"""Shares of copies: against the exact optimum, which duality gives for small cases."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import pack
from moe_core.experts.shelf import Shelf
from moe_core.experts.split import (
    SHARE_PARTS,
    best_shares,
    even_shares,
    level_of_ranks,
    parts_on_ranks,
    rows_of_parts,
    shares_of,
    whole_parts,
)
from moe_core.outcome import InvalidInput
from planner_cases import copies_of, problems


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[FloatArray, Shelf]:
    """A load, and slots that were packed for another one."""
    load, fleet = draw(problems())
    order = draw(st.permutations(range(load.shape[1])))
    return load, pack(load[:, order], copies_of(load[:, order], fleet), fleet)


def worst_of(load: FloatArray, shelf: Shelf, share: FloatArray) -> FloatArray:
    return np.asarray(level_of_ranks(load, shelf.logical_LRS, share, shelf.fleet).max(1))


def least_possible(load: FloatArray, shelf: Shelf) -> list[float]:
    """Experts that have no other ranks than these cannot be carried by less: the tightest such set is the optimum."""
    found = []
    for load_E, slots_RS in zip(load, shelf.logical_LRS, strict=True):
        holds_ER = (slots_RS[None] == np.arange(len(load_E))[:, None, None]).any(2)
        sets = [list(some) for size in range(1, len(load_E) + 1) for some in combinations(range(len(load_E)), size)]
        found.append(max(load_E[some].sum() / shelf.fleet.speed_R[holds_ER[some].any(0)].sum() for some in sets))
    return found


@settings(max_examples=40)
@given(laid_out())
def test_no_split_is_more_even_than_the_best(case: tuple[FloatArray, Shelf]) -> None:
    load, shelf = case
    share = best_shares(load, shelf.logical_LRS, shelf.fleet, rounds=300)
    np.testing.assert_allclose(worst_of(load, shelf, share), least_possible(load, shelf), rtol=2e-3, atol=1e-9)


@given(laid_out(), st.integers(0, 5))
def test_a_split_divides_each_expert_and_is_never_worse_than_an_even_one(
    case: tuple[FloatArray, Shelf], rounds: int
) -> None:
    load, shelf = case
    share = best_shares(load, shelf.logical_LRS, shelf.fleet, rounds=rounds)
    assert (share >= 0).all()
    for layer, slots in enumerate(shelf.logical_LRS):
        held = np.bincount(slots.reshape(-1), share[layer].reshape(-1), minlength=shelf.num_experts + 2)
        np.testing.assert_allclose(held, [1.0] * shelf.num_experts + [0.0, 0.0], atol=1e-9)
    even = even_shares(shelf.logical_LRS, shelf.num_experts)
    assert (worst_of(load, shelf, share) <= worst_of(load, shelf, even) * (1 + 1e-9)).all()


@given(laid_out())
def test_whole_parts_are_near_the_shares_and_every_copy_has_one(case: tuple[FloatArray, Shelf]) -> None:
    load, shelf = case
    share = best_shares(load, shelf.logical_LRS, shelf.fleet)
    parts = whole_parts(share, shelf.logical_LRS, shelf.num_experts)
    is_filled = shelf.logical_LRS < shelf.num_experts
    assert (parts[is_filled] >= 1).all()
    assert not parts[~is_filled].any()
    rounded = shares_of(parts, shelf.logical_LRS, shelf.num_experts)
    most_copies = int(shelf.copies_LE.max())
    np.testing.assert_allclose(rounded, share, atol=(most_copies + 1) / SHARE_PARTS)


@given(laid_out())
def test_parts_come_back_from_a_maps_rows(case: tuple[FloatArray, Shelf]) -> None:
    load, shelf = case
    parts = whole_parts(best_shares(load, shelf.logical_LRS, shelf.fleet), shelf.logical_LRS, shelf.num_experts)
    rows = rows_of_parts(parts, shelf.fleet)
    np.testing.assert_array_equal(parts_on_ranks(rows, shelf.logical_LRS, shelf.fleet, load.shape[1]), parts)


@given(laid_out(), st.sampled_from([1e-3, 0.5, 1e4]))
def test_the_unit_of_the_load_does_not_matter(case: tuple[FloatArray, Shelf], unit: float) -> None:
    load, shelf = case
    plain, scaled = (best_shares(some, shelf.logical_LRS, shelf.fleet) for some in (load, load * unit))
    np.testing.assert_allclose(worst_of(load, shelf, plain), worst_of(load, shelf, scaled), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (((1, 1, 1),), "shares must have 1 layers of 4 slots, got 1 of \\[3\\]"),
        (((1, 1, -2, 1),), "shares must not be negative, got -2"),
    ],
)
def test_shares_of_another_shape_or_sign_are_refused(rows: tuple[tuple[int, ...], ...], said: str) -> None:
    fleet = Fleet((2, 2))
    with pytest.raises(InvalidInput, match=said):
        parts_on_ranks(rows, np.asarray([[[0, 1], [1, 2]]]), fleet, 3)
