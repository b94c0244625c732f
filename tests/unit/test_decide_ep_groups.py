"""EP groups side by side, from the resource to the map and back after the load has changed."""

from typing import Any

import numpy as np
import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.links import Links, LinkSpeed
from moe_core.decide.accept import Accepted, Refusal, accept
from moe_core.experts.measure import copies_of_logical, load_of_ranks
from moe_core.experts.tiers import first_group, side_by_side
from moe_core.experts.traffic import StepShape, picks_between
from moe_core.facts import Facts, Wish
from moe_core.preview.outlook import Outlook, look_ahead
from moe_core.spec.load import broken_changes
from moe_core.spec.service import MoEServiceSpec
from simcluster import Sim, edit, gpu_nodes, gpu_template, job_spec, make, service_spec

LAYERS, EXPERTS = 4, 16
SKEWED = tuple(tuple(4000 if expert in (3, 4) else 100 for expert in range(EXPERTS)) for _ in range(LAYERS))
TWO_GROUPS = {"expert": 2, "data": 2}


def accepted(kind: str, spec: dict[str, Any]) -> Accepted:
    found = accept(Wish(kind, "d", "tiny", "u", 1, spec), Facts())  # type: ignore[arg-type]
    assert isinstance(found, Accepted)
    return found


def in_groups(**more: Any) -> Sim:
    spec = {**service_spec(template=gpu_template(), **more), "parallelism": TWO_GROUPS}
    sim = make("MoEService", spec, gpu_nodes(6))
    sim.settle()
    return sim


def holds_all(expert_map: ExpertMap, group: range) -> bool:
    slots = [slot for rank in group for slot in expert_map.slot_range(rank)]
    return all({row[slot] for slot in slots} >= set(range(EXPERTS)) for row in expert_map.logical_of_slot)


@pytest.mark.parametrize(("kind", "spec"), [("MoEJob", job_spec), ("MoEService", service_spec)])
def test_every_group_of_a_job_or_service_holds_all_experts_and_the_pods_are_told(kind: str, spec: Any) -> None:
    found = accepted(kind, {**spec(), "parallelism": TWO_GROUPS})
    assert found.plan.num_ranks == found.plan.config.num_ranks == 4
    assert found.plan.config.dispatch.group_ranks == 2
    expert_map = found.plan.expert_map(4)
    assert holds_all(expert_map, range(2))
    assert holds_all(expert_map, range(2, 4))
    assert found.note.endswith("slots each, in 2 EP groups")
    assert found.plan.least_copies(4) == 2


def test_one_group_is_told_as_none() -> None:
    assert accepted("MoEJob", job_spec()).plan.config.dispatch.group_ranks == 0


def test_a_load_that_brings_another_map_leaves_every_group_all_experts() -> None:
    sim = in_groups()
    edit(sim, experts={"redundantPerRank": 2, "rebalance": {"maxMovedPercent": 100}})
    sim.settle()
    assert sim.told is not None
    before = sim.told.expert_map
    sim.now += 60
    sim.load, sim.load_window_s = SKEWED, 60.0
    sim.seconds_of_rank = {1: 9e-5}  # a slow rank does not take its group's layout apart
    sim.settle()
    after = sim.told.expert_map
    assert after.digest != before.digest
    assert holds_all(after, range(2))
    assert holds_all(after, range(2, 4))


def test_a_slow_rank_and_its_like_in_the_other_group_get_less_of_the_load() -> None:
    """Its group's tokens have nowhere else to go: what is spared it is spared both."""
    sim = in_groups()
    edit(sim, experts={"redundantPerRank": 6, "rebalance": {"maxMovedPercent": 100}})
    sim.settle()
    sim.now += 60
    sim.load, sim.load_window_s = ((500,) * EXPERTS,) * LAYERS, 60.0
    sim.seconds_of_rank = {1: 3e-5}
    sim.settle()
    assert sim.told is not None
    loads = load_of_ranks(sim.told.expert_map, sim.load).sum(0)
    assert loads[0] == loads[2] > 2 * loads[1]
    assert loads[1] == loads[3]
    assert sim.condition("Balanced") == ("True", "Rebalanced")
    assert "rank 1 is 0.25 times as fast as most" in sim.message("Balanced")


def test_slow_links_inside_a_group_keep_popular_experts_on_both_of_its_machines() -> None:
    """Two groups of four ranks, two on a machine; two experts get nearly all picks, and have one copy a group."""
    links = Links(
        scopes={
            "host": LinkSpeed(latency_us=50, bytes_per_s=5e9),
            "network": LinkSpeed(latency_us=200, bytes_per_s=2e7),
        }
    )
    crossing = {}
    for measured in (None, links):
        spec = {**service_spec(template=gpu_template(), redundant=2), "parallelism": {"expert": 4, "data": 2}}
        sim = make("MoEService", spec, gpu_nodes(4, gpus=2))
        edit(sim, experts={"redundantPerRank": 2, "rebalance": {"maxMovedPercent": 100}})
        sim.settle()
        nodes = [next(p.node for p in sim.pods if p.role == "rank" and p.index == r) or "" for r in range(8)]
        assert len(set(nodes)) == 4
        sim.now += 60
        sim.load, sim.load_window_s, sim.links, sim.pick_bytes = SKEWED, 60.0, measured, 4096
        sim.settle()
        assert sim.told is not None
        picks_LRR = picks_between(
            sim.told.expert_map, SKEWED, StepShape(100, 8, 2, group_ranks=4), domain_of_rank=nodes
        )
        far = np.asarray([[a != b for b in nodes] for a in nodes])
        crossing[measured is not None] = float(picks_LRR.sum(0)[far].sum())
    assert crossing[True] < 0.8 * crossing[False]


