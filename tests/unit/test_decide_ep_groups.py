"""EP groups side by side, from the resource to the map and back after the load has changed."""

from typing import Any

import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.decide.accept import Accepted, Refusal, accept
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


@pytest.mark.parametrize("parallelism", [{"expert": 2, "data": 3}, {"expert": 3, "data": 2}])
def test_groups_are_neither_added_nor_resized(parallelism: dict[str, int]) -> None:
    before = {**service_spec(), "parallelism": TWO_GROUPS}
    [problem] = broken_changes(MoEServiceSpec, before, {**before, "parallelism": parallelism})
    assert problem.message.startswith("parallelism.data cannot be changed, nor parallelism.expert")


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
