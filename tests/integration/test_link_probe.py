"""Ranks measure their links over real Gloo: everybody everybody, and a rank that stops in the middle is a fault."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gloo_ranks import join_group, run_ranks
from moe_runtime.errors import GroupFault
from moe_runtime.membership import link_probe
from moe_runtime.membership.group import EpochGroup

pytestmark = pytest.mark.integration


class Stopping(EpochGroup):
    """Its owner stops at the third message that it would receive."""

    left = 3

    def receive(self, *arguments: Any, **options: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGSTOP)
        super().receive(*arguments, **options)


def measure(rank: int, store_path: str, *, world: int, victim: int | None = None) -> dict[str, Any]:
    vars(link_probe)["_MEET_MS"] = 1500
    with join_group(store_path, ranks=range(world), rank=rank, timeout_ms=1000) as group:
        if rank == victim:
            group.__class__ = Stopping
        began = time.monotonic()
        try:
            found = link_probe.probe_links(group)
        except GroupFault as fault:
            return {"fault": str(fault), "seconds": time.monotonic() - began}
        return {"links": {to: speed.model_dump() for to, speed in found.items()}, "broken": group._broken}


@pytest.mark.parametrize("world", [2, 5])
def test_every_rank_knows_how_fast_it_reaches_every_other_one(world: int, tmp_path: Path) -> None:
    results = run_ranks(measure, num_ranks=world, store_path=str(tmp_path / "store"), world=world)
    for rank in range(world):
        links = results[rank]["links"]
        assert sorted(links) == list(range(world))
        assert links[rank]["latency_us"] == 0
        for other in set(range(world)) - {rank}:
            assert links[other]["latency_us"] > 0
            assert 1e6 < links[other]["bytes_per_s"] < 1e12
        assert not results[rank]["broken"]


def test_a_rank_that_stops_in_the_middle_of_a_probe_is_a_fault_to_the_others_in_time(tmp_path: Path) -> None:
    results = run_ranks(
        measure, num_ranks=4, store_path=str(tmp_path / "store"), world=4, victim=2, expected_ranks={0, 1, 3}
    )
    for rank in (0, 1, 3):
        assert results[rank]["fault"]
        assert results[rank]["seconds"] < 6
