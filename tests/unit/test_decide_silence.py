"""A rank that runs and says nothing is replaced, but only where it is the exception."""

from moe_core.decide.silence import NEVER_HEARD_S, SILENT_S
from moe_core.facts import DeletePod
from simcluster import Sim, gpu_nodes, gpu_template, job_spec, make, service_spec


def running(kind: str = "MoEService") -> Sim:
    spec = service_spec if kind == "MoEService" else job_spec
    sim = make(kind, spec(4, template=gpu_template()), gpu_nodes(6))
    sim.settle()
    return sim


def hush(sim: Sim, *ranks: int) -> set[str]:
    uids = {sim.members[rank] for rank in ranks}
    sim.mute |= uids
    sim.tick()
    sim.step()
    return uids


def deleted(sim: Sim) -> set[str]:
    return {action.uid for action in sim.step().actions if isinstance(action, DeletePod)}


def test_a_rank_that_is_stopped_with_its_guard_is_replaced_after_a_minute() -> None:
    for kind in ("MoEService", "MoEJob"):
        sim = running(kind)
        gone = hush(sim, 2)
        assert sim.condition("Ready") == ("False", "RankLost")
        sim.now += SILENT_S - 5
        assert deleted(sim) == set()
        sim.now += 10
        decision = sim.step()
        assert {a.uid for a in decision.actions if isinstance(a, DeletePod)} == gone
        assert any("rank 2 lost (tiny-" in e.message and "no word from it for" in e.message for e in decision.events)
        sim.settle()
        assert sim.condition("Ready") == ("True", "AllActive")
        assert sim.wish.status["restarts"] == 1


def test_it_is_looked_at_again_in_time() -> None:
    sim = running()
    hush(sim, 2)
    wake_in = sim.step().wake_in
    assert wake_in is not None and wake_in <= SILENT_S


def test_more_than_half_of_the_ranks_are_never_taken_for_dead() -> None:
    sim = running()
    hush(sim, 0, 1, 3)
    sim.now += 10 * SILENT_S
    assert deleted(sim) == set()


def test_a_rank_that_is_heard_again_starts_anew() -> None:
    sim = running()
    hush(sim, 2)
    sim.now += SILENT_S - 5
    sim.mute.clear()
    sim.tick()
    sim.step()
    hush(sim, 2)
    sim.now += SILENT_S - 5
    assert deleted(sim) == set()


def test_while_no_coordinator_answers_nobody_is_missed() -> None:
    sim = running()
    hush(sim, 2)
    sim.pods = [pod for pod in sim.pods if pod.role != "coordinator"]
    sim.now += 2 * SILENT_S
    assert not deleted(sim) & sim.mute


def test_a_rank_that_is_still_starting_has_more_time_but_not_for_ever() -> None:
    sim = running()
    sim.kill(2)
    sim.step()
    [successor] = sim.live(2)
    sim.mute.add(successor.uid)
    for _ in range(3):
        sim.step()
        sim.tick()
    assert sim.live(2)[0].phase == "Running"
    for _ in range(5):
        sim.now += SILENT_S
        assert successor.uid not in deleted(sim)
    sim.now += NEVER_HEARD_S
    assert successor.uid in deleted(sim)
