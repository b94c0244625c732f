"""The expert map follows the counted load: once a window, in a quiet moment, when it pays; and stays otherwise."""

from collections.abc import Sequence

import numpy as np
import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.links import Links, LinkSpeed
from moe_core.experts.measure import balance, copies_of_logical, load_of_ranks
from moe_core.experts.survival import survival
from moe_core.experts.traffic import StepShape, picks_between
from moe_core.facts import ApplyObject, PutWish
from moe_core.manifests import map_slices
from simcluster import Sim, edit, gpu_nodes, gpu_template, make, running, service_spec

LAYERS, EXPERTS = 4, 16
SKEWED = tuple(tuple(4000 if expert in (3, 4) else 100 for expert in range(EXPERTS)) for _ in range(LAYERS))
EVEN = tuple((500,) * EXPERTS for _ in range(LAYERS))


def counted(sim: Sim, load: Sequence[Sequence[int]], seconds: float = 60.0) -> None:
    """A window has passed in which the ranks have counted this."""
    sim.now += seconds
    sim.load, sim.load_window_s = tuple(map(tuple, load)), 60.0


def told_map(sim: Sim) -> ExpertMap:
    assert sim.told is not None
    return sim.told.expert_map


def of_policy(**experts: object) -> Sim:
    sim = make("MoEService", service_spec(template=gpu_template()), gpu_nodes(6))
    edit(sim, experts={"redundantPerRank": 2, **experts})
    sim.settle()
    return sim


def test_a_skewed_load_brings_a_map_that_is_more_even() -> None:
    sim = running()
    before = told_map(sim)
    counted(sim, SKEWED)
    sim.settle()
    after = told_map(sim)
    assert balance(after, SKEWED).balancedness > balance(before, SKEWED).balancedness + 0.1
    assert sim.map_in_force is not None and sim.map_in_force.digest == after.digest
    assert sim.condition("Balanced") == ("True", "Rebalanced")
    assert "balancedness 0." in sim.message("Balanced") and "moves cost" in sim.message("Balanced")


def test_what_was_decided_is_not_decided_again() -> None:
    sim = of_policy(rebalance={"maxMovedPercent": 100})
    counted(sim, SKEWED)
    sim.settle()
    after = told_map(sim).digest
    for _ in range(3):
        counted(sim, SKEWED)
        sim.settle()
        assert told_map(sim).digest == after
    assert sim.condition("Balanced") == ("True", "Balanced")


def test_an_even_load_moves_nothing() -> None:
    sim = running()
    before = told_map(sim).digest
    counted(sim, EVEN)
    sim.settle()
    assert told_map(sim).digest == before


def test_between_windows_and_before_the_first_nothing_is_planned() -> None:
    sim = running()
    before = told_map(sim).digest
    sim.load, sim.load_window_s = SKEWED, 30.0
    sim.settle()
    assert told_map(sim).digest == before
    sim.load_window_s = 60.0
    sim.settle()
    first = told_map(sim).digest
    assert first != before
    counted(sim, SKEWED[::-1][:1] * LAYERS, seconds=1.0)
    sim.load = tuple(tuple(reversed(row)) for row in SKEWED)
    sim.step()
    assert told_map(sim).digest == first


def test_few_tokens_tell_nothing_and_the_condition_says_how_many_are_needed() -> None:
    sim = running()
    before = told_map(sim).digest
    counted(sim, [[1 if expert == 3 else 0 for expert in range(EXPERTS)]] * LAYERS)
    sim.settle()
    assert told_map(sim).digest == before
    assert sim.condition("Balanced") == ("Unknown", "Counting")
    assert sim.message("Balanced") == "4 picks in the last 60 s, 1024 are needed to tell popular experts"


def test_while_a_rank_is_missing_no_expert_moves() -> None:
    sim = running()
    before = told_map(sim).digest
    sim.kill(1)
    sim.tick()
    counted(sim, SKEWED)
    decision = sim.step()
    assert not any(isinstance(a, ApplyObject) and a.kind == "ExpertMap" for a in decision.actions)
    assert told_map(sim).digest == before


