"""MoEService in a simulated cluster: start, place, report, suspend."""

from dataclasses import replace

from moe_core.decide import decide
from moe_core.facts import BindPod, CreatePod, Taint
from simcluster import edit, gpu_nodes, running, service


def test_a_service_starts_and_says_so() -> None:
    sim = running()
    assert sim.wish.status["ranks"] == {"desired": 4, "allocated": 4, "available": 4, "active": 4}
    assert sim.condition("ExpertCoverage") == ("True", "FullCoverage")
    assert sim.condition("Degraded") == ("False", "Stable")
    assert sim.condition("Progressing") == ("False", "Stable")
    assert sim.wish.status["expertCoveragePercent"] == 100
    assert sim.wish.status["observedGeneration"] == 1


def test_a_gang_that_does_not_fit_stays_gated_and_says_what_is_missing() -> None:
    sim = service(nodes=3)
    sim.settle()
    assert sim.ever_bound == []
    assert [p.role for p in sim.pods] == ["rank"] * 4, "neither coordinator nor gateway may hold room before"
    assert sim.condition("Placed") == ("False", "NoFit")
    assert sim.message("Placed").startswith("needs room for 4 ranks in the cluster; best is 3")
    sim.nodes = gpu_nodes(4)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_group_of_which_nothing_is_left_starts_again_all_or_none() -> None:
    sim = running(nodes=4)
    for rank in range(4):
        sim.kill(rank)
    sim.nodes = gpu_nodes(3)
    before = len(sim.ever_bound)
    for _ in range(20):
        sim.step()
        sim.tick(30)
    assert len(sim.ever_bound) == before
    assert sim.condition("Placed") == ("False", "NoFit")
    sim.nodes = gpu_nodes(4)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")


def test_a_gang_that_was_half_started_gives_its_room_back_when_the_rest_finds_none() -> None:
    sim = service(nodes=4)
    sim.step()
    sim.step(crash_after=2)
    sim.nodes = gpu_nodes(2)
    assert len([p for p in sim.ranks() if p.node]) == 2
    sim.step()
    sim.now += 61
    sim.settle()
    assert [p for p in sim.ranks() if p.node] == []
    assert len(sim.ranks()) == 4
    sim.nodes = gpu_nodes(4)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


def test_all_ranks_are_bound_in_one_cycle_once_all_exist() -> None:
    sim = service()
    created = sim.step()
    assert sum(isinstance(a, CreatePod) and a.gated for a in created.actions) == 4
    assert not [a for a in created.actions if isinstance(a, BindPod)]
    bound = [a for a in sim.step().actions if isinstance(a, BindPod)]
    assert len(bound) == 4
    assert len({a.node for a in bound}) == 4


def test_what_holds_up_a_start_is_told() -> None:
    sim = service()
    sim.step()
    sim.step()
    sim.pods = [replace(p, message="ErrImagePull: no such image") if p.index == 2 else p for p in sim.pods]
    sim.step()
    assert sim.message("Ready") == (
        "0 of 4 ranks running, none active yet; tiny-svc-rank-2-1: ErrImagePull: no such image"
    )


def test_suspending_removes_every_pod_and_resuming_counts_no_restart() -> None:
    sim = running()
    edit(sim, suspend=True)
    sim.settle()
    assert sim.pods == []
    assert sim.condition("Ready") == ("False", "Suspended")
    sim.epoch, sim.members, sim.told = 0, {}, None
    edit(sim, suspend=False)
    sim.settle()
    assert sim.condition("Ready") == ("True", "AllActive")
    assert sim.wish.status["restarts"] == 0


def test_a_tainted_node_is_not_used_and_is_told() -> None:
    sim = service(nodes=4)
    sim.nodes = (*sim.nodes[:3], replace(sim.nodes[3], taints=(Taint("gpu", "reserved"),)))
    sim.settle()
    assert "taint gpu=reserved 1" in sim.message("Placed")


def test_a_group_whose_ranks_report_one_after_the_other_has_lost_nobody() -> None:
    sim = service()
    for _ in range(3):
        sim.step()
        sim.tick()
    state = sim.runtime()
    assert state is not None
    first = state.ranks[0].model_copy(update={"phase": "Active"})
    others = [r.model_copy(update={"phase": "Ready"}) for r in state.ranks[1:]]
    state = state.model_copy(update={"epoch": 1, "ranks": (first, *others)})
    decision = decide(sim.wish, replace(sim.facts(), runtime=state), sim.now)
    told = {c.type: (c.status, c.reason) for c in decision.conditions}
    assert told["Ready"] == ("False", "Forming")
    assert told["Degraded"][0] == "False"


def test_events_come_on_transitions_only() -> None:
    sim = running()
    sim.step()
    assert sim.step().events == ()
    sim.kill(1)
    reasons = [event.reason for event in sim.step().events]
    assert "RankReplaced" in reasons
    sim.step()
    assert "RankReplaced" not in [event.reason for event in sim.step().events]
