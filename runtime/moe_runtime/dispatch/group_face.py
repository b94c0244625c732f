"""What the data plane asks of an epoch's process group, and nothing more.

`moe_runtime.membership.group.EpochGroup` has this shape; tests bring their own. Positions number the living ranks of
the epoch 0..size-1 in the order of `ranks`; ranks are the stable ids of the membership. Every operation carries its own
deadline and raises `moe_runtime.errors.GroupFault` on any failure, so that a caller never sees a backend's exception.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

T_co = TypeVar("T_co", covariant=True)


class Posted(Protocol[T_co]):
    """An exchange that has begun."""

    def wait(self) -> T_co:
        """What was received. Raises GroupFault."""


class Heard(Protocol):
    """Rows by position, how many came from each, and what was told beside them: told_GC [size, C] int64."""

    @property
    def rows(self) -> torch.Tensor: ...

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def told_GC(self) -> torch.Tensor: ...


class Group(Protocol):
    """One epoch's collectives. All members call the same operations in the same order."""

    @property
    def size(self) -> int:
        """Number of living ranks."""

    @property
    def position(self) -> int:
        """This rank's position, 0..size-1."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank ids by position."""

    @property
    def domains(self) -> tuple[str, ...] | None:
        """By position, where each rank runs: equal names are near each other. None: nothing is known of that."""

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        """Send `send_counts[p]` rows of `rows` (along dim 0, in order of positions) to each position p.

        Returns the `sum(receive_counts)` rows received, in order of positions. No autograd. Raises GroupFault.
        """

    def swap(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The same of what is no dispatch: counts[p] rows go to each position p, and as many come from there."""

    def post_all_to_all(
        self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Posted[torch.Tensor]:
        """The same, begun and not waited for: this rank computes meanwhile. `rows` must stay as they are until then."""

    @property
    def tells(self) -> bool:
        """Whether rows may go to ranks that do not know how many come; all ranks say the same."""

    def post_telling(self, rows: torch.Tensor, send_counts: Sequence[int], told_GC: torch.Tensor) -> Posted[Heard]:
        """`post_all_to_all` where this group `tells`, and told_GC[p] to each position p."""

    def all_gather_ints(self, row: Sequence[int], *, timeout_ms: int | None = None) -> list[list[int]]:
        """Every rank's row of equally many integers, by position. Raises GroupFault."""

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Sum over ranks, in place. Raises GroupFault."""
