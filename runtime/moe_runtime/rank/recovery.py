"""One recovery of this rank, from the fault it saw to the first step after it."""

from dataclasses import dataclass

from moe_core.contract.exchange import Recovery


@dataclass(slots=True)
class Recovering:
    """Times are wall clock seconds since the Unix epoch, None while they lie ahead. A loss on the way is part of it."""

    detected_at: float
    lost_ranks: frozenset[int] = frozenset()
    agreed_at: float | None = None
    rebuilt_at: float | None = None

    def agreed(self, lost: frozenset[int], at: float) -> None:
        """An epoch without `lost` is decided; its group is to be built."""
        self.lost_ranks |= lost
        self.agreed_at, self.rebuilt_at = at, None

    def rebuilt(self, at: float) -> None:
        if self.agreed_at is not None:
            self.rebuilt_at = at

    def resumed(self, epoch: int, at: float) -> Recovery | None:
        """The record, once a step of the new group is through; None before, and when nobody was lost."""
        if self.agreed_at is None or self.rebuilt_at is None or not self.lost_ranks:
            return None
        return Recovery(
            epoch=epoch,
            lost_ranks=tuple(sorted(self.lost_ranks)),
            detected_at=self.detected_at,
            agreed_at=self.agreed_at,
            rebuilt_at=self.rebuilt_at,
            resumed_at=at,
        )
