"""A new plan's rows are dealt to ranks so that few experts move."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_core.experts.align import align
from moe_core.experts.checks import IntArray
from moe_core.experts.fleet import Fleet


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[IntArray, IntArray, Fleet, int]:
    """Any slots of ranks some of which are alike, twice."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    slots = draw(st.lists(st.sampled_from([0, 2, 3, 3]), min_size=1, max_size=8).filter(any))
    domains = draw(st.one_of(st.just([]), st.lists(st.sampled_from("ab"), min_size=len(slots), max_size=len(slots))))
    fleet = Fleet(tuple(slots), domain_of_rank=tuple(domains))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    layouts = rng.integers(0, num_experts + 1, (2, num_layers, len(slots), max(slots)))
    layouts[:, :, np.arange(max(slots))[None, :] >= fleet.slots_R[:, None]] = num_experts + 1
    return layouts[0], layouts[1], fleet, num_experts


def one_pair_after_the_other(anew_RS: IntArray, start_RS: IntArray, fleet: Fleet, num_experts: int) -> IntArray:
    """The reference: of all pairs that are left, the one that shares most, then the lowest."""
    held, wanted = ([set(row[row < num_experts].tolist()) for row in rows] for rows in (start_RS, anew_RS))
    shares_domains = fleet.num_domains < fleet.num_ranks
    domains = fleet.domain_of_rank if shares_domains else ("",) * fleet.num_ranks
    alike = list(zip(domains, fleet.slots_of_rank, strict=True))
    ranks = range(fleet.num_ranks)
    pairs = [
        (-len(wanted[row] & held[rank]), row, rank) for row in ranks for rank in ranks if alike[row] == alike[rank]
    ]
    row_of: dict[int, int] = {}
    for _, row, rank in sorted(pairs):
        if row not in row_of.values() and rank not in row_of:
            row_of[rank] = row
    return anew_RS[[row_of[rank] for rank in ranks]]


@given(two_layouts())
def test_rows_go_where_most_is_held_already_one_pair_after_the_other(
    problem: tuple[IntArray, IntArray, Fleet, int],
) -> None:
    anew, start, fleet, num_experts = problem
    expected = [one_pair_after_the_other(a, s, fleet, num_experts) for a, s in zip(anew, start, strict=True)]
    assert align(anew, start, fleet, num_experts).tolist() == [rows.tolist() for rows in expected]


def test_a_fleet_of_more_ranks_than_are_looked_at_stays_where_it_is() -> None:
    fleet = Fleet((1,) * 1000)
    start = np.repeat([[0, 1]], 500, axis=0).reshape(1, 1000, 1)
    anew = np.sort(start, axis=1)
    assert (align(anew, start, fleet, 2) == start).mean() > 0.99
