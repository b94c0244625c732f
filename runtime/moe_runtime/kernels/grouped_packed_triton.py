"""The products of `grouped_triton` with weights of few bits (`quantise`): codes are read, numbers are multiplied.

Each equals its namesake of `grouped` on the unpacked weights, but for one rounding of a number to x's type where scales
go by group; a row's own scale is applied to the sum. The result is computed transposed: weights are then the side that
the matrix units take from registers, where codes have become numbers, and a block can have as few rows as 16.

Suffixes: T tokens, D model, F expert hidden, S slots, G groups of columns, P padded rows; M columns in, N out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from math import gcd

import torch
import triton
import triton.language as tl

from moe_core.contract.packing import Packing
from moe_core.outcome import InvalidInput
from moe_runtime.kernels.grouped_triton import (
    Tile,
    block_and_column,
    check_sides,
    descriptor,
    num_programs,
    precision_of,
    silu,
)
from moe_runtime.kernels.index import SlotRows
from moe_runtime.kernels.quantise import Packed

LEAST_DEPTH = {"Float8": 16, "Int8": 16, "Int4": 32}
"""Columns that make 16 bytes of codes, the least that a descriptor reads."""


def block_rows_for(num_picks: int, num_slots: int) -> int:
    """Rows of a block for an even spread of the picks: in decoding a slot gets a few, and codes are what takes time."""
    return next((rows for rows in (16, 64) if num_picks <= 2 * rows * num_slots), 128)


def takes(packing: Packing, *, num_columns: int) -> bool:
    """Whether rows of so many columns, packed so, can be read here."""
    least = LEAST_DEPTH.get(packing.precision)
    return least is not None and num_columns % least == 0 and packing.group_size % least == 0


def packed_tile(dtype: torch.dtype, block_rows: int, packing: Packing) -> Tile:
    """What was fastest on an H100 (tests/bench/README.md). Raises InvalidInput on groups that no tile fits into."""
    is_wide = dtype == torch.float32  # what it is split into takes registers
    depth = (128 if block_rows <= 16 else 64) // (2 if is_wide else 1)
    if packing.group_size:
        depth = gcd(depth, packing.group_size)
    if depth % LEAST_DEPTH[packing.precision]:
        raise InvalidInput(
            f"group_size of {packing.precision} must be a multiple of {LEAST_DEPTH[packing.precision]} here, "
            f"not {packing.group_size}"
        )
    if block_rows >= 128:
        return Tile(columns=128 if is_wide else 256, depth=depth)
    return Tile(columns=128, depth=depth, num_warps=4, residents=6 if block_rows > 16 else 4)


@triton.jit
def _numbers(codes, scale_ptr, in_range, k, GROUP: tl.constexpr, NIBBLES: tl.constexpr, dtype: tl.constexpr):
    """[N, DEPTH] in `dtype`, times their group's scale where scales go by group."""
    if NIBBLES:
        numbers = tl.join(_of_nibbles(codes & 15, dtype), _of_nibbles(codes >> 4, dtype))
        numbers = numbers.reshape(codes.shape[0], 2 * codes.shape[1])
    else:
        numbers = codes.to(dtype)
    if GROUP:
        scale = tl.load(scale_ptr + k // GROUP, mask=in_range, other=0.0)[:, None]
        if scale.dtype == dtype:
            return numbers * scale
        return (numbers.to(tl.float32) * scale.to(tl.float32)).to(dtype)
    return numbers


@triton.jit
def _of_nibbles(nibbles, dtype: tl.constexpr):
    """Value - 8. A nibble is the last bits of the number 128 (bfloat16) or 1024 (float16) and itself: converting an
    integer takes four times as long as such a subtraction.
    """
    if dtype == tl.bfloat16:
        return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    if dtype == tl.float16:
        return (nibbles.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return (nibbles.to(tl.int8) - 8).to(dtype)


@triton.jit(do_not_specialize=["num_slots", "num_picks", "top_k"])
def _packed_kernel(
    a,
    codes,
    scale_ptr,
    out,
    pick_ptr,
    slot_ptr,
    start_ptr,
    num_slots,
    num_picks,
    top_k,
    M,
    N,
    G,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_TURN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # GATED: gate and up of a slot are two matrices of N rows, a tile takes COLUMNS / 2 of each
    PARTS: tl.constexpr = 2 if GATED else 1
    PART: tl.constexpr = COLUMNS // PARTS
    num_blocks = tl.load(start_ptr + num_slots) // ROWS
    num_columns = tl.cdiv(N, PART)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, PROGRAMS):
        block, column = block_and_column(tile, num_blocks, num_columns, IN_TURN)
        slot = tl.load(slot_ptr + block)
        if GATHER:
            pick = tl.load(pick_ptr + block * ROWS + tl.arange(0, ROWS))
            served = (pick < num_picks)[:, None]
            token = tl.where(pick < num_picks, pick // top_k, 0)
            depth = tl.arange(0, DEPTH)[None, :]
            a_ptr = a + token[:, None].to(tl.int64) * M + depth
        part = tl.arange(0, COLUMNS) // PART
        n = column * PART + tl.arange(0, COLUMNS) % PART
        scales = scale_ptr + ((slot * PARTS + part).to(tl.int64) * N + n) * G
        sums = tl.zeros((COLUMNS, ROWS), tl.float32)
        for k in range(0, M, DEPTH):
            if GATHER:
                mask = served if WHOLE else served & (depth + k < M)
                right = tl.load(a_ptr + k, mask=mask, other=0.0)
            else:
                right = a.load([block * ROWS, k])
            if NIBBLES:
                packed = codes.load([slot * PARTS, column * PART, k // 2]).reshape(COLUMNS, DEPTH // 2)
            else:
                packed = codes.load([slot * PARTS, column * PART, k]).reshape(COLUMNS, DEPTH)
            left = _numbers(packed, scales, n < N, k, GROUP, NIBBLES, out.dtype)
            sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
        if not GROUP:
            sums *= tl.load(scales, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            gate, up = sums.reshape(2, PART, ROWS).permute(1, 2, 0).split()
            sums = silu(gate) * up
        out.store([block * ROWS, column * PART], sums.to(out.dtype).T)


def gate_up_packed(
    x: torch.Tensor,
    gate_up: Packed,
    packing: Packing,
    rows: SlotRows,
    *,
    gather_top_k: int | None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[P, F] as `grouped_triton.gate_up`; codes [S, 2F, ..]. Raises InvalidInput on sides or groups it cannot read."""
    return _run(x, gate_up, packing, rows, gather_top_k=gather_top_k, is_gated=True, tile=tile)


def rows_times_packed(
    a_PM: torch.Tensor, weight: Packed, packing: Packing, rows: SlotRows, *, tile: Tile | None = None
) -> torch.Tensor:
    """[P, N] each row times its slot's weight, codes [S, N, ..]. Raises InvalidInput on what it cannot read."""
    return _run(a_PM, weight, packing, rows, gather_top_k=None, is_gated=False, tile=tile)


def _run(
    a: torch.Tensor,
    weight: Packed,
    packing: Packing,
    rows: SlotRows,
    *,
    gather_top_k: int | None,
    is_gated: bool,
    tile: Tile | None,
) -> torch.Tensor:
    assert weight.scales is not None
    codes, m, parts = weight.codes, a.shape[1], 2 if is_gated else 1
    num_slots, n = codes.shape[0], codes.shape[1] // parts
    check_sides(a.dtype, M=m, N=n)
    is_nibbles = packing.precision == "Int4"
    if m % LEAST_DEPTH[packing.precision]:
        raise InvalidInput(
            f"columns of {packing.precision} must be a multiple of {LEAST_DEPTH[packing.precision]} here, not {m}"
        )
    tile = tile or packed_tile(a.dtype, rows.block_rows, packing)
    box = (parts, tile.columns // parts, tile.depth // 2 if is_nibbles else tile.depth)
    programs, out_PN = num_programs(a.device) * tile.residents, a.new_empty(rows.pick_P.shape[0], n)
    _packed_kernel[(programs,)](
        a if gather_top_k else descriptor(a, rows.block_rows, tile.depth),
        descriptor(codes.view(num_slots * parts, n, codes.shape[2]), *box),
        weight.scales,
        descriptor(out_PN, rows.block_rows, tile.columns // parts),
        rows.pick_P,
        rows.slot_of_block_B,
        rows.start_S1,
        num_slots,
        rows.row_N.shape[0],
        gather_top_k or 1,
        m,
        n,
        weight.scales.shape[2],
        ROWS=rows.block_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        IN_TURN=tile.blocks_in_turn,
        PROGRAMS=programs,
        GATHER=gather_top_k is not None,
        WHOLE=m % tile.depth == 0,
        NIBBLES=is_nibbles,
        GROUP=packing.group_size,
        GATED=is_gated,
        PRECISION=precision_of(a.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_PN
