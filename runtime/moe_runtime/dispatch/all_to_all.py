"""Dispatch over a group. Two ways, equal in result:

    by_pick     each (token, expert) pick travels to its expert and back: exact bytes, three exchanges (counts, rows,
                results), or two where the group tells counts with the rows.
    by_token    every token travels once to every rank with its addresses and weights, and one partial sum comes back
                from each: two exchanges and no counts, because the ranks know each other's token numbers from the
                step's control exchange. For the few tokens of a decoding step, where latency is all.

T own tokens, D model, K picks per token, N = T*K, R rows received, G ranks of the group, S slots_stride.
"""

from collections.abc import Generator, Sequence

import torch

from moe_runtime.dispatch.group_face import Group
from moe_runtime.dispatch.order import order_picks
from moe_runtime.dispatch.plan import LOST, DispatchPlan
from moe_runtime.dispatch.reference import RunSlots
from moe_runtime.dispatch.travel import Trip, post
from moe_runtime.dispatch.wire import PLAIN, Legs


def run_by_pick(
    x_TD: torch.Tensor,
    address_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    *,
    plan: DispatchPlan,
    group: Group,
    run_slots: RunSlots,
    legs: Legs = PLAIN,
    overlaps: bool = False,
) -> Generator[None, None, torch.Tensor]:
    """[T, D] like `reference.run_local`, over the group, differentiable. Raises GroupFault.

    A generator that stops wherever something is on its way; its return value is the result. LOST picks stay at home.
    """
    size, stride = plan.size, plan.slots_stride
    order = order_picks(address_TK, size * stride)
    counts_GS = order.counts_A.view(size, stride)
    if group.tells:
        send_counts = counts_GS.sum(1).tolist()  # device sync: sizes the exchange
        going = Trip(group, legs.there, send_counts, (), overlaps, tells_GC=counts_GS)
    else:
        telling = post(group, counts_GS, (1,) * size, (1,) * size, overlaps=overlaps)
        yield
        received_GS = telling.wait()
        # device sync: sizes the next exchange
        send_counts, receive_counts = torch.stack([counts_GS.sum(1), received_GS.sum(1)]).tolist()
        going = Trip(group, legs.there, send_counts, receive_counts, overlaps, heard_GC=received_GS)
    going.depart(order.send(x_TD, sum(send_counts)))
    yield
    rows_RD, _, _ = going.arrive()
    slot_GS = torch.arange(stride, device=x_TD.device).repeat(size)
    slot_R = slot_GS.repeat_interleave(going.heard_GC.reshape(-1), output_size=len(rows_RD))
    # Rows of no one stay part of the graph, so that this rank runs the exchanges of backward too.
    outputs_RD = run_slots(rows_RD, slot_R) if rows_RD.shape[0] else rows_RD

    returning = Trip(group, legs.back, going.receive_counts, send_counts, overlaps)
    returning.depart(outputs_RD)
    yield
    home_PD, _, _ = returning.arrive()
    return order.bring_home(home_PD, weight_TK, len(home_PD)).to(x_TD.dtype)


def run_by_token(
    x_TD: torch.Tensor,
    address_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    *,
    plan: DispatchPlan,
    group: Group,
    run_slots: RunSlots,
    legs: Legs = PLAIN,
    tokens_of_position: Sequence[int],
) -> torch.Tensor:
    """[T, D] like `reference.run_local`, over the group, without gradients. Raises GroupFault.

    tokens_of_position[p] is T of position p, the same on all ranks.
    """
    size, dim, top_k = plan.size, x_TD.shape[1], address_TK.shape[1]
    mine = x_TD.shape[0]
    # One payload of bytes: numbers, weights and addresses in a single exchange.
    payload_TB = legs.there.pack(x_TD, weight_TK.float(), address_TK.to(torch.int32))
    received_RB = group.all_to_all(payload_TB.repeat(size, 1), (mine,) * size, tokens_of_position)
    x_RD, weight_RK, address_RK = legs.there.unpack(
        received_RB, dtype=x_TD.dtype, beside=((torch.float32, top_k), (torch.int32, top_k))
    )

    slot_RK = address_RK.long() - plan.position * plan.slots_stride
    is_mine_RK = (address_RK != LOST) & (slot_RK >= 0) & (slot_RK < plan.slots_stride)
    row_P, pick_P = torch.nonzero(is_mine_RK, as_tuple=True)  # device sync: sizes the experts' batch
    partial_RD = torch.zeros_like(x_RD)
    if row_P.numel():
        outputs_PD = run_slots(x_RD[row_P], slot_RK[row_P, pick_P])
        partial_RD.index_add_(0, row_P, (outputs_PD * weight_RK[row_P, pick_P].unsqueeze(-1)).to(x_RD.dtype))
    home_RB = group.all_to_all(legs.back.pack(partial_RD), tokens_of_position, (mine,) * size)
    return legs.back.unpack(home_RB, dtype=x_TD.dtype)[0].view(size, mine, dim).sum(dim=0)
