"""Grouped matrix products over rows in the order of their slots, in Triton; each equals its namesake in
`grouped`. Import it only where a GPU's tensors are at hand (or Triton's interpreter): it imports triton.

A program computes one tile of one block of rows, so it reads one slot's weights. Weights come through tensor
descriptors (the copy engine on Hopper), which want rows of 16 bytes: D and F must be multiples of 16 / itemsize. Tokens
are gathered where they are used, and the activation is computed before the product leaves the registers, so that
neither a permuted copy of the tokens nor the gate and up projections pass through memory.

float32 is computed in float32 (not tf32); products of bfloat16 and float16 are summed in float32.

Suffixes: T tokens, D model, F expert hidden, S slots, K picks of a token, B blocks, P padded rows; M, N any side.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_core.outcome import InvalidInput
from moe_runtime.kernels.index import SlotRows


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: columns and depth of a tile (its rows are the block's), blocks that share the weights'
    columns in a row of programs, and Triton's own numbers.
    """

    columns: int
    depth: int
    blocks_in_turn: int = 8
    num_warps: int = 8
    num_stages: int = 3


def tile_for(dtype: torch.dtype, block_rows: int) -> Tile:
    """What was fastest on an H100 (tests/bench/README.md) for 16-bit types; float32 is for exactness, not for speed."""
    if dtype == torch.float32:
        return Tile(columns=32, depth=32, num_warps=4, num_stages=2)
    if block_rows >= 128:
        return Tile(columns=128, depth=64, num_stages=4)
    return Tile(columns=64, depth=64, num_warps=4, num_stages=4)


@triton.jit
def _block_and_column(num_blocks, num_columns, IN_TURN: tl.constexpr):
    """Blocks of a turn go through all columns before the next turn's: they find the weights in the cache."""
    program = tl.program_id(0)
    turn = program // (IN_TURN * num_columns)
    within = program % (IN_TURN * num_columns)
    blocks = tl.minimum(num_blocks - turn * IN_TURN, IN_TURN)
    return turn * IN_TURN + within % blocks, within // blocks


