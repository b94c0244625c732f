"""Index of picks: the Triton kernels, in the interpreter, give what the plain reference gives."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels import index_triton
from moe_runtime.kernels.index import SlotRows, index_rows_reference
from moe_runtime.kernels.index_triton import index_rows_triton

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_same_rows(got: SlotRows, wanted: SlotRows) -> None:
    for name in (field.name for field in fields(SlotRows)):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=0, atol=0, msg=name)


@settings(max_examples=25)
@given(st.data())
def test_triton_index_equals_the_reference(data: st.DataObject) -> None:
    num_slots = data.draw(st.sampled_from([1, 2, 3, 17, 40]))
    slot_N = torch.tensor(data.draw(st.lists(st.integers(-1, num_slots - 1), max_size=40)), dtype=torch.int64)
    block_rows = data.draw(st.sampled_from([1, 3, 16]))
    assert_same_rows(
        index_rows_triton(slot_N, num_slots=num_slots, block_rows=block_rows),
        index_rows_reference(slot_N, num_slots=num_slots, block_rows=block_rows),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("skew", [0, 3])
def test_triton_index_equals_the_reference_over_many_chunks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, skew: int
) -> None:
    monkeypatch.setattr(index_triton, "_SCAN_CHUNKS", 2)
    share_N = torch.rand(1300, generator=torch.Generator().manual_seed(skew)) ** (1 + skew)
    slot_N = (share_N * 8).to(dtype) - 1
    assert_same_rows(
        index_rows_triton(slot_N, num_slots=7, block_rows=64), index_rows_reference(slot_N, num_slots=7, block_rows=64)
    )