def test_more_redundant_slots_are_filled_in_every_group() -> None:
    sim = in_groups()
    edit(sim, experts={"redundantPerRank": 4})
    sim.settle()
    assert sim.told is not None
    assert sim.told.expert_map.slots_of_rank == (12,) * 4
    assert holds_all(sim.told.expert_map, range(2))
    assert holds_all(sim.told.expert_map, range(2, 4))


def test_copies_that_are_promised_are_counted_over_all_groups() -> None:
    spec = {**service_spec(redundant=0), "parallelism": TWO_GROUPS}
    spec["experts"] = {"minCopies": 2}
    assert accepted("MoEService", spec).plan.least_copies(4) == 2
    spec["experts"] = {"minCopies": 3}
    assert isinstance(accept(Wish("MoEService", "d", "tiny", "u", 1, spec), Facts()), Refusal)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"expert": 2, "data": 2}, {"expert": 3, "data": 2}),
        ({"expert": 2, "data": 2}, {"expert": 2}),
        ({"expert": 2, "data": 2}, {"expert": 4}),
        ({"expert": 2}, {"expert": 2, "data": 2}),
    ],
)
def test_groups_are_not_resized_and_one_group_stays_one(before: dict[str, int], after: dict[str, int]) -> None:
    specs = [{**service_spec(), "parallelism": parallelism} for parallelism in (before, after)]
    [problem] = broken_changes(MoEServiceSpec, *specs)
    assert problem.message.startswith("parallelism.expert of several EP groups cannot be changed, nor parallelism.data")


def with_learned_map(num_groups: int) -> tuple[Sim, ExpertMap]:
    sim = in_groups()
    edit(
        sim,
        experts={"redundantPerRank": 2, "rebalance": {"maxMovedPercent": 100}},
        parallelism={"expert": 2, "data": num_groups},
    )
    sim.settle()
    sim.now += 60
    sim.load, sim.load_window_s = SKEWED, 60.0
    sim.settle()
    assert sim.told is not None and sim.told.expert_map.share_of_slot
    return sim, sim.told.expert_map


def test_a_group_more_gets_the_layout_of_the_others_and_moves_nothing_of_theirs() -> None:
    sim, before = with_learned_map(2)
    edit(sim, parallelism={"expert": 2, "data": 3})
    sim.step()
    assert sim.told is not None and sim.told.ranks == (0, 1, 2, 3)  # until every joiner is ready
    assert sim.told.expert_map == before
    sim.settle()
    after = sim.told.expert_map
    assert len(sim.told.ranks) == 6
    assert after == side_by_side(first_group(before, 2), 3).model_copy(update={"generation": after.generation})
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_group_less_leaves_the_others_as_they_were() -> None:
    sim, before = with_learned_map(3)
    edit(sim, parallelism={"expert": 2, "data": 2})
    sim.settle()
    assert sim.told is not None and sim.told.ranks == (0, 1, 2, 3)
    after = sim.told.expert_map
    assert after == first_group(before, 4).model_copy(update={"generation": after.generation})
    assert sorted(pod.index for pod in sim.pods if pod.role == "rank") == [0, 1, 2, 3]


def test_a_group_less_still_has_the_copies_that_were_promised() -> None:
    sim = in_groups()
    edit(sim, experts={"redundantPerRank": 8, "minCopies": 3}, parallelism={"expert": 2, "data": 3})
    sim.settle()
    edit(sim, experts={"redundantPerRank": 8, "minCopies": 3}, parallelism={"expert": 2, "data": 2})
    sim.settle()
    assert sim.told is not None and sim.told.expert_map.num_ranks == 4
    assert copies_of_logical(sim.told.expert_map).min() == 4  # two in each group


def test_a_service_of_groups_whose_new_size_is_refused_goes_on_as_it_ran() -> None:
    sim, before = with_learned_map(2)
    edit(sim, parallelism={"expert": 2, "data": 3}, experts={"redundantPerRank": 4096})
    sim.settle()
    assert sim.condition("Accepted") == ("False", "InvalidSpec")
    assert sim.told is not None and sim.told.expert_map == before
    assert sim.condition("Ready") == ("True", "AllActive")


def test_groups_on_their_own_nodes_send_nothing_between_nodes_where_one_group_does() -> None:
    from moe_core.preview.size import size_of_shape

    sent = []
    for parallelism in ({"expert": 4}, TWO_GROUPS):
        spec = {**job_spec(template=gpu_template()), "parallelism": parallelism}
        wish = Wish("MoEJob", "d", "tiny", "u", 1, spec)
        size = size_of_shape(accepted("MoEJob", spec).spec.model.shape)  # type: ignore[union-attr]
        found = look_ahead(wish, Facts(nodes=gpu_nodes(2, gpus=2)), size=size)
        assert isinstance(found, Outlook)
        sent.append(found.bytes_by_scope["across"])
    assert sent[1] < 0.001 * sent[0]  # the exchange of counts stays