@triton.jit(do_not_specialize=["num_picks", "top_k", "num_blocks"])
def _gate_up_kernel(
    x_ptr,
    gate_up,
    hidden,
    kept,
    pick_ptr,
    slot_ptr,
    num_picks,
    top_k,
    D,
    F,
    num_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_TURN: tl.constexpr,
    WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, column = _block_and_column(num_blocks, tl.cdiv(F, COLUMNS), IN_TURN)
    slot = tl.load(slot_ptr + block)
    if slot >= 0:
        pick = tl.load(pick_ptr + block * ROWS + tl.arange(0, ROWS))
        served = (pick < num_picks)[:, None]
        token = tl.where(pick < num_picks, pick // top_k, 0)
        depth = tl.arange(0, DEPTH)[None, :]
        x = x_ptr + token[:, None].to(tl.int64) * D + depth
        # one accumulator for both halves: gate in its first columns, up in the others, so that one product feeds it
        sums = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            mask = served if WHOLE else served & (depth + k < D)
            a = tl.load(x + k, mask=mask, other=0.0)
            w = gate_up.load([slot * 2, column * COLUMNS, k]).reshape(2 * COLUMNS, DEPTH)
            sums = tl.dot(a, w.T, sums, input_precision=PRECISION)
        gate, up = sums.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
        hidden.store([block * ROWS, column * COLUMNS], (gate * tl.sigmoid(gate) * up).to(hidden.dtype))
        if KEEP:
            at = [block * ROWS, 0, column * COLUMNS]
            kept.store(at, sums.reshape(ROWS, 2, COLUMNS).to(kept.dtype))


@triton.jit(do_not_specialize=["num_picks", "top_k", "num_blocks"])
def _rows_kernel(
    a,
    weight,
    out,
    pick_ptr,
    slot_ptr,
    num_picks,
    top_k,
    M,
    N,
    num_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_TURN: tl.constexpr,
    WHOLE: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, column = _block_and_column(num_blocks, tl.cdiv(N, COLUMNS), IN_TURN)
    slot = tl.load(slot_ptr + block)
    if slot >= 0:
        depth = tl.arange(0, DEPTH)[None, :]
        if GATHER:
            pick = tl.load(pick_ptr + block * ROWS + tl.arange(0, ROWS))
            served = (pick < num_picks)[:, None]
            token = tl.where(pick < num_picks, pick // top_k, 0)
            a_ptr = a + token[:, None].to(tl.int64) * M + depth
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, M, DEPTH):
            if GATHER:
                mask = served if WHOLE else served & (depth + k < M)
                left = tl.load(a_ptr + k, mask=mask, other=0.0)
            else:
                left = a.load([block * ROWS, k])
            if TRANSPOSED:
                right = weight.load([slot, column * COLUMNS, k]).reshape(COLUMNS, DEPTH).T
            else:
                right = weight.load([slot, k, column * COLUMNS]).reshape(DEPTH, COLUMNS)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        out.store([block * ROWS, column * COLUMNS], sums.to(out.dtype))


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


def _descriptor(tensor: torch.Tensor, *box: int) -> Any:
    return TensorDescriptor.from_tensor(tensor, list(box))


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # of no meaning for 16-bit types


def check_sides(dtype: torch.dtype, **sides: int) -> None:
    """Raises InvalidInput when a side is no multiple of 16 bytes, which descriptors need."""
    step = 16 // dtype.itemsize
    for name, side in sides.items():
        if side < step or side % step:
            raise InvalidInput(f"{name} must be a positive multiple of {step} for {dtype}, not {side}")


def gate_up(
    x_TD: torch.Tensor,
    gate_up_S2FD: torch.Tensor,
    rows: SlotRows,
    *,
    top_k: int,
    keep: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[P, F] silu(gate) * up of each row's token, and with `keep` gate and up themselves, [P, 2F].

    Equals swiglu(rows_times_weights(gather_rows(x), gate_up)) but for the rounding of gate and up, which stay in
    float32. Rows of unused blocks are not written. T and N at least 1. Raises InvalidInput on sides it cannot read.
    """
    (num_slots, two_f, d), dtype = gate_up_S2FD.shape, x_TD.dtype
    f = two_f // 2
    check_sides(dtype, D=d, F=f)
    tile = tile or tile_for(dtype, rows.block_rows)
    num_rows, num_blocks = rows.pick_P.shape[0], rows.slot_of_block_B.shape[0]
    hidden_PF = x_TD.new_empty(num_rows, f)
    kept_P2F = x_TD.new_empty(num_rows, two_f) if keep else hidden_PF
    weights = _descriptor(gate_up_S2FD.view(num_slots * 2, f, d), 2, tile.columns, tile.depth)
    kept = _descriptor(kept_P2F.view(num_rows, -1, f), rows.block_rows, 2 if keep else 1, tile.columns)
    _gate_up_kernel[(num_blocks * triton.cdiv(f, tile.columns),)](
        x_TD,
        weights,
        _descriptor(hidden_PF, rows.block_rows, tile.columns),
        kept,
        rows.pick_P,
        rows.slot_of_block_B,
        rows.row_N.shape[0],
        top_k,
        d,
        f,
        num_blocks,
        ROWS=rows.block_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        IN_TURN=tile.blocks_in_turn,
        WHOLE=d % tile.depth == 0,
        KEEP=keep,
        PRECISION=_precision(dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return hidden_PF, kept_P2F if keep else None


def rows_times_weights(
    a: torch.Tensor,
    weight: torch.Tensor,
    rows: SlotRows,
    *,
    transposed: bool,
    gather_top_k: int | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[P, N] each row times its slot's weight: [S, N, M] when `transposed` (as a linear layer's), else [S, M, N].

    `a` is [P, M], or [T, M] with `gather_top_k` set to K: then a row takes its token's. Rows of unused blocks are not
    written; padding is zero when gathered, else what `a` makes it. Raises InvalidInput on sides it cannot read.
    """
    m, n = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    dtype = a.dtype
    check_sides(dtype, M=m, N=n)
    tile = tile or tile_for(dtype, rows.block_rows)
    num_rows, num_blocks = rows.pick_P.shape[0], rows.slot_of_block_B.shape[0]
    out_PN = a.new_empty(num_rows, n)
    gathered = gather_top_k is not None
    box = (1, tile.columns, tile.depth) if transposed else (1, tile.depth, tile.columns)
    _rows_kernel[(num_blocks * triton.cdiv(n, tile.columns),)](
        a if gathered else _descriptor(a, rows.block_rows, tile.depth),
        _descriptor(weight, *box),
        _descriptor(out_PN, rows.block_rows, tile.columns),
        rows.pick_P,
        rows.slot_of_block_B,
        rows.row_N.shape[0],
        gather_top_k or 1,
        m,
        n,
        num_blocks,
        ROWS=rows.block_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        IN_TURN=tile.blocks_in_turn,
        WHOLE=m % tile.depth == 0,
        GATHER=gathered,
        TRANSPOSED=transposed,
        PRECISION=_precision(dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_PN


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
    small = left.dtype == torch.float32
    tile = tile or Tile(columns=32 if small else 128, depth=min(rows.block_rows, 32 if small else 64))
    out_SMN = left.new_empty(num_slots, m, n)
    side = tile.columns
    _weights_gradient_kernel[(num_slots * triton.cdiv(m, side) * triton.cdiv(n, side),)](
        left if gather_left else _descriptor(left, tile.depth, side),
        _descriptor(right, tile.depth, side) if gather_left else right,
        _descriptor(out_SMN, 1, side, side),
        rows.pick_P,
        rows.start_S1,
        rows.row_N.shape[0],
        top_k,
        m,
        n,
        M_TILE=side,
        N_TILE=side,
        DEPTH=tile.depth,
        GATHER_LEFT=gather_left,
        PRECISION=_precision(left.dtype),
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
