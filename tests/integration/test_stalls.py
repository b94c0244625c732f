"""Who waited for whom over real Gloo: a rank that is slow is the one that the others' waiting is put down to."""

import time
from pathlib import Path

import pytest
import torch

from gloo_ranks import join_group, run_ranks
from moe_runtime.rank.stalls import Stalls

pytestmark = pytest.mark.integration
SLOW, SLEEP_S = 1, 0.05


def steps(rank: int, store_path: str, *, world: int, count: int) -> dict[str, object]:
    stalls = Stalls(rank)
    with join_group(store_path, ranks=range(world), rank=rank) as group:
        for _ in range(count + 1):
            rows = group.all_gather_ints(stalls.own)
            stalls.account(group.ranks, rows)
            began, blocked_s = time.monotonic(), group.blocked_s
            if rank == SLOW:
                time.sleep(SLEEP_S)
            group.all_to_all(torch.ones(world, 4), (1,) * world, (1,) * world)
            stalls.made(run_s=time.monotonic() - began, blocked_s=group.blocked_s - blocked_s)
    return stalls.total.model_dump()


def test_waiting_is_put_down_to_the_slow_rank(tmp_path: Path) -> None:
    results = run_ranks(steps, num_ranks=3, store_path=str(tmp_path / "store"), world=3, count=10)
    for rank, total in results.items():
        assert total["steps"] == 10
        if rank == SLOW:
            assert total["compute_us"] >= 10 * SLEEP_S * 1e6
        else:
            assert max(total["waited_us"], key=total["waited_us"].get) == SLOW
