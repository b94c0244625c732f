"""Rows on their way to other ranks and their gradients on the way home, in two halves: `depart` sends, `arrive` waits.

What is computed between the two is computed while the bytes travel, if the trip `overlaps`; in backward as well, where
arrive's gradient departs first and depart's waits for it. A trip that does not overlap is made as it departs.

torch's own `all_to_all_single_autograd` takes no time-out per operation, which is the only thing that ends the wait for
a hung peer; hence this one. autograd runs what was made last first, so two batches whose halves take turns in forward
take turns in backward too, in the same order on every rank, however little of it a rank has to do.

Weights ([R, K] float32, with gradients) and addresses ([R, K]) may ride along with the rows. Every rank must run
backward through every trip, or its peers wait for it: `anchor` makes the result require a gradient even on a rank whose
rows do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_runtime.dispatch.group_face import Group, Heard, Posted
from moe_runtime.dispatch.wire import Leg


@dataclass(frozen=True, slots=True)
class _Made:
    """A trip that is over as soon as it began."""

    received: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.received


def post(
    group: Group, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], *, overlaps: bool
) -> Posted[torch.Tensor]:
    """`Group.all_to_all`, begun now and waited for later, or made at once. Raises GroupFault."""
    if overlaps:
        return group.post_all_to_all(rows, send_counts, receive_counts)
    return _Made(group.all_to_all(rows, send_counts, receive_counts))


@dataclass(slots=True)
class Trip:
    """One exchange. `arrive` exactly once; on every rank trips depart in one order."""

    group: Group
    leg: Leg
    send_counts: Sequence[int]
    receive_counts: Sequence[int]
    overlaps: bool = False
    tells_GC: torch.Tensor | None = None
    """Goes beside the rows to ranks that do not know how many come: receive_counts then is known once they arrive."""
    heard_GC: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """What they told, beside the rows or before."""
    columns: int = 0
    """K of the weights and addresses; 0: none ride along."""
    dtype: torch.dtype = torch.float32
    _posted: Posted[torch.Tensor] | None = None
    _telling: Posted[Heard] | None = None
    _token: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def depart(
        self, rows_RD: torch.Tensor, weight_RK: torch.Tensor | None = None, address_RK: torch.Tensor | None = None
    ) -> None:
        """Raises GroupFault."""
        self.dtype = rows_RD.dtype
        if weight_RK is None or address_RK is None:
            weight_RK, address_RK = (torch.zeros(len(rows_RD), 0, dtype=kind) for kind in (torch.float32, torch.int32))
        self.columns = weight_RK.shape[1]
        if not torch.is_grad_enabled():
            self._send(rows_RD, weight_RK, address_RK)
            return
        anchor = torch.empty(0, device=rows_RD.device, requires_grad=True)
        self._token = _Depart.apply(rows_RD, weight_RK, anchor, address_RK, self)

    def arrive(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rows [R', D], weight [R', K], address [R', K] int64) from all ranks, in order of positions. Raises
        GroupFault."""
        if not torch.is_grad_enabled():
            return self._receive()
        rows, weight, address = _Arrive.apply(self._token, self)
        return rows, weight, address

    def _send(self, rows_RD: torch.Tensor, weight_RK: torch.Tensor, address_RK: torch.Tensor) -> None:
        beside = (weight_RK.float(), address_RK.to(torch.int32)) if self.columns else ()
        bytes_RB = self.leg.pack(rows_RD.detach(), *beside)
        if self.tells_GC is None:
            self._post(bytes_RB, self.send_counts, self.receive_counts)
        else:
            self._telling = self.group.post_telling(bytes_RB, self.send_counts, self.tells_GC)

    def _receive(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._telling is None:
            bytes_RB = self._wait()
        else:
            heard, self._telling = self._telling.wait(), None
            bytes_RB, self.receive_counts, self.heard_GC = heard.rows, heard.counts, heard.told_GC
        if not self.columns:
            [rows_RD] = self.leg.unpack(bytes_RB, dtype=self.dtype)
            nothing = rows_RD.new_zeros(len(rows_RD), 0)
            return rows_RD, nothing, nothing.long()
        beside = ((torch.float32, self.columns), (torch.int32, self.columns))
        rows_RD, weight_RK, address_RK = self.leg.unpack(bytes_RB, dtype=self.dtype, beside=beside)
        return rows_RD, weight_RK, address_RK.long()

    def _send_gradient(self, grad_RD: torch.Tensor, grad_RK: torch.Tensor) -> None:
        beside = (grad_RK.float(),) if self.columns else ()
        self._post(self.leg.of_gradient.pack(grad_RD, *beside), self.receive_counts, self.send_counts)

    def _receive_gradient(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        beside = ((torch.float32, self.columns),) if self.columns else ()
        found = self.leg.of_gradient.unpack(self._wait(), dtype=self.dtype, beside=beside)
        return found[0], found[1] if self.columns else None

    def _post(self, bytes_RB: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> None:
        self._posted = post(self.group, bytes_RB, send_counts, receive_counts, overlaps=self.overlaps)

    def _wait(self) -> torch.Tensor:
        assert self._posted is not None, "depart comes before arrive"
        posted, self._posted = self._posted, None
        return posted.wait()


class _Depart(torch.autograd.Function):
    """The bytes themselves go past autograd, in the trip: only an empty tensor links the halves."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        rows_RD: torch.Tensor,
        weight_RK: torch.Tensor,
        anchor: torch.Tensor,
        address_RK: torch.Tensor,
        trip: Trip,
    ) -> torch.Tensor:
        ctx.trip = trip
        trip._send(rows_RD, weight_RK, address_RK)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_RD, grad_RK = ctx.trip._receive_gradient()
        return grad_RD, grad_RK, None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, trip: Trip) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.trip, ctx.token = trip, token
        rows_RD, weight_RK, address_RK = trip._receive()
        ctx.mark_non_differentiable(address_RK)
        return rows_RD, weight_RK, address_RK

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor, grad_RK: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        ctx.trip._send_gradient(grad_RD, grad_RK)
        return ctx.token.new_zeros(0), None
