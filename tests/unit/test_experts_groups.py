"""Ranks that hold the same experts in groups go on doing so when the load changes and when ranks come or go."""

import numpy as np
import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.align import arrivals, slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.carry import carry_over
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import mirrors, pack_groups, replan_groups
from moe_core.experts.measure import balance, copies_of_logical
from moe_core.experts.replan import Prices, Rows, replan
from moe_core.experts.survival import survival

LAYERS, EXPERTS = 3, 16
FLEET = Fleet((6,) * 8, domain_of_rank=("a", "a", "b", "b", "c", "c", "d", "d"))
PRICES = Prices(seconds_per_pick=1e-3, bytes_per_expert=1000)


def skewed(seed: int = 0) -> FloatArray:
    ranks = np.tile(1000.0 / np.arange(1, EXPERTS + 1), (LAYERS, 1))
    return np.asarray(np.random.default_rng(seed).permuted(ranks, axis=1))


def in_groups() -> Rows:
    return pack_groups(np.ones((LAYERS, EXPERTS)), FLEET, least_copies=2).rows()


def as_map(rows: Rows, shares: Rows = (), slots: tuple[int, ...] = FLEET.slots_of_rank) -> ExpertMap:
    return ExpertMap(
        generation=0,
        num_logical_experts=EXPERTS,
        slots_of_rank=slots,
        logical_of_slot=rows,
        share_of_slot=shares,
    )


def test_a_new_load_moves_groups_and_costs_no_chance_to_survive() -> None:
    before, load_LE = as_map(in_groups()), skewed()
    found = replan_groups(load_LE, FLEET, before.logical_of_slot, prices=PRICES, least_copies=2)
    after = as_map(found.logical_of_slot, found.share_of_slot)
    assert balance(after, load_LE).balancedness > balance(before, load_LE).balancedness + 0.1
    for failures in (1, 2, 3):
        assert survival(after, failures=failures).chance >= survival(before, failures=failures).chance
    scattered = as_map(replan(load_LE, FLEET, before.logical_of_slot, prices=PRICES, least_copies=2).logical_of_slot)
    assert survival(scattered, failures=2).chance < survival(after, failures=2).chance


def test_predictions_are_what_the_map_measures_and_moves_what_ranks_are_sent() -> None:
    load_LE, rows = skewed(1), in_groups()
    found = replan_groups(load_LE, FLEET, rows, prices=PRICES, least_copies=2)
    mean_L = load_LE.sum(1) / FLEET.num_ranks
    for worst, expert_map in (
        (found.worst_before, as_map(rows)),
        (found.worst_after, as_map(found.logical_of_slot, found.share_of_slot)),
    ):
        assert float((mean_L / np.asarray(worst)).mean()) == pytest.approx(balance(expert_map, load_LE).balancedness)
    start, end = (slots_on_ranks(r, FLEET, num_experts=EXPERTS) for r in (rows, found.logical_of_slot))
    assert found.moves == arrivals(start, end, EXPERTS).sum() > 0
    assert found.reason.startswith(f"{found.moves} moves cost")


def test_a_budget_counts_what_every_member_is_sent() -> None:
    found = replan_groups(
        skewed(), FLEET, in_groups(), prices=Prices(seconds_per_pick=1e-3, bytes_per_expert=1000, most_moves=5)
    )
    assert 0 < found.moves <= 5


def test_without_groups_it_is_the_plan_that_moves_single_copies() -> None:
    load_LE = skewed()
    rows = pack_anew(load_LE, Fleet((3,) * 8)).rows()
    args = (load_LE[::-1].copy(), Fleet((3,) * 8), rows)
    assert replan_groups(*args, prices=PRICES) == replan(*args, prices=PRICES)


def test_ranks_that_come_or_go_leave_groups_and_keep_what_they_hold_as_far_as_they_can() -> None:
    before = as_map(in_groups())
    fewer = Fleet((8,) * 6, domain_of_rank=FLEET.domain_of_rank[:6])
    rows = carry_over(before, np.ones((LAYERS, EXPERTS)), fewer, least_copies=2)
    logical_LRS = slots_on_ranks(rows, fewer, num_experts=EXPERTS)
    assert mirrors(logical_LRS, fewer) is not None
    assert copies_of_logical(as_map(rows, slots=fewer.slots_of_rank)).min() >= 2
    held = [set(before.table_LS[0, 6 * rank : 6 * rank + 6].tolist()) for rank in range(6)]
    kept = sum(len(held[rank] & set(rows[0][8 * rank : 8 * rank + 8])) for rank in range(6))
    unaligned = pack_groups(np.ones((LAYERS, EXPERTS)), fewer, least_copies=2).rows()
    assert kept >= sum(len(held[rank] & set(unaligned[0][8 * rank : 8 * rank + 8])) for rank in range(6))


def test_where_no_domains_are_known_neighbours_are_in_no_group() -> None:
    rows = pack_groups(np.ones((1, EXPERTS)), Fleet((4,) * 8), least_copies=2).rows()
    groups = mirrors(slots_on_ranks(rows, Fleet((4,) * 8), num_experts=EXPERTS), Fleet((4,) * 8))
    assert groups is not None
    assert all(abs(int(a) - int(b)) > 1 for a, b in groups)
