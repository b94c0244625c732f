"""The all-to-all with a gradient: backward sends gradients home along the same splits.

torch's own `all_to_all_single_autograd` takes no time-out per operation, which is the only thing that ends the wait
for a hung peer; hence this one, over `Group.all_to_all`. Every rank must run backward through every exchange, or its
peers wait for it: `anchor` makes the result require a gradient even on a rank whose rows do not.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moe_runtime.dispatch.group_face import Group
from moe_runtime.dispatch.wire import Leg


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        rows: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004
        group: Group,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        leg: Leg,
    ) -> torch.Tensor:
        ctx.group, ctx.send_counts, ctx.receive_counts, ctx.leg = group, send_counts, receive_counts, leg
        return _carry(group, rows, send_counts, receive_counts, leg)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        home = _carry(ctx.group, grad_rows, ctx.receive_counts, ctx.send_counts, ctx.leg.of_gradient)
        return home, None, None, None, None, None


def _carry(
    group: Group, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], leg: Leg
) -> torch.Tensor:
    if leg.wire == "Float32":
        return group.all_to_all(rows.contiguous(), send_counts, receive_counts)
    received = group.all_to_all(leg.pack(rows), send_counts, receive_counts)
    return leg.unpack(received, dtype=rows.dtype)[0]


def exchange_rows(
    group: Group, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], leg: Leg
) -> torch.Tensor:
    """Rows to their positions, [sum(send_counts), D] -> [sum(receive_counts), D], differentiable, as `leg` has them on
    the wire. Raises GroupFault.
    """
    if not torch.is_grad_enabled():
        return _carry(group, rows, send_counts, receive_counts, leg)
    anchor = torch.empty(0, device=rows.device, requires_grad=True)
    received: torch.Tensor = _Exchange.apply(rows, anchor, group, send_counts, receive_counts, leg)
    return received