def test_an_operator_killed_between_map_and_wish_goes_on_with_the_map_it_has_written() -> None:
    sim = running()
    counted(sim, SKEWED)
    applied = next(
        index + 1
        for index, action in enumerate(sim.decision().actions)
        if isinstance(action, ApplyObject) and action.kind == "ExpertMap"
    )
    sim.step(crash_after=applied)
    written = sim.objects["ExpertMap", "tiny-svc-map"]
    sim.load = tuple(tuple(reversed(row)) for row in SKEWED)
    puts = [action for action in sim.step().actions if isinstance(action, PutWish)]
    assert len(puts) == 1 and sim.objects["ExpertMap", "tiny-svc-map"] == written
    assert puts[0].wish.expert_map.digest == sim.map_spec["tiny-svc-map"]["digest"]


def test_policy_linear_keeps_its_order_whatever_the_load() -> None:
    sim = of_policy(policy="Linear")
    before = told_map(sim).digest
    counted(sim, SKEWED)
    sim.settle()
    assert told_map(sim).digest == before
    assert sim.condition("Balanced") == ("Unknown", "LoadNotFollowed")


def test_a_budget_of_nothing_moves_nothing_and_the_condition_names_the_lever() -> None:
    sim = of_policy(rebalance={"maxMovedPercent": 0})
    held = [sorted(told_map(sim).logical_of_slot[0][slot] for slot in told_map(sim).slot_range(r)) for r in range(4)]
    counted(sim, SKEWED)
    sim.settle()
    now = [sorted(told_map(sim).logical_of_slot[0][slot] for slot in told_map(sim).slot_range(r)) for r in range(4)]
    assert now == held
    assert sim.condition("Balanced")[0] == "False"
    assert "maxMovedPercent" in sim.message("Balanced")


def test_promised_copies_are_kept_when_the_map_follows_the_load() -> None:
    sim = of_policy(redundantPerRank=4, minCopies=2, rebalance={"maxMovedPercent": 100})
    assert copies_of_logical(told_map(sim)).min() == 2
    counted(sim, SKEWED)
    sim.settle()
    assert copies_of_logical(told_map(sim)).min() == 2


def test_a_resize_keeps_what_ranks_hold_and_follows_the_load() -> None:
    sim = running()
    counted(sim, SKEWED)
    sim.settle()
    before = told_map(sim)
    edit(sim, parallelism={"expert": 3})
    sim.settle()
    after = told_map(sim)
    assert after.slots_of_rank == (8, 7, 7)
    kept = [
        len(
            {before.logical_of_slot[0][s] for s in before.slot_range(r)}
            & {after.logical_of_slot[0][s] for s in after.slot_range(r)}
        )
        for r in range(3)
    ]
    assert sum(kept) >= 9  # of 18 slots that the three ranks had
    assert balance(after, SKEWED).balancedness > 0.9


def test_a_map_is_written_once_while_ranks_are_awaited_that_more_copies_need() -> None:
    sim = make("MoEService", service_spec(template=gpu_template()), gpu_nodes(6))
    edit(sim, parallelism={"expert": 2}, experts={"redundantPerRank": 2})
    sim.settle()
    edit(sim, parallelism={"expert": 4}, experts={"redundantPerRank": 12, "minCopies": 4})
    generations = []
    for _ in range(3):
        sim.step()
        generations.append(sim.map_spec["tiny-svc-map"]["generation"])
    assert len(set(generations)) == 1
    sim.settle()
    assert copies_of_logical(told_map(sim)).min() == 4


def test_a_resize_does_not_follow_a_handful_of_tokens() -> None:
    maps = []
    for load in ((), [[3 if expert == 5 else 0 for expert in range(EXPERTS)]] * LAYERS):
        sim = running()
        sim.load, sim.load_window_s = tuple(map(tuple, load)), 10.0
        edit(sim, parallelism={"expert": 3})
        sim.settle()
        maps.append(told_map(sim).logical_of_slot)
    assert maps[0] == maps[1]


