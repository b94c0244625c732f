"""Products with packed weights in Triton's interpreter: each equals plain torch on the unpacked ones."""

from typing import Any

import pytest
import torch

from moe_core.contract.packing import Packing
from moe_core.outcome import InvalidInput
from moe_runtime.kernels import grouped
from moe_runtime.kernels.index import SlotRows, index_rows
from moe_runtime.kernels.mixture import mixture_packed, mixture_reference
from moe_runtime.kernels.permute import permute_reference
from moe_runtime.kernels.quantise import Packed, pack, unpack

pytestmark = pytest.mark.usefixtures("poisoned")

PACKINGS = [Packing.of("Int8", 0), Packing.of("Int8", 32), Packing.of("Float8", 0), Packing.of("Int4", 32)]
SHAPES = [(13, 2, 5, 64, 32, 3), (1, 1, 3, 32, 96, 1), (20, 3, 4, 160, 64, 4), (4, 2, 2, 32, 32, 0)]
"""T, K, S, D, F, slots in use"""


def drawn(shape: tuple[int, ...]) -> tuple[SlotRows, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, top_k, s, d, f, used = shape
    generator = torch.Generator().manual_seed(d)
    slot_N = torch.randint(-1, used, (num_tokens * top_k,), generator=generator)
    rows = index_rows(slot_N, num_slots=s, block_rows=16)
    return (
        rows,
        torch.randn(num_tokens, d, generator=generator),
        torch.randn(s, 2 * f, d, generator=generator) * 0.3,
        torch.randn(s, d, f, generator=generator) * 0.3,
    )


def packed(weight: torch.Tensor, packing: Packing) -> tuple[Packed, torch.Tensor]:
    small = pack(weight, packing)
    return small, unpack(small, packing, num_columns=weight.shape[-1])


def small_tile() -> Any:
    from moe_runtime.kernels.grouped_triton import Tile

    return Tile(columns=32, depth=32, blocks_in_turn=2)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_and_up_equal_those_of_unpacked_weights(shape: tuple[int, ...], packing: Packing, gather: bool) -> None:
    from moe_runtime.kernels.grouped_packed_triton import gate_up_packed

    rows, x_TD, gate_up_S2FD, _ = drawn(shape)
    small, numbers_S2FD = packed(gate_up_S2FD, packing)
    x_PD, used = permute_reference(x_TD, rows, top_k=shape[1]), int(rows.start_S1[-1])
    hidden_PF = gate_up_packed(
        x_TD if gather else x_PD, small, packing, rows, gather_top_k=shape[1] if gather else None, tile=small_tile()
    )
    expected_PF = grouped.swiglu(grouped.rows_times_weights(x_PD, numbers_S2FD, rows))
    torch.testing.assert_close(hidden_PF[:used], expected_PF[:used], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_multiplied_as_with_unpacked_weights(shape: tuple[int, ...], packing: Packing) -> None:
    from moe_runtime.kernels.grouped_packed_triton import rows_times_packed

    rows, _, _, down_SDF = drawn(shape)
    small, numbers_SDF = packed(down_SDF, packing)
    hidden_PF, served_P = torch.randn(rows.pick_P.shape[0], shape[4]), rows.pick_P < shape[0] * shape[1]
    out_PD = rows_times_packed(hidden_PF, small, packing, rows, tile=small_tile())
    expected_PD = grouped.rows_times_weights(hidden_PF, numbers_SDF, rows)
    torch.testing.assert_close(out_PD[served_P], expected_PD[served_P], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_mixture_of_packed_experts_is_that_of_unpacked_ones(packing: Packing) -> None:
    _, x_TD, gate_up_S2FD, down_SDF = drawn(SHAPES[2])
    slot_TK, weight_TK = torch.randint(-1, 3, (20, 3)), torch.rand(20, 3)
    (gate_up, gate_up_numbers), (down, down_numbers) = packed(gate_up_S2FD, packing), packed(down_SDF, packing)
    out_TD = mixture_packed(x_TD, slot_TK, weight_TK, gate_up, down, packing=packing)
    expected_TD = mixture_reference(x_TD, slot_TK, weight_TK, gate_up_numbers, down_numbers)
    torch.testing.assert_close(out_TD, expected_TD, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_float16_rows_take_packed_weights_too(packing: Packing) -> None:
    from moe_runtime.kernels.grouped_packed_triton import rows_times_packed

    rows, _, _, down_SDF = drawn(SHAPES[2])
    small, numbers_SDF = packed(down_SDF, packing)
    hidden_PF, served_P = torch.randn(rows.pick_P.shape[0], 64).half(), rows.pick_P < 60
    out_PD = rows_times_packed(hidden_PF, small, packing, rows, tile=small_tile())
    expected_PD = grouped.rows_times_weights(hidden_PF.float(), numbers_SDF, rows)
    torch.testing.assert_close(out_PD[served_P].float(), expected_PD[served_P], rtol=1e-2, atol=1e-2)


def test_a_group_that_is_no_tile_is_refused_with_its_size() -> None:
    from moe_runtime.kernels.grouped_packed_triton import rows_times_packed

    rows, _, _, down_SDF = drawn(SHAPES[0])
    packing = Packing.of("Int4", 8)
    with pytest.raises(InvalidInput, match="multiple of 32 here, not 8"):
        rows_times_packed(torch.randn(rows.pick_P.shape[0], 32), pack(down_SDF, packing), packing, rows)
