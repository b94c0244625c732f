"""Permute and combine on a GPU: each reads and writes every row once; a token's row is read again from the cache.

Suffixes: T tokens, D model, K picks of a token, N = T*K, P padded rows, W columns at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.index import SlotRows

_WIDTH = 1024


@triton.jit
def _permute(x_ptr, pick_ptr, out_ptr, num_picks, top_k, D, W: tl.constexpr):
    row = tl.program_id(0)
    pick = tl.load(pick_ptr + row)
    is_served = pick < num_picks
    from_ptr = x_ptr + tl.where(is_served, pick // top_k, 0).to(tl.int64) * D
    to_ptr = out_ptr + row.to(tl.int64) * D
    width = tl.where(is_served, D, 0)
    for first in range(0, D, W):
        at_W = first + tl.arange(0, W)
        tl.store(to_ptr + at_W, tl.load(from_ptr + at_W, mask=at_W < width, other=0.0), mask=at_W < D)


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
    pick_ptr,
    grad_y_ptr,
    grad_weight_ptr,
    num_picks,
    top_k,
    D,
    W: tl.constexpr,
):
    row = tl.program_id(0)
    pick = tl.load(pick_ptr + row)
    is_served = pick < num_picks
    weight = tl.load(weight_ptr + pick, mask=is_served, other=0.0).to(tl.float32)
    from_ptr = grad_ptr + tl.where(is_served, pick // top_k, 0).to(tl.int64) * D
    offset = row.to(tl.int64) * D
    width = tl.where(is_served, D, 0)
    dot_W = tl.zeros([W], dtype=tl.float32)
    for first in range(0, D, W):
        at_W = first + tl.arange(0, W)
        mask_W = at_W < width
        grad_W = tl.load(from_ptr + at_W, mask=mask_W, other=0.0).to(tl.float32)
        dot_W += grad_W * tl.load(y_ptr + offset + at_W, mask=mask_W, other=0.0).to(tl.float32)
        tl.store(grad_y_ptr + offset + at_W, (grad_W * weight).to(grad_y_ptr.dtype.element_ty), mask=at_W < D)
    tl.store(grad_weight_ptr + pick, tl.sum(dot_W, axis=0).to(grad_weight_ptr.dtype.element_ty), mask=is_served)


def _width(dim: int) -> int:
    return min(_WIDTH, int(triton.next_power_of_2(dim)))


def permute_rows(x_TD: torch.Tensor, rows: SlotRows, *, top_k: int) -> torch.Tensor:
    """Equals `permute.permute_reference`."""
    x_TD = x_TD.contiguous()
    num_rows, dim = rows.pick_P.shape[0], x_TD.shape[1]
    out_PD = x_TD.new_empty(num_rows, dim)
    if num_rows:
        _permute[(num_rows,)](x_TD, rows.pick_P, out_PD, rows.row_N.shape[0], top_k, dim, W=_width(dim))
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
    num_rows, dim = y_PD.shape
    grad_y_PD, grad_weight_TK = torch.empty_like(y_PD), torch.zeros_like(weight_TK)
    if num_rows:
        _combine_backward[(num_rows,)](
            grad_TD.contiguous(),
            y_PD,
            weight_TK,
            rows.pick_P,
            grad_y_PD,
            grad_weight_TK,
            rows.row_N.shape[0],
            weight_TK.shape[1],
            dim,
            W=_width(dim),
        )
    return grad_y_PD, grad_weight_TK
