"""Loads and ranks of any shape, drawn for the planner's property tests."""

import numpy as np
from hypothesis import strategies as st

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.counts import count_copies
from moe_core.experts.fleet import Fleet


@st.composite
def fleets(draw: st.DrawFn, *, num_experts: int) -> Fleet:
    """Any ranks that can hold every expert: some without slots, of unlike speed, in unlike domains."""
    slots = draw(st.lists(st.integers(0, 7), min_size=1, max_size=9))
    while sum(min(s, num_experts) for s in slots) < num_experts:
        slots.append(draw(st.integers(1, 7)))
    speeds = draw(
        st.one_of(st.just([]), st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(slots), max_size=len(slots)))
    )
    domains = draw(st.one_of(st.just([]), st.lists(st.sampled_from("abcd"), min_size=len(slots), max_size=len(slots))))
    return Fleet(tuple(slots), tuple(speeds), tuple(domains))


@st.composite
def problems(draw: st.DrawFn) -> tuple[FloatArray, Fleet]:
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    load = draw(
        st.lists(
            st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts),
            min_size=num_layers,
            max_size=num_layers,
        )
    )
    return np.asarray(load, dtype=np.float64), draw(fleets(num_experts=num_experts))


def copies_of(load: FloatArray, fleet: Fleet) -> IntArray:
    return count_copies(load, fleet.room_for(load.shape[1]), most=fleet.ranks_with_slots)
