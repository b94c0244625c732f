"""How fast each rank is beside the others, as far as its experts' time tells it."""

from collections.abc import Mapping
from statistics import median

from moe_core.contract.exchange import RuntimeState
from moe_core.decide.crew import Seat

SAME = 2.0
"""Less than so many times as fast as another one is no difference: equal ranks that share two busy cores were seen to
differ by a half, since a pick costs less where there are more of them at once."""
_STEPS = 4
"""Speeds are told in quarters, so that a jitter does not make a new plan."""
_FASTEST = 64.0
"""More is no measurement: a rank that answered its one token from a cache."""


def seconds_of_ranks(runtime: RuntimeState, ranks: Mapping[int, Seat]) -> dict[int, float]:
    """Seconds per pick of the ranks whose present pod has said."""
    return {
        state.rank: state.seconds_per_pick
        for state in runtime.ranks
        if state.seconds_per_pick > 0 and state.rank in ranks and _is(ranks[state.rank], state.pod_uid)
    }


def speeds_of(known: Mapping[int, float], num_ranks: int) -> tuple[float, ...]:
    """[R] in parts of the median rank's speed; 1 for one that is about as fast, or whose seconds are not known.

    >>> speeds_of({0: 1.0, 1: 1.9, 2: 3.8}, 4)
    (1.0, 1.0, 0.5, 1.0)
    """
    if not known:
        return (1.0,) * num_ranks
    middle = median(known.values())
    return tuple(_rounded(middle / known[rank]) if rank in known else 1.0 for rank in range(num_ranks))


def told_speeds(speeds: tuple[float, ...]) -> str:
    """Of those that differ; nothing where none does.

    >>> told_speeds((1.0, 0.5, 1.0))
    'rank 1 is 0.5 times as fast as most'
    """
    unlike = [(rank, speed) for rank, speed in enumerate(speeds) if speed != 1]
    return ", ".join(f"rank {rank} is {speed:g} times as fast as most" for rank, speed in unlike)


def _is(seat: Seat, pod_uid: str) -> bool:
    return seat.live is not None and seat.live.uid == pod_uid


def _rounded(ratio: float) -> float:
    return 1.0 if 1 / SAME < ratio < SAME else max(round(min(ratio, _FASTEST) * _STEPS), 1) / _STEPS
