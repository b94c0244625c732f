"""What the backward of the experts needs beside the products of `grouped_triton`: the gradient of a slot's weights and
that of SwiGLU with the pick's weight. Each equals its namesake in `grouped`. Imports triton, as `grouped_triton` does.

Suffixes: T tokens, F expert hidden, S slots, K picks of a token, N picks, P padded rows; M, N the sides of any matrix.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.grouped_triton import Tile, check_sides, descriptor, precision_of, tile_for
from moe_runtime.kernels.index import SlotRows


@triton.jit(do_not_specialize=["num_picks", "top_k"])
def _weights_gradient_kernel(
    left,
    right,
    out,
    pick_ptr,
    start_ptr,
    num_picks,
    top_k,
    M,
    N,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(N, N_TILE)
    tiles = tl.cdiv(M, M_TILE) * num_n
    slot = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles // num_n
    n = tl.program_id(0) % num_n
    start = tl.load(start_ptr + slot)
    end = tl.load(start_ptr + slot + 1)
    columns_m = m * M_TILE + tl.arange(0, M_TILE)
    columns_n = n * N_TILE + tl.arange(0, N_TILE)
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for row in range(start, end, DEPTH):
        pick = tl.load(pick_ptr + row + tl.arange(0, DEPTH))
        served = (pick < num_picks)[:, None]
        token = tl.where(pick < num_picks, pick // top_k, 0)[:, None].to(tl.int64)
        if GATHER_LEFT:
            mask = served & (columns_m < M)[None, :]
            a = tl.load(left + token * M + columns_m[None, :], mask=mask, other=0.0)
            b = right.load([row, n * N_TILE])
        else:
            mask = served & (columns_n < N)[None, :]
            a = left.load([row, m * M_TILE])
            b = tl.load(right + token * N + columns_n[None, :], mask=mask, other=0.0)
        sums = tl.dot(a.T, b, sums, input_precision=PRECISION)
    out.store([slot, m * M_TILE, n * N_TILE], sums.reshape(1, M_TILE, N_TILE).to(out.dtype))


@triton.jit(do_not_specialize=["num_picks"])
def _swiglu_backward_kernel(
    d_hidden_ptr,
    kept_ptr,
    weight_ptr,
    d_gate_up_ptr,
    weighted_ptr,
    d_weight_ptr,
    pick_ptr,
    slot_ptr,
    num_picks,
    F,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(slot_ptr + row // ROWS) >= 0:
        pick = tl.load(pick_ptr + row)
        served = pick < num_picks
        weight = tl.load(weight_ptr + pick, mask=served, other=0.0).to(tl.float32)
        d_weight = tl.zeros((WIDTH,), tl.float32)
        for first in range(0, F, WIDTH):
            f = first + tl.arange(0, WIDTH)
            mask = f < F
            d = tl.load(d_hidden_ptr + row * F + f, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(kept_ptr + row * 2 * F + f, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(kept_ptr + row * 2 * F + F + f, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            d_gate = d * weight * up * (sigmoid + silu * (1 - sigmoid))
            tl.store(d_gate_up_ptr + row * 2 * F + f, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
            d_up = d * weight * silu
            tl.store(d_gate_up_ptr + row * 2 * F + F + f, d_up.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
            hidden = silu * up
            tl.store(weighted_ptr + row * F + f, (hidden * weight).to(weighted_ptr.dtype.element_ty), mask=mask)
            d_weight += d * hidden
        tl.store(d_weight_ptr + pick, tl.sum(d_weight), mask=served)


def weights_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    rows: SlotRows,
    *,
    top_k: int,
    gather_left: bool,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[S, M, N] sum over a slot's rows of left^T right; zero for a slot without rows.

    One side is [T, ...] and gathered by row's token (`gather_left` says which), the other [P, ...] with padding finite.
    """
    m, n = left.shape[1], right.shape[1]
    check_sides(left.dtype, M=m, N=n)
    num_slots = rows.count_S.shape[0]
    tile = tile or tile_for(left.dtype, rows.block_rows, columns=256, is_roomy=False)
    m_side, depth = min(tile.columns, 128), min(tile.depth, rows.block_rows)  # a slot's rows end with a block
    out_SMN = left.new_empty(num_slots, m, n)
    _weights_gradient_kernel[(num_slots * triton.cdiv(m, m_side) * triton.cdiv(n, tile.columns),)](
        left if gather_left else descriptor(left, depth, m_side),
        descriptor(right, depth, tile.columns) if gather_left else right,
        descriptor(out_SMN, 1, m_side, tile.columns),
        rows.pick_P,
        rows.start_S1,
        rows.row_N.shape[0],
        top_k,
        m,
        n,
        M_TILE=m_side,
        N_TILE=tile.columns,
        DEPTH=depth,
        GATHER_LEFT=gather_left,
        PRECISION=precision_of(left.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_SMN


def swiglu_backward(
    d_hidden_PF: torch.Tensor, kept_P2F: torch.Tensor, weight_N: torch.Tensor, rows: SlotRows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in the reference, but weights and their gradient are by pick: [N], zero for a pick without a row."""
    num_rows, f = d_hidden_PF.shape
    d_gate_up_P2F, weighted_PF = torch.empty_like(kept_P2F), torch.empty_like(d_hidden_PF)
    d_weight_N = torch.zeros(weight_N.shape, dtype=torch.float32, device=weight_N.device)
    _swiglu_backward_kernel[(num_rows,)](
        d_hidden_PF,
        kept_P2F,
        weight_N,
        d_gate_up_P2F,
        weighted_PF,
        d_weight_N,
        rows.pick_P,
        rows.slot_of_block_B,
        rows.row_N.shape[0],
        f,
        ROWS=rows.block_rows,
        WIDTH=min(triton.next_power_of_2(f), 1024),
        num_warps=4,
    )
    return d_gate_up_P2F, weighted_PF, d_weight_N
