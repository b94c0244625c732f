"""Packing what is chosen together: what holds for any load, any trace, any ranks and domains."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_core.experts.affinity import pack_together
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from planner_cases import copies_of, problems


@given(problems(), st.integers(0, 1000))
def test_every_copy_is_placed_and_no_rank_holds_two_of_one_expert(problem: tuple[FloatArray, Fleet], seed: int) -> None:
    load, fleet = problem
    num_layers, num_experts = load.shape
    half = np.random.default_rng(seed).integers(0, 50, (num_layers, num_experts, num_experts)).astype(np.float64)
    shelf = pack_together(load, copies_of(load, fleet), fleet, half + half.transpose(0, 2, 1))
    assert not shelf.repeats_LRS().any()
    for layer, row in enumerate(shelf.rows()):
        held = [logical for logical in row if logical >= 0]
        assert len(row) == fleet.num_slots
        assert np.bincount(held, minlength=num_experts).tolist() == shelf.copies_LE[layer].tolist()
        assert shelf.copies_LE[layer].min() >= 1
