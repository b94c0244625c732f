"""Tokens to rows in the order of their slots (permute), and the rows' results back, weighted and summed (combine).

Each is the other's backward: permute's gradient is a combine of weight one, combine's is a weighted permute. Sums are
float32 whatever the rows' precision, and go by pick, so that they are the same bits each time.

Suffixes: T tokens, D model, K picks of a token, N = T*K, P padded rows (`index`).
"""

from typing import Any

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.kernels.choose import runs_triton
from moe_runtime.kernels.index import SlotRows


def permute_reference(x_TD: torch.Tensor, rows: SlotRows, *, top_k: int) -> torch.Tensor:
    """[P, D] each row's token; zero where a row serves no pick."""
    is_served_P = rows.pick_P < rows.row_N.shape[0]
    token_P = torch.where(is_served_P, rows.pick_P, 0).long() // top_k
    return torch.where(is_served_P.unsqueeze(-1), x_TD[token_P], 0)


def combine_reference(y_PD: torch.Tensor, weight_TK: torch.Tensor, rows: SlotRows) -> torch.Tensor:
    """[T, D] sum over a token's picks of weight * row, in the rows' type; picks without a row give nothing."""
    row_TK = rows.row_N.view(weight_TK.shape).long()
    has_row_TK1 = (row_TK >= 0).unsqueeze(-1)
    y_TKD = torch.where(has_row_TK1, y_PD[row_TK.clamp_min(0)].float(), 0.0)
    return (y_TKD * weight_TK.float().unsqueeze(-1)).sum(dim=1).to(y_PD.dtype)


def permute(x_TD: torch.Tensor, rows: SlotRows, *, top_k: int) -> torch.Tensor:
    """[P, D], differentiable in x. Raises InvalidInput when the index is not of T * top_k picks."""
    _check(rows, x_TD.shape[0], top_k)
    if runs_triton(x_TD):
        permuted: torch.Tensor = _Permute.apply(x_TD, rows, top_k)
        return permuted
    return permute_reference(x_TD, rows, top_k=top_k)


def combine(y_PD: torch.Tensor, weight_TK: torch.Tensor, rows: SlotRows) -> torch.Tensor:
    """[T, D], differentiable in rows and weights. Raises InvalidInput when the index is not of these picks."""
    _check(rows, *weight_TK.shape)
    if runs_triton(y_PD):
        combined: torch.Tensor = _Combine.apply(y_PD, weight_TK, rows)
        return combined
    return combine_reference(y_PD, weight_TK, rows)


def _check(rows: SlotRows, num_tokens: int, top_k: int) -> None:
    if rows.row_N.shape[0] != num_tokens * top_k:
        raise InvalidInput(f"the index is of {rows.row_N.shape[0]} picks, not of {num_tokens} tokens x {top_k}")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, rows: SlotRows, top_k: int) -> torch.Tensor:
        from moe_runtime.kernels.permute_triton import permute_rows

        ctx.rows, ctx.num_tokens, ctx.top_k = rows, x_TD.shape[0], top_k
        return permute_rows(x_TD.detach(), rows, top_k=top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_PD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from moe_runtime.kernels.permute_triton import combine_rows

        return combine_rows(grad_PD, None, ctx.rows, num_tokens=ctx.num_tokens, top_k=ctx.top_k), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, weight_TK: torch.Tensor, rows: SlotRows) -> torch.Tensor:
        from moe_runtime.kernels.permute_triton import combine_rows

        ctx.save_for_backward(y_PD, weight_TK)
        ctx.rows = rows
        num_tokens, top_k = weight_TK.shape
        return combine_rows(y_PD.detach(), weight_TK.detach(), rows, num_tokens=num_tokens, top_k=top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from moe_runtime.kernels.permute_triton import combine_backward

        y_PD, weight_TK = ctx.saved_tensors
        return *combine_backward(grad_TD, y_PD, weight_TK, ctx.rows), None
