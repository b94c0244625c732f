"""Rows of real ranks on one machine go through memory, and a peer that is gone or hangs is seen and named."""

from pathlib import Path

import pytest

import near_tasks as tasks
from gloo_ranks import run_ranks

pytestmark = pytest.mark.integration


def test_rows_come_as_they_were_sent_and_are_counted(tmp_path: Path) -> None:
    results = run_ranks(tasks.exchange_often, num_ranks=3, store_path=str(tmp_path / "store"), size=3, turns=20)

    assert {rank: wrong for rank, (wrong, _) in results.items()} == {0: 0, 1: 0, 2: 0}
    told = 6 * 8  # one number each in every third exchange
    assert {tuple(sent) for _, sent in results.values()} == {(20 * tasks.ROWS * 64 + told,) * 3}


@pytest.mark.parametrize("far", [((0, 2),), ((0, 1), (0, 2)), ((0, 1), (0, 2), (1, 2))], ids=["a_pair", "one", "all"])
def test_ranks_that_do_not_see_each_other_send_by_the_backend(tmp_path: Path, far: tuple[tuple[int, int], ...]) -> None:
    results = run_ranks(tasks.exchange_often, num_ranks=3, store_path=str(tmp_path / "store"), size=3, turns=6, far=far)

    assert {rank: wrong for rank, (wrong, _) in results.items()} == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("far", [(), ((0, 2),)], ids=["all_near", "a_pair_is_far"])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_exchanges_come_right_in_whatever_order_they_end(
    tmp_path: Path, seed: int, far: tuple[tuple[int, int], ...]
) -> None:
    results = run_ranks(
        tasks.exchange_anything, num_ranks=3, store_path=str(tmp_path / "store"), size=3, seed=seed, far=far
    )

    assert results == dict.fromkeys(range(3), tasks.STEPS)


@pytest.mark.parametrize("after_words", [0, 1, 3, 6, 8], ids="after_{}_words".format)
@pytest.mark.parametrize(
    ("number", "within_s", "names"),
    [(tasks.KILLED, 1.0, "gone"), (tasks.STOPPED, 3.0, "rank 2 has not come in time")],
    ids=["killed", "stopped"],
)
def test_a_peer_lost_in_the_middle_of_an_exchange_faults_the_others_in_time_and_they_go_on(
    tmp_path: Path, number: int, within_s: float, names: str, after_words: int
) -> None:
    results = run_ranks(
        tasks.meet_a_silent_one,
        num_ranks=3,
        store_path=str(tmp_path / "store"),
        expected_ranks={0, 1},
        size=3,
        silent=2,
        number=number,
        timeout_ms=1500,
        after_words=after_words,
    )

    assert max(results[rank]["seconds"] for rank in (0, 1)) < within_s
    assert [results[rank]["wrong"] for rank in (0, 1)] == [0, 0]
    assert any(names in results[rank]["reason"] for rank in (0, 1))


def test_epochs_leave_nothing_open_behind(tmp_path: Path) -> None:
    results = run_ranks(tasks.live_through_epochs, num_ranks=3, store_path=str(tmp_path / "store"), size=3, epochs=5)

    for descriptors, maps in results.values():
        assert len(set(descriptors[1:])) == 1
        assert maps == 0
