"""Picks put in the order of their slots, padded to whole blocks: what permute, grouped GEMM and combine agree on.

A block of rows belongs to one slot, so a kernel that computes one block reads one slot's weights and masks nothing. The
number of blocks is bounded by what the host knows (picks, slots), so nothing here waits for the device; blocks past the
used ones say so. Rows of a slot keep the order of their picks: the same picks give the same rows, bit by bit.
Idea: the padded, block-mapped layout of MegaBlocks' dropless MoE (Gale et al. 2022).

Suffixes: T tokens, K picks of a token, N = T*K picks, S slots, B blocks, P = B * block_rows padded rows.
"""

from dataclasses import dataclass

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.kernels.choose import runs_triton

NO_SLOT = -1
"""Slot of a pick that nobody takes here, row of such a pick, and slot of an unused block."""


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Which row serves which pick; every tensor is int32 on the picks' device.

    block_rows       rows of a block
    pick_P           [P] pick t * K + k that a row serves; N (one past the last) where the row is padding
    row_N            [N] row of a pick, NO_SLOT where no slot takes it
    slot_of_block_B  [B] slot whose rows the block holds, NO_SLOT for an unused block; the used ones come first
    start_S1         [S + 1] first row of each slot, a multiple of block_rows; the last entry is the rows in use
    count_S          [S] picks of each slot; its rows beyond them, up to the next slot's start, are padding
    """

    block_rows: int
    pick_P: torch.Tensor
    row_N: torch.Tensor
    slot_of_block_B: torch.Tensor
    start_S1: torch.Tensor
    count_S: torch.Tensor


def most_blocks(num_picks: int, *, num_slots: int, block_rows: int) -> int:
    """Blocks that any spread of the picks over the slots fits into: each slot in use wastes less than a block."""
    return (num_picks + min(num_slots, num_picks) * (block_rows - 1)) // block_rows


def index_rows(slot_N: torch.Tensor, *, num_slots: int, block_rows: int) -> SlotRows:
    """slot_N [N] of integers, each NO_SLOT or below `num_slots`; N may be 0.

    Raises InvalidInput when `num_slots` or `block_rows` is not positive.
    """
    check_index(num_slots, block_rows)
    if runs_triton(slot_N):
        from moe_runtime.kernels.index_triton import index_rows_triton

        return index_rows_triton(slot_N, num_slots=num_slots, block_rows=block_rows)
    return index_rows_reference(slot_N, num_slots=num_slots, block_rows=block_rows)


def check_index(num_slots: int, block_rows: int) -> None:
    if num_slots < 1 or block_rows < 1:
        raise InvalidInput(f"num_slots and block_rows must be positive, not {num_slots} and {block_rows}")


def index_rows_reference(slot_N: torch.Tensor, *, num_slots: int, block_rows: int) -> SlotRows:
    """The same in plain torch, whatever the device."""
    num_picks, device = slot_N.numel(), slot_N.device
    num_blocks = most_blocks(num_picks, num_slots=num_slots, block_rows=block_rows)
    # picks without a slot sort behind all others, as if they were slot S's
    slot_N = torch.where(slot_N < 0, num_slots, slot_N).long()
    sorted_slot_N, order_N = torch.sort(slot_N, stable=True)
    count_U = torch.zeros(num_slots + 1, dtype=torch.long, device=device)
    count_U.index_add_(0, slot_N, torch.ones_like(slot_N))
    padded_S = (count_U[:num_slots] + block_rows - 1) // block_rows * block_rows
    start_S1 = torch.nn.functional.pad(padded_S.cumsum(0), (1, 0))
    first_U = count_U.cumsum(0) - count_U
    row_of_sorted_N = start_S1[sorted_slot_N] + torch.arange(num_picks, device=device) - first_U[sorted_slot_N]
    row_of_sorted_N = torch.where(sorted_slot_N == num_slots, NO_SLOT, row_of_sorted_N)
    row_N = torch.empty_like(row_of_sorted_N).index_copy_(0, order_N, row_of_sorted_N)
    num_rows = num_blocks * block_rows
    # picks without a slot land in one row more, which is cut off
    pick_P = torch.full((num_rows + 1,), num_picks, dtype=torch.long, device=device)
    pick_P[torch.where(row_of_sorted_N < 0, num_rows, row_of_sorted_N)] = order_N
    first_row_B = torch.arange(num_blocks, device=device) * block_rows
    slot_of_block_B = torch.searchsorted(start_S1[1:].contiguous(), first_row_B, right=True)
    return SlotRows(
        block_rows=block_rows,
        pick_P=pick_P[:num_rows].int(),
        row_N=row_N.int(),
        slot_of_block_B=torch.where(slot_of_block_B == num_slots, NO_SLOT, slot_of_block_B).int(),
        start_S1=start_S1.int(),
        count_S=count_U[:num_slots].int(),
    )
