"""The status of an ExpertMap says what the ranks follow, what it covers and how evenly the load falls."""

from moe_core.facts import ReportMap
from simcluster import Sim, edit, gpu_nodes, gpu_template, job_spec, make, service_spec


def running(kind: str = "MoEService", ranks: int = 4) -> Sim:
    spec = service_spec if kind == "MoEService" else job_spec
    sim = make(kind, spec(ranks, template=gpu_template()), gpu_nodes(6))
    sim.settle()
    return sim


def reports(sim: Sim) -> list[ReportMap]:
    return [action for action in sim.step().actions if isinstance(action, ReportMap)]


def test_a_formed_group_tells_digest_epoch_and_coverage_once() -> None:
    for kind, name in (("MoEService", "tiny-svc-map"), ("MoEJob", "tiny-job-map")):
        sim = running(kind)
        assert sim.told is not None
        status = sim.map_status[name]
        assert status["appliedDigest"] == sim.told.expert_map.digest
        assert status["epoch"] == sim.epoch
        assert (status["coveredExperts"], status["totalExperts"], status["coveragePercent"]) == (64, 64, 100)
        assert reports(sim) == []


def test_before_a_group_has_formed_nothing_is_reported() -> None:
    sim = make("MoEService", service_spec(template=gpu_template()), gpu_nodes(3))
    sim.settle()
    assert sim.map_status == {}


def test_a_lost_rank_shows_in_epoch_and_coverage() -> None:
    sim = make("MoEService", service_spec(4, redundant=0, template=gpu_template()), gpu_nodes(6))
    sim.settle()
    epoch = sim.map_status["tiny-svc-map"]["epoch"]
    sim.kill(1)
    sim.tick()
    sim.step()
    status = sim.map_status["tiny-svc-map"]
    assert status["epoch"] > epoch
    assert (status["coveredExperts"], status["coveragePercent"]) == (48, 75)


def test_the_map_that_is_not_yet_in_force_is_not_called_applied() -> None:
    sim = running()
    before = sim.map_status["tiny-svc-map"]["appliedDigest"]
    edit(sim, parallelism={"expert": 3})
    sim.step()
    assert sim.map_status["tiny-svc-map"]["appliedDigest"] == before
    sim.settle()
    assert sim.told is not None
    assert sim.map_status["tiny-svc-map"]["appliedDigest"] == sim.told.expert_map.digest != before


def test_a_silent_coordinator_leaves_the_status_as_it_was() -> None:
    sim = running()
    before = dict(sim.map_status)
    sim.pods = [pod for pod in sim.pods if pod.role != "coordinator"]
    assert reports(sim) == []
    assert sim.map_status == before


def test_measured_balance_is_written_once_a_minute_and_only_with_new_load() -> None:
    sim = running()
    sim.load = tuple((10,) * 16 for _ in range(4))
    [first] = reports(sim)
    even = first.status["balancednessPercent"]
    assert first.status["measuredTokens"] == 640 and 0 < even <= 100
    sim.load = tuple((1000, *(1,) * 15) for _ in range(4))
    assert reports(sim) == []
    sim.now += 61
    [second] = reports(sim)
    assert second.status["balancednessPercent"] < even
    assert second.status["balancednessMinPercent"] <= second.status["balancednessPercent"]
    sim.now += 61
    assert reports(sim) == []


def test_a_load_of_another_shape_is_not_measured() -> None:
    sim = running()
    sim.load = ((1, 2, 3),)
    assert reports(sim) == []
