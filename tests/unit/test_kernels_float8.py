"""Float8 rows and their products in Triton's interpreter, against plain torch on the numbers that codes stand for."""

import pytest
import torch
from torch.nn.functional import pad

from moe_core.contract.packing import Packing
from moe_core.outcome import InvalidInput
from moe_runtime.kernels import grouped
from moe_runtime.kernels.float8 import float8_rows_reference
from moe_runtime.kernels.index import index_rows
from moe_runtime.kernels.mixture import mixture_float8, mixture_reference
from moe_runtime.kernels.permute import permute_reference
from moe_runtime.kernels.quantise import pack, unpack

pytestmark = pytest.mark.usefixtures("poisoned")
PACKING = Packing.of("Float8")
T, K, S, D, F = 13, 2, 5, 48, 32


@pytest.mark.parametrize("shape", [(1, 16), (3, 40), (5, 2100)], ids=str)
def test_rows_become_the_references_codes_and_scales(shape: tuple[int, int]) -> None:
    from moe_runtime.kernels.float8_triton import float8_rows_triton

    # numbers that are codes already: the interpreter loses a carry when it rounds up (tests/gpu has any numbers)
    x_RM = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(64).to(torch.float8_e4m3fn).float()
    x_RM[:, -1] = -448.0
    x_RM *= 2.0 ** torch.arange(shape[0]).unsqueeze(1)
    x_RM[0] = 0
    codes_RM, scale_R = float8_rows_triton(x_RM)
    expected_RM, expected_R = float8_rows_reference(x_RM)
    torch.testing.assert_close(scale_R, expected_R)
    assert torch.equal(codes_RM.float(), expected_RM.float())


def test_what_float8_loses_is_a_step_of_its_codes() -> None:
    x_RM = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    codes_RM, scale_R = float8_rows_reference(x_RM)
    error_RM = (codes_RM.float() * scale_R.unsqueeze(1) - x_RM).abs()
    assert bool((error_RM <= x_RM.abs() * 2**-4 + scale_R.unsqueeze(1) * 2**-10).all())


@pytest.mark.parametrize("gather", [True, False])
def test_both_products_equal_those_of_the_numbers_that_codes_stand_for(gather: bool) -> None:
    from moe_runtime.kernels.grouped_triton import Scales, Tile, gate_up, rows_times_weights

    torch.manual_seed(0)
    rows = index_rows(torch.randint(-1, 3, (T * K,)), num_slots=S, block_rows=16)
    used, tile = int(rows.start_S1[-1]), Tile(columns=32, depth=16, blocks_in_turn=2)
    weight = pack(torch.randn(S, 2 * F, D), PACKING)
    assert weight.scales is not None
    x_codes_TD, x_scale_T = float8_rows_reference(torch.randn(T, D))
    if gather:
        codes, scale = x_codes_TD, x_scale_T
    else:
        codes = permute_reference(x_codes_TD.float(), rows, top_k=K).to(torch.float8_e4m3fn)
        scale = pad(x_scale_T, (0, 1))[(rows.pick_P // K).long()]
    scales = Scales(scale, weight.scales.squeeze(-1))
    hidden_PF, _ = gate_up(codes, weight.codes, rows, gather_top_k=K if gather else None, scales=scales, tile=tile)
    numbers_PD = permute_reference(x_codes_TD.float() * x_scale_T.unsqueeze(1), rows, top_k=K)
    numbers_S2FD = unpack(weight, PACKING, num_columns=D)
    product_P2F = grouped.rows_times_weights(numbers_PD, numbers_S2FD, rows)
    # the interpreter keeps bfloat16 by cutting bits off
    torch.testing.assert_close(hidden_PF[:used].float(), grouped.swiglu(product_P2F)[:used], rtol=2e-2, atol=2e-2)
    if not gather:
        out_PN = rows_times_weights(codes, weight.codes, rows, transposed=True, scales=scales, tile=tile)
        torch.testing.assert_close(out_PN[:used].float(), product_P2F[:used], rtol=2e-2, atol=2e-2)


def test_a_mixture_multiplied_as_float8_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    x_TD, slot_TK, weight_TK = torch.randn(T, D), torch.randint(-1, S, (T, K)), torch.rand(T, K)
    gate_up, down = torch.randn(S, 2 * F, D) * 0.2, torch.randn(S, D, F) * 0.2
    out_TD = mixture_float8(x_TD, slot_TK, weight_TK, pack(gate_up, PACKING), pack(down, PACKING))
    exact_TD = mixture_reference(x_TD, slot_TK, weight_TK, gate_up, down)
    assert float((out_TD.float() - exact_TD).norm() / exact_TD.norm()) < 0.06


def test_scales_by_group_are_refused() -> None:
    grouped_codes = pack(torch.randn(2, 32, 32), Packing.of("Float8", 16))
    with pytest.raises(InvalidInput, match="gate_up must be Float8 with a scale per row"):
        mixture_float8(
            torch.randn(1, 32), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), grouped_codes, grouped_codes
        )
