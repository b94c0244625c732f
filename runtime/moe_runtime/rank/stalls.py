"""Every step's stall: who waited for whom, and how much of the step was compute.

Each rank notes how long its step took and how much of that it spent inside collectives. Both numbers ride along in the
control exchange before the next step, so that all ranks account for the same step with the same numbers, for no
exchange more. The rank that computed longest is the one that the others waited for: what it spent inside collectives
is what the exchange itself takes.

One rank for each step, though different layers may have waited for different ranks: a rank that computes as long as
another, but earlier, is not told from it.
"""

from collections import deque
from collections.abc import Sequence

from moe_core.contract.step_time import StepTime, in_sum

RECENT_STEPS = 64
"""What `recent` says follows a change within so many steps."""


class Stalls:
    """Of one rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._steps: deque[StepTime] = deque(maxlen=RECENT_STEPS)
        self._own = (0, 0)
        self.total = StepTime()

    @property
    def own(self) -> tuple[int, int]:
        """(computed, inside collectives) of the step that was made last, in microseconds; zeros for none."""
        return self._own

    def made(self, *, run_s: float, blocked_s: float) -> None:
        """A step of `run_s`, `blocked_s` of it inside collectives."""
        self._own = max(1, round((run_s - blocked_s) * 1e6)), round(blocked_s * 1e6)

    def forget(self) -> None:
        """Another epoch: its members have no step in common yet."""
        self._own = (0, 0)

    def account(self, ranks: Sequence[int], told: Sequence[Sequence[int]]) -> None:
        """What all `ranks` told of the step before this boundary."""
        self._own = (0, 0)
        if not all(computed for computed, _ in told):
            return  # somebody made no step
        slowest = max(range(len(ranks)), key=lambda i: (told[i][0], -ranks[i]))
        computed_us, blocked_us = told[ranks.index(self._rank)]
        exchange_us = min(blocked_us, told[slowest][1])
        waited = {ranks[slowest]: blocked_us - exchange_us} if blocked_us > exchange_us else {}
        step = StepTime(steps=1, compute_us=computed_us, exchange_us=exchange_us, waited_us=waited)
        self._steps.append(step)
        total = in_sum((self.total, step))
        self.total = total.model_copy(update={"steps": self.total.steps + 1})

    @property
    def recent(self) -> StepTime:
        """Of the newest steps together."""
        steps = tuple(self._steps)
        return in_sum(steps).model_copy(update={"steps": len(steps)})
