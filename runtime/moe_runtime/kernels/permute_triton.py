"""Permute and combine on a GPU. All go by token, so that a token's row passes through memory once and its K rows once
each: tokens are read in order, and in the order of slots each would be fetched K times. Programs after those of the
tokens write zeros where rows serve no pick.

Suffixes: T tokens, D model, K picks of a token, N = T*K, P padded rows, W columns at a time; R rows, Z columns of
zeros.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.index import SlotRows

_WIDTH = 1024
_PADDING_ROWS, _PADDING_WIDTH = 16, 256


@triton.jit
def _zero_padding(part, pick_ptr, out_ptr, num_rows, num_picks, D, R: tl.constexpr, Z: tl.constexpr):
    """Rows part * R .. of those that serve no pick."""
    row_R = part * R + tl.arange(0, R)
    is_padding_R = tl.load(pick_ptr + row_R, mask=row_R < num_rows, other=0) >= num_picks
    if tl.max(is_padding_R.to(tl.int32), axis=0) > 0:
        for first in range(0, D, Z):
            at_Z = first + tl.arange(0, Z)
            ptr_RZ = out_ptr + row_R.to(tl.int64)[:, None] * D + at_Z[None, :]
            zero_RZ = tl.zeros([R, Z], dtype=out_ptr.dtype.element_ty)
            tl.store(ptr_RZ, zero_RZ, mask=is_padding_R[:, None] & (at_Z < D)[None, :])


@triton.jit
def _permute(
    x_ptr,
    row_ptr,
    pick_ptr,
    out_ptr,
    num_tokens,
    num_rows,
    D,
    K: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    Z: tl.constexpr,
):
    token = tl.program_id(0)
    if token < num_tokens:
        for first in range(0, D, W):
            at_W = first + tl.arange(0, W)
            x_W = tl.load(x_ptr + token.to(tl.int64) * D + at_W, mask=at_W < D, other=0.0)
            for k in tl.static_range(K):
                row = tl.load(row_ptr + token * K + k)
                tl.store(out_ptr + row.to(tl.int64) * D + at_W, x_W, mask=at_W < tl.where(row >= 0, D, 0))
    else:
        _zero_padding(token - num_tokens, pick_ptr, out_ptr, num_rows, num_tokens * K, D, R, Z)


@triton.jit
def _combine(y_ptr, weight_ptr, row_ptr, out_ptr, D, K: tl.constexpr, WEIGHTED: tl.constexpr, W: tl.constexpr):
    token = tl.program_id(0)
    at_W = tl.program_id(1) * W + tl.arange(0, W)
    sum_W = tl.zeros([W], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token * K + k)
        # no branch: the loads of all picks are under way together
        mask_W = at_W < tl.where(row >= 0, D, 0)
        y_W = tl.load(y_ptr + row.to(tl.int64) * D + at_W, mask=mask_W, other=0.0).to(tl.float32)
        if WEIGHTED:
            y_W *= tl.load(weight_ptr + token * K + k).to(tl.float32)
        sum_W += tl.where(row >= 0, y_W, 0.0)  # a pick without a row gives nothing, whatever its weight is
    tl.store(out_ptr + token.to(tl.int64) * D + at_W, sum_W.to(out_ptr.dtype.element_ty), mask=at_W < D)


@triton.jit
def _combine_backward(
    grad_ptr,
    y_ptr,
    weight_ptr,
    row_ptr,
    pick_ptr,
    grad_y_ptr,
    grad_weight_ptr,
    num_tokens,
    num_rows,
    D,
    K: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    Z: tl.constexpr,
):
    token = tl.program_id(0)
    if token < num_tokens:
        for k in range(K):
            row = tl.load(row_ptr + token * K + k)
            weight = tl.load(weight_ptr + token * K + k).to(tl.float32)
            width = tl.where(row >= 0, D, 0)
            dot_W = tl.zeros([W], dtype=tl.float32)
            for first in range(0, D, W):
                at_W = first + tl.arange(0, W)
                # of the first pick from memory, of the others from the cache
                grad_W = tl.load(grad_ptr + token.to(tl.int64) * D + at_W, mask=at_W < D, other=0.0).to(tl.float32)
                offset_W = row.to(tl.int64) * D + at_W
                dot_W += grad_W * tl.load(y_ptr + offset_W, mask=at_W < width, other=0.0).to(tl.float32)
                grad_y_W = (grad_W * weight).to(grad_y_ptr.dtype.element_ty)
                tl.store(grad_y_ptr + offset_W, grad_y_W, mask=at_W < width)
            dot = tl.where(row >= 0, tl.sum(dot_W, axis=0), 0.0)
            tl.store(grad_weight_ptr + token * K + k, dot.to(grad_weight_ptr.dtype.element_ty))
    else:
        _zero_padding(token - num_tokens, pick_ptr, grad_y_ptr, num_rows, num_tokens * K, D, R, Z)


def _width(dim: int) -> int:
    return min(_WIDTH, int(triton.next_power_of_2(dim)))


def permute_rows(x_TD: torch.Tensor, rows: SlotRows, *, top_k: int) -> torch.Tensor:
    """Equals `permute.permute_reference`."""
    x_TD = x_TD.contiguous()
    num_tokens, dim = x_TD.shape
    num_rows = rows.pick_P.shape[0]
    out_PD = x_TD.new_empty(num_rows, dim)
    if num_rows:
        _permute[(num_tokens + triton.cdiv(num_rows, _PADDING_ROWS),)](
            x_TD,
            rows.row_N,
            rows.pick_P,
            out_PD,
            num_tokens,
            num_rows,
            dim,
            K=top_k,
            W=_width(dim),
            R=_PADDING_ROWS,
            Z=_PADDING_WIDTH,
        )
    return out_PD


def combine_rows(
    y_PD: torch.Tensor, weight_TK: torch.Tensor | None, rows: SlotRows, *, num_tokens: int, top_k: int
) -> torch.Tensor:
    """Equals `permute.combine_reference`; weight None: one for each pick."""
    y_PD, dim = y_PD.contiguous(), y_PD.shape[1]
    out_TD = y_PD.new_empty(num_tokens, dim)
    if num_tokens:
        width = _width(dim)
        _combine[(num_tokens, triton.cdiv(dim, width))](
            y_PD,
            y_PD if weight_TK is None else weight_TK.contiguous(),
            rows.row_N,
            out_TD,
            dim,
            K=top_k,
            WEIGHTED=weight_TK is not None,
            W=width,
        )
    return out_TD


def combine_backward(
    grad_TD: torch.Tensor, y_PD: torch.Tensor, weight_TK: torch.Tensor, rows: SlotRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows (zero where a row serves no pick) and weights (zero where a pick has no row)."""
    y_PD, weight_TK = y_PD.contiguous(), weight_TK.contiguous()
    (num_tokens, top_k), (num_rows, dim) = weight_TK.shape, y_PD.shape
    grad_y_PD, grad_weight_TK = torch.empty_like(y_PD), torch.empty_like(weight_TK)
    if num_tokens:
        _combine_backward[(num_tokens + triton.cdiv(num_rows, _PADDING_ROWS),)](
            grad_TD.contiguous(),
            y_PD,
            weight_TK,
            rows.row_N,
            rows.pick_P,
            grad_y_PD,
            grad_weight_TK,
            num_tokens,
            num_rows,
            dim,
            K=top_k,
            W=_width(dim),
            R=_PADDING_ROWS,
            Z=_PADDING_WIDTH,
        )
    return grad_y_PD, grad_weight_TK
