"""A MoE layer's experts on one device, forward and backward: tokens and their picks in, the mixture out.

`mixture_reference` is plain torch, an expert after the other. `mixture` runs on the GPU's grouped products; what passes
through its memory is the activation [P, F] and the picks' outputs [P, D], in training gate and up [P, 2F] too.

Suffixes: T tokens, K picks of a token, N = T * K, D model, F expert hidden, S slots, P padded rows.
"""

from typing import Any

import torch
from torch.nn.functional import linear, silu

from moe_core.contract.packing import Packing
from moe_core.outcome import InvalidInput
from moe_runtime.kernels.float8 import float8_rows
from moe_runtime.kernels.index import SlotRows, index_rows
from moe_runtime.kernels.quantise import Packed

PERMUTE_FROM_F = 4096
"""Expert hidden from which gathering the tokens in the product costs more than writing them in order once: the product
reads each of them F / 128 times (tests/bench/README.md)."""
HOPPER = 9
"""Compute capability of the GPUs that this has been seen on. The kernels compile for Ampere, Ada and Blackwell too, for
the first two with spilled registers; whoever measures them there may let them in.
"""


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


def runs_here(x: torch.Tensor, gate_up_S2FD: torch.Tensor, down_SDF: torch.Tensor) -> bool:
    """Whether `mixture` takes these: on a GPU that it was seen on, one dtype that it knows, and whole 16 bytes where
    weights and their rows begin.
    """
    return (
        _knows(x)
        and all(t.is_cuda and t.dtype == x.dtype and t.data_ptr() % 16 == 0 for t in (gate_up_S2FD, down_SDF))
        and all(side % (16 // x.dtype.itemsize) == 0 for side in down_SDF.shape[1:])
    )


def packed_runs_here(x: torch.Tensor, gate_up_S2FD: Packed, down_SDF: Packed, packing: Packing) -> bool:
    """Whether `mixture_packed` takes these."""
    if not (_knows(x) and gate_up_S2FD.codes.is_cuda and down_SDF.codes.is_cuda):
        return False
    from moe_runtime.kernels.grouped_packed_triton import takes

    sides = (x.shape[1], gate_up_S2FD.codes.shape[1] // 2)
    return all(side % (16 // x.dtype.itemsize) == 0 and takes(packing, num_columns=side) for side in sides)


def _knows(x: torch.Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in {torch.bfloat16, torch.float16, torch.float32}
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device)[0] == HOPPER
    )


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

    Raises InvalidInput when the dtypes differ, or D or F is no multiple of 16 bytes.
    """
    if not x_TD.dtype == gate_up_S2FD.dtype == down_SDF.dtype:
        raise InvalidInput(
            f"x, gate_up and down must have one dtype, not {x_TD.dtype}, {gate_up_S2FD.dtype} and {down_SDF.dtype}"
        )
    if slot_TK.numel() == 0:
        return x_TD * 0.0
    from moe_runtime.kernels.grouped_triton import block_rows_for

    num_slots = gate_up_S2FD.shape[0]
    block_rows = block_rows or block_rows_for(slot_TK.numel(), num_slots, x_TD.device)
    rows = index_rows(slot_TK.reshape(-1), num_slots=num_slots, block_rows=block_rows)
    out_TD: torch.Tensor = _Mixture.apply(
        x_TD.contiguous(), weight_TK, gate_up_S2FD.contiguous(), down_SDF.contiguous(), rows
    )
    return out_TD


def mixture_packed(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_S2FD: Packed,
    down_SDF: Packed,
    *,
    packing: Packing,
    block_rows: int | None = None,
) -> torch.Tensor:
    """`mixture` of weights that are few bits each, without gradients.

    Raises InvalidInput when D or F is no multiple of 16 bytes, of x's numbers or of codes, or no tile fits the groups.
    """
    if slot_TK.numel() == 0:
        return x_TD * 0.0
    from moe_runtime.kernels.grouped_packed_triton import block_rows_for, gate_up_packed, rows_times_packed
    from moe_runtime.kernels.permute_triton import combine_rows

    num_tokens, top_k = slot_TK.shape
    num_slots = gate_up_S2FD.codes.shape[0]
    block_rows = block_rows or block_rows_for(slot_TK.numel(), num_slots)
    rows = index_rows(slot_TK.reshape(-1), num_slots=num_slots, block_rows=block_rows)
    hidden_PF = gate_up_packed(x_TD.contiguous(), gate_up_S2FD, packing, rows, gather_top_k=top_k)
    out_PD = rows_times_packed(hidden_PF, down_SDF, packing, rows)
    return combine_rows(out_PD, weight_TK, rows, num_tokens=num_tokens, top_k=top_k)


def mixture_float8(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_S2FD: Packed,
    down_SDF: Packed,
    *,
    block_rows: int | None = None,
) -> torch.Tensor:
    """`mixture_packed` of Float8 with a scale per row, multiplied as float8: tokens and activations are rounded too.

    Faster than `mixture_packed` where tokens are many, and less exact. The result is bfloat16. Raises InvalidInput when
    the scales go by group, or D or F is no multiple of 16.
    """
    for name, packed in (("gate_up", gate_up_S2FD), ("down", down_SDF)):
        if packed.codes.dtype != torch.float8_e4m3fn or packed.scales is None or packed.scales.shape[-1] != 1:
            raise InvalidInput(f"{name} must be Float8 with a scale per row to be multiplied as float8")
    if slot_TK.numel() == 0:
        return x_TD.bfloat16() * 0.0
    from moe_runtime.kernels.grouped_triton import Scales, block_rows_for, gate_up, rows_times_weights
    from moe_runtime.kernels.permute_triton import combine_rows

    assert gate_up_S2FD.scales is not None and down_SDF.scales is not None
    num_tokens, top_k = slot_TK.shape
    num_slots = gate_up_S2FD.codes.shape[0]
    block_rows = block_rows or block_rows_for(slot_TK.numel(), num_slots, x_TD.device)
    rows = index_rows(slot_TK.reshape(-1), num_slots=num_slots, block_rows=block_rows)
    x_codes_TD, x_scale_T = float8_rows(x_TD)
    scales = Scales(x_scale_T, gate_up_S2FD.scales.squeeze(-1))
    hidden_PF, _ = gate_up(x_codes_TD, gate_up_S2FD.codes, rows, gather_top_k=top_k, scales=scales)
    hidden_codes_PF, hidden_scale_P = float8_rows(hidden_PF)
    scales = Scales(hidden_scale_P, down_SDF.scales.squeeze(-1))
    out_PD = rows_times_weights(hidden_codes_PF, down_SDF.codes, rows, transposed=True, scales=scales)
    return combine_rows(out_PD, weight_TK, rows, num_tokens=num_tokens, top_k=top_k)


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
        from moe_runtime.kernels.permute_triton import combine_rows, permute_rows

        keep = any(ctx.needs_input_grad)
        num_tokens, top_k = weight_TK.shape
        if down_SDF.shape[2] >= PERMUTE_FROM_F:
            x_PD = permute_rows(x_TD, rows, top_k=top_k)
            hidden_PF, kept_P2F = grouped_triton.gate_up(x_PD, gate_up_S2FD, rows, gather_top_k=None, keep=keep)
        else:
            hidden_PF, kept_P2F = grouped_triton.gate_up(x_TD, gate_up_S2FD, rows, gather_top_k=top_k, keep=keep)
        out_PD = grouped_triton.rows_times_weights(hidden_PF, down_SDF, rows, transposed=True)
        if keep:
            ctx.save_for_backward(x_TD, weight_TK, gate_up_S2FD, down_SDF, kept_P2F)
            ctx.rows = rows
        return combine_rows(out_PD, weight_TK, rows, num_tokens=num_tokens, top_k=top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        from moe_runtime.kernels import grouped_backward_triton as backward
        from moe_runtime.kernels import grouped_triton as forward
        from moe_runtime.kernels.permute_triton import combine_rows, permute_rows

        x_TD, weight_TK, gate_up_S2FD, down_SDF, kept_P2F = ctx.saved_tensors
        rows, (num_tokens, top_k) = ctx.rows, weight_TK.shape
        needs_x, needs_weight, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        d_out_PD = permute_rows(grads[0], rows, top_k=top_k)
        d_hidden_PF = forward.rows_times_weights(d_out_PD, down_SDF, rows, transposed=False)
        d_gate_up_P2F, weighted_PF, d_weight_N = backward.swiglu_backward(
            d_hidden_PF, kept_P2F, weight_TK.reshape(-1), rows
        )
        d_x_TD = d_gate_up_S2FD = d_down_SDF = None
        if needs_down:
            d_down_SDF = backward.weights_gradient(d_out_PD, weighted_PF, rows)
        del d_hidden_PF, d_out_PD, weighted_PF  # what follows needs as much again
        if needs_gate_up:
            d_gate_up_S2FD = backward.weights_gradient(d_gate_up_P2F, permute_rows(x_TD, rows, top_k=top_k), rows)
        if needs_x:
            d_x_PD = forward.rows_times_weights(d_gate_up_P2F, gate_up_S2FD, rows, transposed=False)
            d_x_TD = combine_rows(d_x_PD, None, rows, num_tokens=num_tokens, top_k=top_k)
        d_weight_TK = d_weight_N.view_as(weight_TK).to(weight_TK.dtype) if needs_weight else None
        return d_x_TD, d_weight_TK, d_gate_up_S2FD, d_down_SDF, None
