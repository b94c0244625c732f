"""Grouped matrix products over rows in the order of their slots, in Triton; each equals its namesake in `grouped`.
Import it only where a GPU's tensors are at hand (or Triton's interpreter): it imports triton.

A program stays for many tiles, one after the other, so that it reads the next tile while the last one's result leaves.
A tile lies in one block of rows, so it reads one slot's weights. They come through tensor descriptors (the copy engine
on Hopper), which want rows of 16 bytes: D and F must be multiples of 16 / itemsize. Tokens can be gathered where they
are used, and the activation is computed before the product leaves the registers: gate and up need not pass through
memory.

Products of bfloat16 and float16 are summed in float32. Those of float32 are three products of tf32 each, which give
float32's own digits, and one where torch.set_float32_matmul_precision allows it, as in torch.

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
from moe_runtime.kernels.choose import multiprocessors, properties
from moe_runtime.kernels.index import SlotRows

LARGE_BLOCK, SMALL_BLOCK = 128, 64
"""Rows of a block: 64 is the least that Hopper's matrix units take, and wastes less where slots get few rows."""
LARGE_TILE_BYTES = 227 << 10
"""Shared memory that the tiles of a large block take, which datacenter GPUs since Hopper have."""
PROGRAMS_IN_INTERPRETER = 3
"""Few, so that each goes from tile to tile there too."""
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter knows no machine instructions."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: columns and depth of a tile (its rows are the block's), how many blocks go through all
    columns before the next ones (they find the weights in the cache), Triton's own numbers, and the programs that are
    resident on a multiprocessor.
    """

    columns: int
    depth: int
    blocks_in_turn: int = 8
    num_warps: int = 8
    num_stages: int = 3
    residents: int = 1


def tile_for(dtype: torch.dtype, block_rows: int, *, columns: int, is_roomy: bool, blocks_in_turn: int = 8) -> Tile:
    """What was fastest on an H100 (tests/bench/README.md).

    columns, blocks_in_turn: of a large tile. is_roomy: registers and shared memory are left for a fourth stage.
    """
    depth = 128 // dtype.itemsize  # bytes that a descriptor's row takes at most
    if dtype == torch.float32:  # twice the bytes, and of registers for the parts that it is split into
        columns, is_roomy = columns // 2, False
    if block_rows >= LARGE_BLOCK:
        return Tile(columns, depth=depth, blocks_in_turn=blocks_in_turn, num_stages=4 if is_roomy else 3)
    if dtype == torch.float32:
        return Tile(columns, depth=depth, num_warps=4, num_stages=2, residents=2)
    return Tile(columns // 2, depth=depth, num_warps=4, residents=2)


@dataclass(frozen=True, slots=True)
class Scales:
    """Of a product of float8 numbers, float32: one for each row of the left side ([T] when rows are gathered, else [P])
    and one for each row of each slot's weight ([S, N]). The result is bfloat16.
    """

    left: torch.Tensor
    weight_SN: torch.Tensor


@triton.jit
def block_and_column(tile, num_blocks, num_columns, IN_TURN: tl.constexpr):
    turn = tile // (IN_TURN * num_columns)
    within = tile % (IN_TURN * num_columns)
    blocks = tl.minimum(num_blocks - turn * IN_TURN, IN_TURN)
    return turn * IN_TURN + within % blocks, within // blocks


@triton.jit
def silu(x):
    """Two instructions of the special units, a few units in float32's last place off; Triton's own sigmoid looks after
    extremes that these two meet anyway (exp2 gives zero or infinity, whose reciprocals are right).
    """
    if INTERPRETED:
        return x * tl.sigmoid(x)
    power = _special("ex2.approx.ftz.f32", x * -1.4426950408889634)  # exp(-x)
    return x * _special("rcp.approx.ftz.f32", 1.0 + power)


@triton.jit
def _special(name: tl.constexpr, x):
    return tl.inline_asm_elementwise(name + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["num_slots", "num_picks", "top_k"])
def _gate_up_kernel(
    x,
    gate_up,
    hidden,
    kept,
    x_scale_ptr,
    weight_scale_ptr,
    pick_ptr,
    slot_ptr,
    start_ptr,
    num_slots,
    num_picks,
    top_k,
    D,
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_TURN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.load(start_ptr + num_slots) // ROWS
    num_columns = tl.cdiv(F, COLUMNS)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, PROGRAMS, flatten=True):
        block, column = block_and_column(tile, num_blocks, num_columns, IN_TURN)
        slot = tl.load(slot_ptr + block)
        if GATHER:
            pick = tl.load(pick_ptr + block * ROWS + tl.arange(0, ROWS))
            served = (pick < num_picks)[:, None]
            token = tl.where(pick < num_picks, pick // top_k, 0)
            depth = tl.arange(0, DEPTH)[None, :]
            x_ptr = x + token[:, None].to(tl.int64) * D + depth
        # one accumulator for both halves: gate in its first columns, up in the others, so that one product feeds it
        sums = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            if GATHER:
                mask = served if WHOLE else served & (depth + k < D)
                left = tl.load(x_ptr + k, mask=mask, other=0.0)
            else:
                left = x.load([block * ROWS, k])
            right = gate_up.load([slot * 2, column * COLUMNS, k]).reshape(2 * COLUMNS, DEPTH)
            sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
        gate, up = sums.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
        if SCALED:
            row = block * ROWS + tl.arange(0, ROWS)
            row_scale = tl.load(x_scale_ptr + (token if GATHER else row))[:, None]
            n = column * COLUMNS + tl.arange(0, COLUMNS)
            of_slot = weight_scale_ptr + slot.to(tl.int64) * 2 * F + n
            gate *= row_scale * tl.load(of_slot, mask=n < F, other=0.0)[None, :]
            up *= row_scale * tl.load(of_slot + F, mask=n < F, other=0.0)[None, :]
        hidden.store([block * ROWS, column * COLUMNS], (silu(gate) * up).to(hidden.dtype))
        if KEEP:
            kept.store([block * ROWS, 0, column * COLUMNS], gate.reshape(ROWS, 1, COLUMNS).to(kept.dtype))
            kept.store([block * ROWS, 1, column * COLUMNS], up.reshape(ROWS, 1, COLUMNS).to(kept.dtype))


@triton.jit(do_not_specialize=["num_slots"])
def _rows_kernel(
    a,
    weight,
    out,
    a_scale_ptr,
    weight_scale_ptr,
    slot_ptr,
    start_ptr,
    num_slots,
    M,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_TURN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.load(start_ptr + num_slots) // ROWS
    num_columns = tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, PROGRAMS, flatten=True):
        block, column = block_and_column(tile, num_blocks, num_columns, IN_TURN)
        slot = tl.load(slot_ptr + block)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, M, DEPTH):
            left = a.load([block * ROWS, k])
            if TRANSPOSED:
                right = weight.load([slot, column * COLUMNS, k]).reshape(COLUMNS, DEPTH).T
            else:
                right = weight.load([slot, k, column * COLUMNS]).reshape(DEPTH, COLUMNS)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        if SCALED:
            n = column * COLUMNS + tl.arange(0, COLUMNS)
            row_scale = tl.load(a_scale_ptr + block * ROWS + tl.arange(0, ROWS))
            sums *= (
                row_scale[:, None]
                * tl.load(weight_scale_ptr + slot.to(tl.int64) * N + n, mask=n < N, other=0.0)[None, :]
            )
        # in halves: shared memory that the result does not take holds one more stage of the inputs
        HALF: tl.constexpr = COLUMNS // 2
        first, second = sums.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        out.store([block * ROWS, column * COLUMNS], first.to(out.dtype))
        out.store([block * ROWS, column * COLUMNS + HALF], second.to(out.dtype))


def descriptor(tensor: torch.Tensor, *box: int) -> Any:
    return TensorDescriptor.from_tensor(tensor, list(box))


def precision_of(dtype: torch.dtype) -> str:
    """Triton's name for it; without meaning for 16-bit types."""
    is_exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if is_exact else "tf32"


