"""Who waited for whom: a step's time is compute, exchange, or waiting for the rank that computed longest."""

from moe_core.contract.step_time import StepTime, in_sum
from moe_runtime.rank.stalls import RECENT_STEPS, Stalls

RANKS = (0, 2, 5)


def step_of(rank: int, told: list[tuple[int, int]]) -> StepTime:
    stalls = Stalls(rank)
    stalls.account(RANKS, told)
    return stalls.recent


def test_the_others_wait_for_the_rank_that_computes_longest() -> None:
    told = [(100, 500), (590, 10), (300, 300)]
    assert step_of(0, told) == StepTime(steps=1, compute_us=100, exchange_us=10, waited_us={2: 490})
    assert step_of(2, told) == StepTime(steps=1, compute_us=590, exchange_us=10)
    assert step_of(5, told) == StepTime(steps=1, compute_us=300, exchange_us=10, waited_us={2: 290})


def test_nothing_of_a_step_is_lost_or_counted_twice() -> None:
    told = [(100, 480), (590, 10), (300, 5)]
    for rank, (computed, blocked) in zip(RANKS, told, strict=True):
        assert step_of(rank, told).all_us == computed + blocked


def test_of_equals_the_first_rank_is_named() -> None:
    assert step_of(5, [(9, 1), (9, 1), (4, 6)]).most_waited_for == 0


def test_a_boundary_at_which_somebody_made_no_step_accounts_for_none() -> None:
    assert step_of(0, [(100, 5), (0, 0), (100, 5)]).steps == 0


def test_what_was_told_once_is_not_told_again() -> None:
    stalls = Stalls(0)
    stalls.made(run_s=0.5, blocked_s=0.2)
    assert stalls.own == (300_000, 200_000)
    stalls.account((0,), [stalls.own])
    assert stalls.own == (0, 0)


def test_recent_forgets_and_the_total_does_not() -> None:
    stalls = Stalls(0)
    for _ in range(RECENT_STEPS + 10):
        stalls.account((0, 1), [(10, 30), (30, 10)])
    assert (stalls.recent.steps, stalls.total.steps) == (RECENT_STEPS, RECENT_STEPS + 10)
    assert stalls.total.waited_us == {1: 20 * (RECENT_STEPS + 10)}


def test_ranks_together_name_the_one_that_most_time_was_spent_waiting_for() -> None:
    both = in_sum([StepTime(steps=3, compute_us=5, waited_us={1: 7}), StepTime(steps=2, waited_us={0: 4, 1: 1})])
    assert both == StepTime(steps=3, compute_us=5, waited_us={0: 4, 1: 8})
    assert both.most_waited_for == 1
    assert StepTime().told() == "compute 0%, exchange 0%, waiting 0%"
