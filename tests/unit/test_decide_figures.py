"""Figures of the running group in the status: where steps' time goes, links, what fewer bits lose."""

import json
from dataclasses import replace

import pytest

from moe_core.contract.exchange import RankState, RuntimeState
from moe_core.contract.links import Links, LinkSpeed
from moe_core.contract.step_time import StepTime
from moe_core.decide.measured import Measured
from moe_core.decide.memory import Memory
from moe_core.decide.report import Counts, status_of
from moe_core.facts import Wish
from moe_core.outcome import InvalidInput

WISH = Wish("MoEJob", "d", "tiny", "u", 1, {})


def test_a_person_reads_who_is_waited_for_and_how_fast_the_links_are() -> None:
    runtime = RuntimeState(
        version=1,
        step_time=StepTime(steps=4, compute_us=500, exchange_us=100, waited_us={3: 400}),
        wire_error={"dispatch": 0.025},
        links=Links(scopes={"network": LinkSpeed(latency_us=80, bytes_per_s=1.25e9)}),
    )
    status = status_of(WISH, Memory(), Counts(4, 4, 4, 4), runtime=runtime)
    assert status["steps"] == {
        "computePercent": 50,
        "exchangePercent": 10,
        "waitPercent": 40,
        "mostWaitedForRank": 3,
    }
    assert status["links"] == {"network": {"latencyMicroseconds": 80, "bytesPerSecond": 1250000000}}
    assert status["wireError"] == {"dispatch": 0.025}


def test_a_status_tells_how_long_a_pick_takes_and_which_ranks_are_not_like_most() -> None:
    states = tuple(
        RankState(rank=rank, pod_uid=f"u{rank}", phase=phase, seconds_per_pick=seconds)
        for rank, (phase, seconds) in enumerate(
            [("Active", 1e-6), ("Active", 1.1e-6), ("Active", 4e-6), ("Active", 1e-6), ("Failed", 9e-6)]
        )
    )
    runtime = RuntimeState(version=1, ranks=states, seconds_per_pick=1.23456e-6)
    status = status_of(WISH, Memory(), Counts(4, 4, 4, 4), runtime=runtime)
    assert status["pace"] == {"nanosecondsPerPick": 1230.0, "ranksPercent": {"2": 25}}
    assert status_of(replace(WISH, status=status), Memory(), Counts(4, 4, 4, 4))["pace"] == status["pace"]


def test_what_a_status_tells_of_measurements_is_read_back_as_it_was_meant() -> None:
    runtime = RuntimeState(
        version=1,
        ranks=(
            RankState(rank=0, pod_uid="a", phase="Active", seconds_per_pick=1e-6),
            RankState(rank=1, pod_uid="b", phase="Active", seconds_per_pick=1e-6),
            RankState(rank=2, pod_uid="c", phase="Active", seconds_per_pick=2e-6),
        ),
        seconds_per_pick=1.5e-6,
        links=Links(scopes={"network": LinkSpeed(latency_us=80, bytes_per_s=1.25e9)}),
    )
    status = status_of(WISH, Memory(), Counts(3, 3, 3, 3), runtime=runtime)
    read = Measured.of_status(json.loads(json.dumps(status)))
    assert read == Measured.of_runtime(runtime)
    assert read.speeds(4) == (1.0, 1.0, 0.5, 1.0)
    assert read.between() == runtime.links
    assert read.seconds_per_pick == pytest.approx(1.5e-6)


@pytest.mark.parametrize("seconds", [1e-320, 1e308])
def test_any_number_that_a_pod_may_tell_makes_a_status(seconds: float) -> None:
    first = RankState(rank=0, pod_uid="a", phase="Active", seconds_per_pick=seconds)
    states = (first, RankState(rank=1, pod_uid="b", phase="Active", seconds_per_pick=1.0))
    links = Links(scopes={"network": LinkSpeed(latency_us=0, bytes_per_s=0.1)})
    runtime = RuntimeState(version=1, ranks=states, seconds_per_pick=seconds, links=links)
    status = status_of(WISH, Memory(), Counts(2, 2, 2, 2), runtime=runtime)
    assert Measured.of_status(json.loads(json.dumps(status))).pace is not None


def test_a_status_that_nobody_of_us_wrote_is_refused_by_field_and_value() -> None:
    with pytest.raises(InvalidInput, match=r"status: Measured.links.network.bytesPerSecond: .* \(got 'fast'\)"):
        Measured.of_status({"links": {"network": {"latencyMicroseconds": 1, "bytesPerSecond": "fast"}}})


def test_without_steps_and_measurements_the_status_says_nothing_of_them() -> None:
    status = status_of(WISH, Memory(), Counts(4, 4, 4, 4), runtime=RuntimeState(version=1))
    assert not {"steps", "links", "pace", "wireError"} & set(status)
