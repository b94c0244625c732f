"""Replanning teams of ranks that hold the same: what holds for any load, speeds, domains, links and EP groups."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.align import arrivals, slots_on_ranks
from moe_core.experts.bounds import bound_of_slots
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import mirrors, pack_groups, replan_groups
from moe_core.experts.measure import load_of_ranks
from moe_core.experts.replan import Prices, Replan, Rows
from moe_core.experts.tiers import side_by_side

Value = TypeVar("Value")


@dataclass(frozen=True)
class Scene:
    load_LE: FloatArray
    fleet: Fleet
    before: ExpertMap
    group_ranks: int
    least: int
    links_RR: FloatArray | None
    prices: Prices

    def replan(self) -> Replan:
        return replan_groups(
            self.load_LE,
            self.fleet,
            self.before.logical_of_slot,
            prices=self.prices,
            current_shares=self.before.share_of_slot,
            least_copies=self.least,
            links_RR=self.links_RR,
            group_ranks=self.group_ranks,
        )

    def as_map(self, rows: Rows, shares: Rows) -> ExpertMap:
        return ExpertMap(
            generation=0,
            num_logical_experts=self.before.num_logical_experts,
            slots_of_rank=self.fleet.slots_of_rank,
            logical_of_slot=rows,
            share_of_slot=shares,
        )

    def worst_of(self, expert_map: ExpertMap) -> FloatArray:
        return np.asarray((load_of_ranks(expert_map, self.load_LE) / self.fleet.speed_R).max(1))


@st.composite
def scenes(draw: st.DrawFn, links: bool | None = None) -> Scene:
    """One EP group of pairs, or several EP groups with one or two copies of an expert each; made for another load."""
    num_experts, num_groups = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    copies = draw(st.integers(1, 2)) if num_groups > 1 else 2
    in_group = draw(st.sampled_from([2, 4]))
    slots = -(-num_experts * copies // in_group) + draw(st.integers(0, 2))
    rows = st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts)
    old, new = (np.asarray([draw(rows) for _ in range(2)], dtype=np.float64) for _ in range(2))
    group = Fleet((slots,) * in_group)
    held = pack_groups(old, group, least_copies=copies).rows()
    before = side_by_side(
        ExpertMap(
            generation=0,
            num_logical_experts=num_experts,
            slots_of_rank=group.slots_of_rank,
            logical_of_slot=held,
        ),
        num_groups,
    )
    num_ranks = in_group * num_groups

    def of_ranks(values: list[Value]) -> st.SearchStrategy[list[Value]]:
        return st.lists(st.sampled_from(values), min_size=num_ranks, max_size=num_ranks)

    speeds = draw(st.just([]) | of_ranks([0.25, 1.0, 1.0, 2.0]))
    domains = draw(st.just([]) | of_ranks(["a", "b", "c"]))
    cost = of_ranks([0.0, 1e-9, 1e-6])
    has_links = draw(st.booleans()) if links is None else links
    return Scene(
        new,
        Fleet(before.slots_of_rank, tuple(speeds), tuple(domains)),
        before,
        in_group if num_groups > 1 else 0,
        copies * num_groups,
        np.asarray([draw(cost) for _ in range(num_ranks)]) if has_links else None,
        Prices(
            bytes_per_expert=draw(st.sampled_from([0, 1000])),
            most_moves=draw(st.none() | st.integers(0, 12)),
            bytes_per_pick=100,
        ),
    )


@settings(max_examples=60)
@given(scenes())
def test_every_ep_group_holds_all_experts_and_teams_stay_teams(scene: Scene) -> None:
    start = slots_on_ranks(scene.before.logical_of_slot, scene.fleet, num_experts=scene.before.num_logical_experts)
    assume(mirrors(start, scene.fleet) is not None)
    found = scene.replan()
    end = slots_on_ranks(found.logical_of_slot, scene.fleet, num_experts=scene.before.num_logical_experts)
    assert mirrors(end, scene.fleet) is not None
    size = scene.group_ranks or scene.fleet.num_ranks
    for row in scene.as_map(found.logical_of_slot, found.share_of_slot).logical_of_slot:
        for first in range(0, scene.fleet.num_ranks, size):
            slots = [s for rank in range(first, first + size) for s in scene.before.slot_range(rank)]
            assert {row[s] for s in slots} >= set(range(scene.before.num_logical_experts))


@settings(max_examples=60)
@given(scenes())
def test_what_is_predicted_of_teams_is_what_the_map_would_measure(scene: Scene) -> None:
    found = scene.replan()
    after = scene.as_map(found.logical_of_slot, found.share_of_slot)
    np.testing.assert_allclose(found.worst_before, scene.worst_of(scene.before), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.worst_after, scene.worst_of(after), rtol=1e-9, atol=1e-9)
    bound = bound_of_slots(scene.load_LE, scene.fleet, group_ranks=scene.group_ranks)
    assert (np.asarray(found.worst_after) >= bound * (1 - 1e-4)).all()  # a part is 1 of 27,720


@settings(max_examples=60)
@given(scenes())
def test_moves_of_teams_are_counted_for_every_member_and_pay(scene: Scene) -> None:
    found = scene.replan()
    num_experts = scene.before.num_logical_experts
    start, end = (
        slots_on_ranks(rows, scene.fleet, num_experts=num_experts)
        for rows in (scene.before.logical_of_slot, found.logical_of_slot)
    )
    assert found.moves == arrivals(start, end, num_experts).sum()
    assert scene.prices.most_moves is None or found.moves <= scene.prices.most_moves
    assert found.gain_s >= found.cost_s * (1 - 1e-3)
    assert found.gain_s > 0 or found.moves == 0


@settings(max_examples=60)
@given(scenes(links=False))
def test_where_no_links_are_weighed_no_layer_of_teams_is_slower_than_before(scene: Scene) -> None:
    found = scene.replan()
    assert (np.asarray(found.worst_after) <= np.asarray(found.worst_before) * (1 + 1e-4)).all()


@settings(max_examples=40)
@given(scenes())
def test_a_plan_for_teams_stays_where_it_has_come_to(scene: Scene) -> None:
    first = scene.replan()
    again = Scene(
        scene.load_LE,
        scene.fleet,
        scene.as_map(first.logical_of_slot, first.share_of_slot),
        scene.group_ranks,
        scene.least,
        scene.links_RR,
        scene.prices,
    ).replan()
    assert again.gain_s >= 0
    assert sum(again.worst_before) == sum(first.worst_after)
