"""Rows of real ranks on one machine go through memory, and a peer that is gone or hangs is seen as ever."""

from pathlib import Path

import pytest

import near_tasks as tasks
from gloo_ranks import run_ranks

pytestmark = pytest.mark.integration


def test_rows_come_as_they_were_sent_and_are_counted(tmp_path: Path) -> None:
    results = run_ranks(tasks.exchange_often, num_ranks=3, store_path=str(tmp_path / "store"), size=3, turns=20)

    assert {rank: wrong for rank, (wrong, _) in results.items()} == {0: 0, 1: 0, 2: 0}
    assert {tuple(sent) for _, sent in results.values()} == {(20 * tasks.ROWS * 64,) * 3}


@pytest.mark.parametrize(("number", "within_s"), [(tasks.KILLED, 1.0), (tasks.STOPPED, 3.0)], ids=["killed", "stopped"])
def test_a_peer_that_is_gone_or_hangs_faults_the_others_in_time(tmp_path: Path, number: int, within_s: float) -> None:
    results = run_ranks(
        tasks.meet_a_silent_one,
        num_ranks=3,
        store_path=str(tmp_path / "store"),
        expected_ranks={0, 1},
        size=3,
        silent=2,
        number=number,
        timeout_ms=1500,
    )

    assert max(results[0], results[1]) < within_s
