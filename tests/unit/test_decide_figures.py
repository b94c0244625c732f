"""Figures of the running group in the status: where steps' time goes, links, what fewer bits lose."""

from moe_core.contract.exchange import RuntimeState
from moe_core.contract.links import Links, LinkSpeed
from moe_core.contract.step_time import StepTime
from moe_core.decide.memory import Memory
from moe_core.decide.report import Counts, status_of
from moe_core.facts import Wish

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


def test_without_steps_and_measurements_the_status_says_nothing_of_them() -> None:
    status = status_of(WISH, Memory(), Counts(4, 4, 4, 4), runtime=RuntimeState(version=1))
    assert not {"steps", "links", "wireError"} & set(status)
