"""A MoE layer's experts on one device, forward and backward: tokens and their picks in, the mixture out.

`mixture_reference` is plain torch, an expert after the other. `mixture` runs on the GPU's grouped products; what passes
through its memory is the activation [P, F] and the picks' outputs [P, D], in training gate and up [P, 2F] too.

Suffixes: T tokens, K picks of a token, N = T * K, D model, F expert hidden, S slots, P padded rows.
"""

from typing import Any

import torch
from torch.nn.functional import linear, silu

from moe_runtime.kernels.index import SlotRows, index_rows

LARGE_BLOCK, SMALL_BLOCK = 128, 64
"""Rows of a block: 64 is the least that Hopper's matrix units take, and wastes less where slots get few rows."""


def mixture_reference(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_S2FD: torch.Tensor,
    down_SDF: torch.Tensor,
) -> torch.Tensor:
    """[T, D] sum over a token's picks of weight * down(silu(gate(x)) * up(x)); NO_SLOT gives nothing."""
    out_TD = torch.zeros_like(x_TD)
    for slot in range(gate_up_S2FD.shape[0]):
        token, k = torch.where(slot_TK == slot)
        gate, up = linear(x_TD[token], gate_up_S2FD[slot]).chunk(2, dim=-1)
        expert = linear(silu(gate) * up, down_SDF[slot])
        out_TD = out_TD.index_add(0, token, (expert * weight_TK[token, k].unsqueeze(-1)).to(x_TD.dtype))
    return out_TD


def block_rows_for(num_picks: int, num_slots: int) -> int:
    """Rows of a block for an even spread of the picks, which is all that the host knows."""
    return LARGE_BLOCK if num_picks >= 2 * LARGE_BLOCK * num_slots else SMALL_BLOCK


def mixture(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_S2FD: torch.Tensor,
    down_SDF: torch.Tensor,
    *,
    block_rows: int | None = None,
) -> torch.Tensor:
    """The same in Triton, differentiable in x, weights and both parameters; one dtype for all but the weights.

    Raises InvalidInput when D or F is no multiple of 16 bytes.
    """
    num_slots = gate_up_S2FD.shape[0]
    if slot_TK.numel() == 0:
        return x_TD * 0.0
    rows = index_rows(
        slot_TK.reshape(-1),
        num_slots=num_slots,
        block_rows=block_rows or block_rows_for(slot_TK.numel(), num_slots),
    )
    out_TD: torch.Tensor = _Mixture.apply(
        x_TD.contiguous(), weight_TK, gate_up_S2FD.contiguous(), down_SDF.contiguous(), rows
    )
    return out_TD


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  # autograd gives them by place
        ctx: Any,
        x_TD: torch.Tensor,
        weight_TK: torch.Tensor,
        gate_up_S2FD: torch.Tensor,
        down_SDF: torch.Tensor,
        rows: SlotRows,
    ) -> torch.Tensor:
        from moe_runtime.kernels import grouped_triton
        from moe_runtime.kernels.permute_triton import combine_rows

        keep = any(ctx.needs_input_grad)
        num_tokens, top_k = weight_TK.shape
        hidden_PF, kept_P2F = grouped_triton.gate_up(x_TD, gate_up_S2FD, rows, top_k=top_k, keep=keep)
        out_PD = grouped_triton.rows_times_weights(hidden_PF, down_SDF, rows, transposed=True)
        if keep:
            ctx.save_for_backward(x_TD, weight_TK, gate_up_S2FD, down_SDF, kept_P2F)
            ctx.rows = rows
        return combine_rows(out_PD, weight_TK, rows, num_tokens=num_tokens, top_k=top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from moe_runtime.kernels import grouped_triton as triton_
        from moe_runtime.kernels.permute_triton import combine_rows

        x_TD, weight_TK, gate_up_S2FD, down_SDF, kept_P2F = ctx.saved_tensors
        rows, d_out_TD = ctx.rows, grads[0].contiguous()
        num_tokens, top_k = weight_TK.shape
        needs_x, needs_weight, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        d_hidden_PF = triton_.rows_times_weights(d_out_TD, down_SDF, rows, transposed=False, gather_top_k=top_k)
        d_gate_up_P2F, weighted_PF, d_weight_N = triton_.swiglu_backward(
            d_hidden_PF, kept_P2F, weight_TK.reshape(-1), rows
        )
        del d_hidden_PF
        d_x_TD = d_gate_up_S2FD = d_down_SDF = None
        if needs_gate_up:
            d_gate_up_S2FD = triton_.weights_gradient(d_gate_up_P2F, x_TD, rows, top_k=top_k, gather_left=False)
        if needs_down:
            d_down_SDF = triton_.weights_gradient(d_out_TD, weighted_PF, rows, top_k=top_k, gather_left=True)
        if needs_x:
            d_x_PD = triton_.rows_times_weights(d_gate_up_P2F, gate_up_S2FD, rows, transposed=False)
            d_x_TD = combine_rows(d_x_PD, None, rows, num_tokens=num_tokens, top_k=top_k)
        d_weight_TK = d_weight_N.view_as(weight_TK).to(weight_TK.dtype) if needs_weight else None
        return d_x_TD, d_weight_TK, d_gate_up_S2FD, d_down_SDF, None