def test_a_map_that_somebody_has_deleted_or_edited_is_made_anew() -> None:
    for spoil in ("delete", "edit"):
        sim = running()
        counted(sim, SKEWED)
        sim.settle()
        if spoil == "delete":
            del sim.objects["ExpertMap", "tiny-svc-map"]
        else:
            spec = dict(sim.map_spec["tiny-svc-map"])
            sim.map_spec["tiny-svc-map"] = {**spec, "slotsOfRank": [6, 6, 6, 7]}
            sim.objects["ExpertMap", "tiny-svc-map"] = "edited by hand"
        sim.settle()
        assert sim.map_spec["tiny-svc-map"]["digest"] == told_map(sim).digest
        assert sim.condition("Ready") == ("True", "AllActive")


def test_objects_that_are_no_map_are_told_as_a_warning() -> None:
    sim = running()
    sim.map_spec["tiny-svc-map"] = {**sim.map_spec["tiny-svc-map"], "slotsOfRank": [6, 6, 6, 7]}
    sim.objects["ExpertMap", "tiny-svc-map"] = "edited by somebody"
    events = sim.step().events
    assert sim.condition("Balanced") == ("False", "MapUnreadable")
    assert "layer 0 has 24 slots, ranks own 25" in sim.message("Balanced")
    assert [event.type for event in events if event.reason == "MapUnreadable"] == ["Warning"]


def test_an_operator_killed_between_two_slices_of_a_map_goes_on_with_the_layers_of_both() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_slices, "MAX_SLICE_BYTES", 1)
        # five layers: what is rendered stays in a memo, and other tests have four
        spec = service_spec(template=gpu_template(), model={"path": "/model", "numExperts": 16, "numMoeLayers": 5})
        sim = make("MoEService", spec, gpu_nodes(6))
        edit(sim, experts={"redundantPerRank": 2, "rebalance": {"maxMovedPercent": 100}})
        sim.settle()
        before = told_map(sim)
        counted(sim, (*SKEWED, SKEWED[0]))
        actions = sim.decision().actions
        maps = [i for i, action in enumerate(actions) if isinstance(action, ApplyObject) and action.kind == "ExpertMap"]
        assert len(maps) == 5
        sim.step(crash_after=maps[1] + 1)
        written = [sim.map_spec[name]["layers"][0]["logicalOfSlot"] for name in sorted(sim.map_spec)]
        assert written[0] != list(before.logical_of_slot[0]) and written[4] == list(before.logical_of_slot[4])
        sim.step()
        assert sim.condition("Balanced") == ("False", "MapUnreadable")
        sim.tick()
        assert [list(row) for row in told_map(sim).logical_of_slot] == written
        sim.load_window_s = 0.0
        sim.settle()
        assert sim.map_in_force is not None and sim.map_in_force.digest == told_map(sim).digest


def test_a_service_that_nobody_asks_keeps_its_status() -> None:
    sim = running()
    counted(sim, ())
    sim.settle()
    before = sim.wish.status
    for _ in range(3):
        counted(sim, ())
        sim.settle()
    assert sim.condition("Balanced") == ("Unknown", "Counting")
    assert sim.wish.status == before


def test_a_map_edited_under_the_digest_of_what_was_applied_is_written_again() -> None:
    sim = running()
    good = sim.map_spec["tiny-svc-map"]
    sim.map_spec["tiny-svc-map"] = {**good, "slotsOfRank": [6, 6, 6, 7]}
    sim.settle()
    assert sim.map_spec["tiny-svc-map"] == good
    counted(sim, SKEWED)
    sim.settle()
    assert sim.condition("Balanced") == ("True", "Rebalanced")


def test_a_clock_that_was_set_back_holds_no_decision_up() -> None:
    sim = of_policy(rebalance={"maxMovedPercent": 100})
    counted(sim, SKEWED)
    sim.settle()
    before = told_map(sim).digest
    sim.now -= 86_400.0
    counted(sim, [row[::-1] for row in SKEWED])
    sim.settle()
    assert told_map(sim).digest != before


def test_another_window_reaches_the_coordinator() -> None:
    sim = running()
    edit(sim, experts={"redundantPerRank": 2, "rebalance": {"windowSeconds": 300}})
    sim.settle()
    assert sim.told is not None and sim.told.load_window_s == 300


