"""Index of picks on a GPU: a stable counting sort in three launches, no host in between.

    1. each chunk of C picks counts its slots, and each pick the earlier ones of its chunk with the same slot
    2. per slot, the chunks' counts become the picks in earlier chunks
    3. rows: slot's start + picks in earlier chunks + picks earlier in the chunk; blocks and padding are told beside it

Reads N slots and writes N + P rows, 4 bytes each; the table of chunks (S * N / C of 4 bytes) is written and read twice.

Suffixes: N picks, S slots (Z: rounded up to a power of two), C picks of a chunk, H chunks, B blocks, P padded rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.index import SlotRows, most_blocks

_CHUNK = 128
_WARPS = 4
_SCAN_CHUNKS = 2048
_FILL = 1024
_TAIL_PROGRAMS = 16
_MIN_BINS = 32  # of tl.histogram


@triton.jit
def _count_chunks(
    slot_ptr, earlier_ptr, count_SH_ptr, num_picks, num_slots, num_chunks, C: tl.constexpr, Z: tl.constexpr
):
    chunk = tl.program_id(0)
    at_C = tl.arange(0, C)
    pick_C = chunk * C + at_C
    slot_C = tl.load(slot_ptr + pick_C, mask=pick_C < num_picks, other=-1).to(tl.int32)
    is_kept_C = (slot_C >= 0) & (slot_C < num_slots)
    # does the row's pick come before the column's and go to the same slot: sums down columns stay in their threads
    same_CC = (slot_C[:, None] == slot_C[None, :]) & (at_C[:, None] < at_C[None, :])
    tl.store(earlier_ptr + pick_C, tl.sum(same_CC.to(tl.int32), axis=0), mask=pick_C < num_picks)
    count_Z = tl.histogram(tl.where(is_kept_C, slot_C, 0), Z, mask=is_kept_C)
    at_Z = tl.arange(0, Z)
    tl.store(count_SH_ptr + at_Z.to(tl.int64) * num_chunks + chunk, count_Z, mask=at_Z < num_slots)


@triton.jit
def _scan_chunks(count_SH_ptr, count_S_ptr, num_chunks, H: tl.constexpr):
    slot = tl.program_id(0)
    row_ptr = count_SH_ptr + slot.to(tl.int64) * num_chunks
    total = 0
    for first in range(0, num_chunks, H):
        chunk_H = first + tl.arange(0, H)
        count_H = tl.load(row_ptr + chunk_H, mask=chunk_H < num_chunks, other=0)
        tl.store(row_ptr + chunk_H, total + tl.cumsum(count_H, axis=0) - count_H, mask=chunk_H < num_chunks)
        total += tl.sum(count_H, axis=0)
    tl.store(count_S_ptr + slot, total)


@triton.jit
def _place(
    slot_ptr,
    earlier_ptr,
    count_SH_ptr,
    count_S_ptr,
    pick_P_ptr,
    row_N_ptr,
    slot_of_block_ptr,
    start_ptr,
    num_picks,
    num_slots,
    num_chunks,
    num_blocks,
    M: tl.constexpr,
    C: tl.constexpr,
    Z: tl.constexpr,
    F: tl.constexpr,
    TAIL: tl.constexpr,
):
    program = tl.program_id(0)
    at_Z = tl.arange(0, Z)
    count_Z = tl.load(count_S_ptr + at_Z, mask=at_Z < num_slots, other=0)
    blocks_Z = (count_Z + M - 1) // M
    end_Z = tl.cumsum(blocks_Z, axis=0)
    start_Z = (end_Z - blocks_Z) * M
    if program < num_chunks:
        pick_C = program * C + tl.arange(0, C)
        slot_C = tl.load(slot_ptr + pick_C, mask=pick_C < num_picks, other=-1).to(tl.int32)
        is_kept_C = (slot_C >= 0) & (slot_C < num_slots)
        at_C = tl.where(is_kept_C, slot_C, 0)
        row_C = tl.gather(start_Z, at_C, axis=0)
        row_C += tl.load(count_SH_ptr + at_C.to(tl.int64) * num_chunks + program, mask=is_kept_C, other=0)
        row_C += tl.load(earlier_ptr + pick_C, mask=is_kept_C, other=0)
        tl.store(row_N_ptr + pick_C, tl.where(is_kept_C, row_C, -1), mask=pick_C < num_picks)
        tl.store(pick_P_ptr + row_C, pick_C, mask=is_kept_C)
    else:
        # a program per slot tells its blocks and its padding; the last ones share what no slot uses
        slot = tl.minimum(program - num_chunks, num_slots)
        first_block = tl.sum(tl.where(at_Z < slot, blocks_Z, 0), axis=0)
        used = tl.sum(tl.where(at_Z == slot, count_Z, 0), axis=0)
        end_block = first_block + (used + M - 1) // M
        value, share, shares = slot, 0, 1
        if slot == num_slots:
            end_block, value = num_blocks, -1
            share, shares = program - num_chunks - num_slots, TAIL
        at_F = tl.arange(0, F)
        for block in range(first_block + share * F, end_block, shares * F):
            tl.store(slot_of_block_ptr + block + at_F, value + at_F * 0, mask=block + at_F < end_block)
        for row in range(first_block * M + used + share * F, end_block * M, shares * F):
            tl.store(pick_P_ptr + row + at_F, num_picks + at_F * 0, mask=row + at_F < end_block * M)
        if share == 0:
            tl.store(start_ptr + slot, first_block * M)


def index_rows_triton(slot_N: torch.Tensor, *, num_slots: int, block_rows: int) -> SlotRows:
    """Equals `index.index_rows_reference`, bit by bit."""
    slot_N = slot_N.contiguous()
    num_picks, device = slot_N.numel(), slot_N.device
    num_blocks = most_blocks(num_picks, num_slots=num_slots, block_rows=block_rows)
    num_chunks = triton.cdiv(num_picks, _CHUNK)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    rows = SlotRows(
        block_rows=block_rows,
        pick_P=ints(num_blocks * block_rows),
        row_N=ints(num_picks),
        slot_of_block_B=ints(num_blocks),
        start_S1=ints(num_slots + 1),
        count_S=ints(num_slots),
    )
    earlier_N, count_SH = ints(num_picks), ints(num_slots, num_chunks)
    bins = max(_MIN_BINS, triton.next_power_of_2(num_slots))
    if num_chunks:
        _count_chunks[(num_chunks,)](
            slot_N, earlier_N, count_SH, num_picks, num_slots, num_chunks, C=_CHUNK, Z=bins, num_warps=_WARPS
        )
    _scan_chunks[(num_slots,)](count_SH, rows.count_S, num_chunks, H=_SCAN_CHUNKS)
    _place[(num_chunks + num_slots + _TAIL_PROGRAMS,)](
        slot_N,
        earlier_N,
        count_SH,
        rows.count_S,
        rows.pick_P,
        rows.row_N,
        rows.slot_of_block_B,
        rows.start_S1,
        num_picks,
        num_slots,
        num_chunks,
        num_blocks,
        M=block_rows,
        C=_CHUNK,
        Z=bins,
        F=_FILL,
        TAIL=_TAIL_PROGRAMS,
    )
    return rows
