"""Picks in the order of their slots: the plain reference, by its own definition."""

import pytest
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.kernels.index import NO_SLOT, SlotRows, index_rows, most_blocks

CASES = [
    (0, 3, 4),  # no picks
    (1, 1, 16),
    (7, 5, 4),  # empty slots are likely
    (200, 3, 16),
    (5, 64, 8),  # more slots than picks
]


def drawn(num_picks: int, num_slots: int, block_rows: int) -> tuple[torch.Tensor, SlotRows]:
    generator = torch.Generator().manual_seed(num_picks + num_slots)
    slot_N = torch.randint(-1, num_slots, (num_picks,), generator=generator)
    return slot_N, index_rows(slot_N, num_slots=num_slots, block_rows=block_rows)


@pytest.mark.parametrize("case", CASES)
def test_every_pick_with_a_slot_has_a_row_in_a_block_of_that_slot(case: tuple[int, int, int]) -> None:
    slot_N, rows = drawn(*case)
    for pick, slot in enumerate(slot_N.tolist()):
        row = int(rows.row_N[pick])
        if slot == NO_SLOT:
            assert row == NO_SLOT
        else:
            assert int(rows.slot_of_block_B[row // rows.block_rows]) == slot
            assert int(rows.pick_P[row]) == pick


@pytest.mark.parametrize("case", CASES)
def test_rows_that_serve_no_pick_say_so(case: tuple[int, int, int]) -> None:
    slot_N, rows = drawn(*case)
    served = int((rows.pick_P < slot_N.numel()).sum())
    assert served == int((slot_N != NO_SLOT).sum())
    assert not (rows.pick_P > slot_N.numel()).any()


@pytest.mark.parametrize("case", CASES)
def test_a_slots_rows_start_at_a_block_and_keep_the_order_of_their_picks(case: tuple[int, int, int]) -> None:
    slot_N, rows = drawn(*case)
    for slot in range(case[1]):
        start, count = int(rows.start_S1[slot]), int(rows.count_S[slot])
        assert start % rows.block_rows == 0
        assert rows.pick_P[start : start + count].tolist() == torch.nonzero(slot_N == slot).flatten().tolist()


@pytest.mark.parametrize("case", CASES)
def test_used_blocks_come_first_and_unused_ones_have_no_slot(case: tuple[int, int, int]) -> None:
    _, rows = drawn(*case)
    used = int(rows.start_S1[-1]) // rows.block_rows
    assert all(slot != NO_SLOT for slot in rows.slot_of_block_B[:used].tolist())
    assert all(slot == NO_SLOT for slot in rows.slot_of_block_B[used:].tolist())


def test_the_worst_spread_fills_the_blocks_that_were_reckoned_with() -> None:
    # one pick each for all slots but one, which takes the rest: every slot in use wastes as much as it can
    slot_N = torch.tensor([0, 1, 2, 3, 3, 3, 3, 3])
    rows = index_rows(slot_N, num_slots=4, block_rows=4)
    assert int(rows.start_S1[-1]) // 4 == most_blocks(8, num_slots=4, block_rows=4)


def test_no_slots_or_no_rows_in_a_block_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidInput, match="not 0 and 4"):
        index_rows(torch.zeros(1, dtype=torch.long), num_slots=0, block_rows=4)
