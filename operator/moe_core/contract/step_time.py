"""Where the time of steps goes: what ranks compute, what the exchange itself takes, and who waits for whom."""

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from moe_core.contract.base import WireModel

Micros = int


class StepTime(WireModel):
    """Of some steps of one rank, or of several ranks together; microseconds.

    A step's time is its own work and the time inside collectives. Of the latter, what even the rank that all others
    waited for spent there is the exchange; the rest is waiting for that rank.
    """

    steps: int = Field(default=0, ge=0)
    compute_us: Micros = Field(default=0, ge=0)
    exchange_us: Micros = Field(default=0, ge=0)
    waited_us: dict[int, Micros] = Field(default_factory=dict)
    """By the rank that was waited for."""

    @property
    def wait_us(self) -> Micros:
        return sum(self.waited_us.values())

    @property
    def all_us(self) -> Micros:
        return self.compute_us + self.exchange_us + self.wait_us

    @property
    def most_waited_for(self) -> int | None:
        """The rank that was waited for longest; None when nobody waited."""
        found = max(self.waited_us.items(), key=lambda item: (item[1], -item[0]), default=None)
        return found[0] if found is not None and found[1] > 0 else None

    def percent(self, part_us: Micros) -> int:
        return round(100 * part_us / self.all_us) if self.all_us else 0

    def told(self) -> str:
        """
        >>> StepTime(steps=1, compute_us=600, exchange_us=100, waited_us={2: 300}).told()
        'compute 60%, exchange 10%, waiting 30% (most for rank 2)'
        """
        text = (
            f"compute {self.percent(self.compute_us)}%, exchange {self.percent(self.exchange_us)}%, "
            f"waiting {self.percent(self.wait_us)}%"
        )
        return text if self.most_waited_for is None else f"{text} (most for rank {self.most_waited_for})"


def in_sum(times: Iterable[StepTime]) -> StepTime:
    """Of several ranks, or of several steps; `steps` is the most that any has."""
    found = list(times)
    waited: Counter[int] = Counter()
    for time in found:
        waited.update(time.waited_us)
    return StepTime(
        steps=max((time.steps for time in found), default=0),
        compute_us=sum(time.compute_us for time in found),
        exchange_us=sum(time.exchange_us for time in found),
        waited_us=dict(sorted(waited.items())),
    )
