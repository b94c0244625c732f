"""Picks that leave their failure domain: a plan's quick estimate against what the data plane's choice makes of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.align import slots_on_ranks
from moe_core.experts.checks import FloatArray
from moe_core.experts.crossing import between_domains, leaving, picks_across, picks_across_in_groups
from moe_core.experts.fleet import Fleet
from moe_core.experts.split import even_shares
from moe_core.experts.tiers import side_by_side
from moe_core.experts.traffic import StepShape, picks_between
from moe_core.outcome import InvalidInput

NUM_RANKS, NUM_EXPERTS = 8, 6


@st.composite
def maps(draw: st.DrawFn, num_ranks: int = NUM_RANKS) -> tuple[FloatArray, Fleet, ExpertMap]:
    """Experts with 1, 2, 4 or 8 copies on ranks in any domains: even parts of the sources are whole then."""
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in range(NUM_EXPERTS):
        hosts = draw(st.permutations(range(num_ranks)))[: draw(st.sampled_from([1, 2, 4, 8]))]
        for rank in hosts:
            held[rank].append(expert)
    domains = tuple(draw(st.lists(st.sampled_from("abc"), min_size=num_ranks, max_size=num_ranks)))
    load = np.asarray([draw(st.lists(st.integers(1, 100), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS))], dtype=float)
    rows = tuple(logical for row in held for logical in (*row, *([-1] * (NUM_EXPERTS - len(row)))))
    fleet = Fleet((NUM_EXPERTS,) * num_ranks, domain_of_rank=domains)
    return (
        load,
        fleet,
        ExpertMap(
            generation=0, num_logical_experts=NUM_EXPERTS, slots_of_rank=fleet.slots_of_rank, logical_of_slot=(rows,)
        ),
    )


@given(maps())
def test_the_estimate_is_what_the_choice_of_every_source_adds_up_to(case: tuple[FloatArray, Fleet, ExpertMap]) -> None:
    load, fleet, expert_map = case
    shape = StepShape(tokens_per_rank=1, hidden_size=1, top_k=1)
    picks_RR = picks_between(expert_map, load, shape, domain_of_rank=fleet.domain_of_rank)[0]
    exact_GG = np.zeros((fleet.num_domains, fleet.num_domains))
    np.add.at(exact_GG, (fleet.domain_R[:, None], fleet.domain_R[None, :]), picks_RR)
    slots = slots_on_ranks(expert_map.logical_of_slot, fleet, num_experts=NUM_EXPERTS)
    estimate_LGG = picks_across(load, slots, even_shares(slots, NUM_EXPERTS), fleet)
    crossing = (exact_GG.sum() - np.trace(exact_GG)) / exact_GG.sum()
    assert leaving(estimate_LGG) / load.sum() == pytest.approx(crossing)


@given(maps(num_ranks=4), st.integers(2, 3), st.data())
def test_of_ep_groups_only_what_each_sends_inside_counts(
    case: tuple[FloatArray, Fleet, ExpertMap], num_groups: int, data: st.DataObject
) -> None:
    load, group, group_map = case
    expert_map = side_by_side(group_map, num_groups)
    num_ranks = expert_map.num_ranks
    domains = data.draw(st.lists(st.sampled_from("abc"), min_size=num_ranks, max_size=num_ranks))
    fleet = Fleet(expert_map.slots_of_rank, domain_of_rank=tuple(domains))
    shape = StepShape(tokens_per_rank=1, hidden_size=1, top_k=1, group_ranks=group.num_ranks)
    picks_RR = picks_between(expert_map, load, shape, domain_of_rank=domains)[0]
    exact_GG = np.zeros((fleet.num_domains, fleet.num_domains))
    np.add.at(exact_GG, (fleet.domain_R[:, None], fleet.domain_R[None, :]), picks_RR)
    slots = slots_on_ranks(expert_map.logical_of_slot, fleet, num_experts=NUM_EXPERTS)
    estimate_LGG = picks_across_in_groups(load, slots, even_shares(slots, NUM_EXPERTS), fleet, group.num_ranks)
    np.testing.assert_allclose(estimate_LGG.sum(), load.sum())
    crossing = (exact_GG.sum() - np.trace(exact_GG)) / exact_GG.sum()
    assert leaving(estimate_LGG) / load.sum() == pytest.approx(crossing)


def test_an_expert_that_one_domain_asks_for_costs_nothing_there() -> None:
    fleet = Fleet.even(4, 4, num_domains=2)
    slots = np.asarray([[[0], [1], [2], [3]]])
    load, source = np.ones((1, 4)), np.zeros((1, 4, 2))
    source[0, :2, 0] = source[0, 2:, 1] = 1
    assert leaving(picks_across(load, slots, even_shares(slots, 4), fleet, source)) == 0
    assert leaving(picks_across(load, slots, even_shares(slots, 4), fleet)) == 2


def test_a_cost_between_ranks_is_meant_over_their_domains() -> None:
    fleet = Fleet((1, 1, 1, 0), domain_of_rank=("a", "a", "b", "b"))
    cost = np.asarray([[0, 2, 5, 99], [2, 0, 7, 99], [1, 3, 0, 99], [99, 99, 99, 99]], dtype=float)
    np.testing.assert_allclose(between_domains(cost, fleet), [[1, 6], [2, 0]])


def test_links_of_another_shape_or_below_nothing_are_refused() -> None:
    fleet = Fleet((1, 1))
    with pytest.raises(InvalidInput, match=r"links must have the shape \[2, 2\], got \[1, 2\]"):
        between_domains(np.zeros((1, 2)), fleet)
    with pytest.raises(InvalidInput, match=r"links\[0\]\[1\] must be finite and not negative, got -1.0"):
        between_domains(np.asarray([[0.0, -1.0], [0.0, 0.0]]), fleet)
