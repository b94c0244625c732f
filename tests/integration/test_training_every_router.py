"""Every kind of router trains over real ranks: it learns, its state is the same on all of them and survives."""

import math
from pathlib import Path
from typing import Any

import pytest

import train_tasks
from gloo_ranks import run_ranks
from router_cases import CASE_NAMES, CASES

pytestmark = pytest.mark.integration

ROUTERS = dict(zip(CASE_NAMES, CASES, strict=True))


def test_every_router_trains_alike_on_all_ranks_and_comes_back_from_a_snapshot(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    results: dict[int, dict[str, Any]] = run_ranks(
        train_tasks.train_every_router,
        num_ranks=2,
        size=2,
        store_path=str(tmp_path / "store"),
        output=str(output),
        text=str(train_tasks.write_text(tmp_path / "text")),
        routers=ROUTERS,
    )
    first, second = results[0], results[1]
    assert first.keys() == second.keys() == ROUTERS.keys()
    for name in ROUTERS:
        losses, bits, tensors, came_back = first[name]
        assert all(math.isfinite(loss) for loss in losses), name
        assert losses[-1] < losses[0], f"{name} learns"
        assert math.isfinite(bits), name
        assert second[name][2] == tensors, f"{name} is the same on both ranks"
        assert came_back, name
