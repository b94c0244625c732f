"""What the backward of the experts needs beside the products of `grouped_triton`: the gradient of a slot's weights and
that of SwiGLU with the pick's weight. Each equals its namesake in `grouped`. Imports triton, as `grouped_triton` does.

Suffixes: F expert hidden, S slots, N picks, P padded rows; M, N also the sides of any matrix.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.grouped_triton import Tile, check_sides, descriptor, num_programs, precision_of, tile_for
from moe_runtime.kernels.index import SlotRows


@triton.jit(do_not_specialize=["num_slots"])
def _weights_gradient_kernel(
    left,
    right,
    out,
    start_ptr,
    num_slots,
    M,
    N,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(N, N_TILE)
    num_tiles = tl.cdiv(M, M_TILE) * num_n
    for tile in tl.range(tl.program_id(0), num_slots * num_tiles, PROGRAMS):
        slot, m, n = tile // num_tiles, tile % num_tiles // num_n * M_TILE, tile % num_n * N_TILE
        start = tl.load(start_ptr + slot)
        end = tl.load(start_ptr + slot + 1)
        sums = tl.zeros((M_TILE, N_TILE), tl.float32)
        for row in range(start, end, DEPTH):
            sums = tl.dot(left.load([row, m]).T, right.load([row, n]), sums, input_precision=PRECISION)
        HALF: tl.constexpr = N_TILE // 2
        first, second = sums.reshape(M_TILE, 2, HALF).permute(0, 2, 1).split()
        out.store([slot, m, n], first.reshape(1, M_TILE, HALF).to(out.dtype))
        out.store([slot, m, n + HALF], second.reshape(1, M_TILE, HALF).to(out.dtype))


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
    left_PM: torch.Tensor, right_PN: torch.Tensor, rows: SlotRows, *, tile: Tile | None = None
) -> torch.Tensor:
    """[S, M, N] sum over a slot's rows of left^T right; zero for a slot without rows. Padding must be zero on one side
    and finite on the other. Raises InvalidInput on sides it cannot read.
    """
    m, n, dtype = left_PM.shape[1], right_PN.shape[1], left_PM.dtype
    check_sides(dtype, M=m, N=n)
    num_slots = rows.count_S.shape[0]
    tile = tile or tile_for(dtype, rows.block_rows, columns=256, is_roomy=False)
    m_side = min(tile.columns, 16 * tile.num_warps)
    depth = min(tile.depth, rows.block_rows)  # a slot's rows end with a block
    programs = num_programs(left_PM.device) * tile.residents
    out_SMN = left_PM.new_empty(num_slots, m, n)
    _weights_gradient_kernel[(programs,)](
        descriptor(left_PM, depth, m_side),
        descriptor(right_PN, depth, tile.columns),
        descriptor(out_SMN, 1, m_side, tile.columns // 2),
        rows.start_S1,
        num_slots,
        m,
        n,
        M_TILE=m_side,
        N_TILE=tile.columns,
        DEPTH=depth,
        PROGRAMS=programs,
        PRECISION=precision_of(dtype),
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