def test_what_saves_less_than_a_change_costs_or_may_be_one_windows_luck_changes_no_map() -> None:
    sim = of_policy(rebalance={"maxMovedPercent": 100})
    counted(sim, SKEWED)
    sim.settle()
    after = told_map(sim).digest
    luck = [
        [count + (19 if (expert + layer) % 3 else -19) for expert, count in enumerate(row)]
        for layer, row in enumerate(SKEWED)
    ]
    counted(sim, luck)
    sim.settle()
    assert told_map(sim).digest == after
    assert "taking it up costs 0.1 s" in sim.message("Balanced")
    sim.seconds_per_pick = 1e-3
    counted(sim, luck)
    sim.settle()
    assert told_map(sim).digest == after
    assert "may be chance" in sim.message("Balanced")


def test_two_promised_copies_stay_on_groups_of_ranks_and_survive_as_well_as_before() -> None:
    sim = of_policy(redundantPerRank=6, minCopies=2, rebalance={"maxMovedPercent": 100})
    before = survival(told_map(sim), failures=2).chance
    assert before == pytest.approx(4 / 6)  # two pairs of four ranks
    for load in (SKEWED, tuple(tuple(reversed(row)) for row in SKEWED)):
        counted(sim, load)
        sim.settle()
        assert balance(told_map(sim), load).balancedness > 0.95
        assert survival(told_map(sim), failures=2).chance == before


def test_a_rank_that_was_measured_to_be_slow_gets_less_of_the_load() -> None:
    sim = of_policy(rebalance={"maxMovedPercent": 100})
    sim.seconds_of_rank = {2: 4e-5}
    counted(sim, EVEN)
    sim.settle()
    loads = load_of_ranks(told_map(sim), EVEN).sum(0)
    assert loads[2] < 0.6 * np.delete(loads, 2).mean()
    assert "rank 2 is 0.25 times as fast as most" in sim.message("Balanced")


def test_the_slower_of_two_ranks_that_hold_the_same_answers_less_and_both_go_on_holding_it() -> None:
    sim = of_policy(redundantPerRank=6, minCopies=2, rebalance={"maxMovedPercent": 100})
    before = survival(told_map(sim), failures=2).chance
    sim.seconds_of_rank = {2: 4e-5}
    counted(sim, EVEN)
    sim.settle()
    loads = load_of_ranks(told_map(sim), EVEN).sum(0)
    assert loads[2] < 0.4 * np.delete(loads, 2).mean()
    assert survival(told_map(sim), failures=2).chance == before
    assert sim.condition("Balanced") == ("True", "Rebalanced")
    assert "rank 2 is 0.25 times as fast as most" in sim.message("Balanced")
    after = told_map(sim).digest
    counted(sim, EVEN)
    sim.settle()
    assert told_map(sim).digest == after


def test_ranks_that_differ_by_less_than_they_do_anyway_count_as_equal() -> None:
    sim = running()
    before = told_map(sim).digest
    sim.seconds_of_rank = {2: 1.3e-5}
    counted(sim, EVEN)
    sim.settle()
    assert told_map(sim).digest == before


SLOW_NETWORK = Links(
    scopes={
        "host": LinkSpeed(latency_us=50, bytes_per_s=5e9),
        "network": LinkSpeed(latency_us=200, bytes_per_s=2e7),
    }
)


def test_links_that_were_measured_to_be_slow_keep_popular_experts_on_both_machines() -> None:
    """Two ranks a node; two experts get nearly all picks, and have one copy each."""
    sim = make("MoEService", service_spec(template=gpu_template()), gpu_nodes(2, gpus=2))
    edit(sim, experts={"redundantPerRank": 2, "rebalance": {"maxMovedPercent": 100}})
    sim.settle()
    nodes = [next(p.node for p in sim.pods if p.role == "rank" and p.index == rank) or "" for rank in range(4)]
    assert len(set(nodes)) == 2
    crossing = {}
    for links in (None, SLOW_NETWORK):
        sim.links, sim.pick_bytes = links, 4096
        counted(sim, SKEWED)
        sim.settle()
        picks_LRR = picks_between(told_map(sim), SKEWED, StepShape(100, 8, 2), domain_of_rank=nodes)
        far = np.asarray([[a != b for b in nodes] for a in nodes])
        crossing[links is not None] = float(picks_LRR.sum(0)[far].sum())
    assert crossing[True] < 0.8 * crossing[False]