def num_programs(device: torch.device) -> int:
    """As many as the device runs at a time."""
    return multiprocessors(device) if device.type == "cuda" else PROGRAMS_IN_INTERPRETER


def block_rows_for(num_picks: int, num_slots: int, device: torch.device) -> int:
    """Rows of a block for an even spread of the picks, which is all that the host knows."""
    is_large = device.type == "cuda" and properties(device).shared_memory_per_block_optin >= LARGE_TILE_BYTES
    return LARGE_BLOCK if is_large and num_picks >= 2 * LARGE_BLOCK * num_slots else SMALL_BLOCK


def check_sides(dtype: torch.dtype, **sides: int) -> None:
    """Raises InvalidInput when a side is no multiple of 16 bytes, which descriptors need."""
    step = 16 // dtype.itemsize
    for name, side in sides.items():
        if side < step or side % step:
            raise InvalidInput(f"{name} must be a positive multiple of {step} for {dtype}, not {side}")


def gate_up(
    x: torch.Tensor,
    gate_up_S2FD: torch.Tensor,
    rows: SlotRows,
    *,
    gather_top_k: int | None,
    keep: bool = False,
    scales: Scales | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[P, F] silu(gate) * up, and with `keep` gate and up themselves, [P, 2F].

    x is [P, D], or [T, D] with `gather_top_k` set to K: then a row takes its token's. Equals
    swiglu(rows_times_weights(x, gate_up)) but for the rounding of gate and up, which stay in float32. Rows of unused
    blocks are not written, nor read. T at least 1. With `scales` both sides are float8. Raises InvalidInput on sides
    it cannot read.
    """
    (num_slots, two_f, d), dtype = gate_up_S2FD.shape, x.dtype
    f = two_f // 2
    check_sides(dtype, D=d, F=f)
    tile = tile or tile_for(
        dtype,
        rows.block_rows,
        columns=128,
        is_roomy=not (gather_top_k or keep),
        blocks_in_turn=4 if gather_top_k else 16,
    )
    num_rows, programs = rows.pick_P.shape[0], num_programs(x.device) * tile.residents
    out_dtype = torch.bfloat16 if scales else dtype
    hidden_PF = x.new_empty(num_rows, f, dtype=out_dtype)
    kept_P2F = x.new_empty(num_rows, two_f, dtype=out_dtype) if keep else None
    _gate_up_kernel[(programs,)](
        x if gather_top_k else descriptor(x, rows.block_rows, tile.depth),
        descriptor(gate_up_S2FD.view(num_slots * 2, f, d), 2, tile.columns, tile.depth),
        descriptor(hidden_PF, rows.block_rows, tile.columns),
        descriptor(
            (hidden_PF if kept_P2F is None else kept_P2F).view(num_rows, -1, f), rows.block_rows, 1, tile.columns
        ),
        scales.left if scales else rows.pick_P,
        scales.weight_SN if scales else rows.pick_P,
        rows.pick_P,
        rows.slot_of_block_B,
        rows.start_S1,
        num_slots,
        rows.row_N.shape[0],
        gather_top_k or 1,
        d,
        f,
        ROWS=rows.block_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        IN_TURN=tile.blocks_in_turn,
        PROGRAMS=programs,
        GATHER=gather_top_k is not None,
        WHOLE=d % tile.depth == 0,
        KEEP=keep,
        SCALED=scales is not None,
        PRECISION=precision_of(dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return hidden_PF, kept_P2F


def rows_times_weights(
    a_PM: torch.Tensor,
    weight: torch.Tensor,
    rows: SlotRows,
    *,
    transposed: bool,
    scales: Scales | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[P, N] each row times its slot's weight: [S, N, M] when `transposed` (as a linear layer's), else [S, M, N].

    Rows of unused blocks are not written; padding is what `a` makes it. With `scales` both sides are float8. Raises
    InvalidInput on sides it cannot read.
    """
    m, n = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    dtype = a_PM.dtype
    check_sides(dtype, M=m, N=n)
    tile = tile or tile_for(dtype, rows.block_rows, columns=256, is_roomy=True)
    programs = num_programs(a_PM.device) * tile.residents
    out_PN = a_PM.new_empty(rows.pick_P.shape[0], n, dtype=torch.bfloat16 if scales else dtype)
    box = (1, tile.columns, tile.depth) if transposed else (1, tile.depth, tile.columns)
    _rows_kernel[(programs,)](
        descriptor(a_PM, rows.block_rows, tile.depth),
        descriptor(weight, *box),
        descriptor(out_PN, rows.block_rows, tile.columns // 2),
        scales.left if scales else rows.slot_of_block_B,
        scales.weight_SN if scales else rows.slot_of_block_B,
        rows.slot_of_block_B,
        rows.start_S1,
        weight.shape[0],
        m,
        n,
        ROWS=rows.block_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        IN_TURN=tile.blocks_in_turn,
        PROGRAMS=programs,
        TRANSPOSED=transposed,
        SCALED=scales is not None,
        PRECISION=precision_of(dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_PN
