"""Experts of few bits on a GPU equal plain torch on the unpacked numbers, in float64."""

import pytest
import torch

from moe_core.contract.packing import Packing, Precision
from moe_runtime.kernels.float8 import float8_rows, float8_rows_reference
from moe_runtime.kernels.grouped_packed_triton import rows_times_packed
from moe_runtime.kernels.index import index_rows
from moe_runtime.kernels.mixture import mixture_float8, mixture_packed, mixture_reference
from moe_runtime.kernels.quantise import Packed, pack, unpack

SHAPES = [(1, 1, 4, 64, 32), (300, 4, 16, 512, 384), (4096, 8, 16, 1024, 256)]
"""T, K, S, D, F"""


@pytest.mark.parametrize("packing", [Packing.of("Int8", 0), Packing.of("Float8", 0), Packing.of("Int4", 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mixture_of_packed_experts_is_that_of_unpacked_ones(
    shape: tuple[int, ...], dtype: torch.dtype, packing: Packing
) -> None:
    num_tokens, top_k, num_slots, d, f = shape
    torch.manual_seed(0)
    x_TD = torch.randn(num_tokens, d, device="cuda", dtype=dtype)
    slot_TK = torch.rand(num_tokens, num_slots, device="cuda").topk(top_k).indices
    weight_TK = torch.rand(num_tokens, top_k, device="cuda")
    packed = [pack(torch.randn(num_slots, n, m, device="cuda") * m**-0.5, packing) for n, m in ((2 * f, d), (d, f))]
    numbers = [unpack(one, packing, num_columns=m).double() for one, m in zip(packed, (d, f), strict=True)]
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    out_TD = mixture_packed(x_TD, slot_TK, weight_TK, *packed, packing=packing)
    torch.use_deterministic_algorithms(False)
    expected_TD = mixture_reference(x_TD.double(), slot_TK, weight_TK.double(), *numbers)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((out_TD.double() - expected_TD).norm() / expected_TD.norm()) < tolerance


def test_rows_become_the_references_codes_and_scales() -> None:
    torch.manual_seed(0)
    x_RM = torch.randn(300, 2100, device="cuda") * torch.logspace(-6, 6, 300, device="cuda").unsqueeze(1)
    codes_RM, scale_R = float8_rows(x_RM)
    expected_RM, expected_R = float8_rows_reference(x_RM)
    torch.testing.assert_close(scale_R, expected_R)
    # a quotient that lies between two codes may fall to either
    assert float((codes_RM.float() != expected_RM.float()).float().mean()) < 1e-3
    torch.testing.assert_close(codes_RM.float(), expected_RM.float(), rtol=0.13, atol=0)


@pytest.mark.parametrize("shape", [(300, 4, 16, 512, 384), (4096, 8, 16, 1024, 256)], ids=str)
def test_a_mixture_multiplied_as_float8_is_as_near_as_its_rounding(shape: tuple[int, ...]) -> None:
    num_tokens, top_k, num_slots, d, f = shape
    torch.manual_seed(0)
    x_TD = torch.randn(num_tokens, d, device="cuda", dtype=torch.bfloat16)
    slot_TK = torch.rand(num_tokens, num_slots, device="cuda").topk(top_k).indices
    weight_TK = torch.rand(num_tokens, top_k, device="cuda")
    packed = [
        pack(torch.randn(num_slots, n, m, device="cuda") * m**-0.5, Packing.of("Float8"))
        for n, m in ((2 * f, d), (d, f))
    ]
    numbers = [unpack(one, Packing.of("Float8"), num_columns=m).double() for one, m in zip(packed, (d, f), strict=True)]
    out_TD = mixture_float8(x_TD, slot_TK, weight_TK, *packed)
    codes_TD, scale_T = float8_rows_reference(x_TD)
    rounded_TD = codes_TD.double() * scale_T.double().unsqueeze(1)
    expected_TD = mixture_reference(rounded_TD, slot_TK, weight_TK.double(), *numbers)
    # activations are rounded as well: a step of a code is 2^-3 of it, so the mean error of a number 2 %
    assert float((out_TD.double() - expected_TD).norm() / expected_TD.norm()) < 4e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["Int8", "Float8", "Int4"])
def test_every_code_becomes_its_number(precision: Precision, dtype: torch.dtype) -> None:
    packing = Packing.of(precision, 0)
    every_C = torch.arange(256, device="cuda").to(torch.uint8)
    if precision == "Float8":
        every_C[every_C & 0x7F == 0x7F] = 0  # not a number, and none is ever written
        codes = every_C.view(torch.float8_e4m3fn)
    else:
        codes = every_C.view(torch.int8) if precision == "Int8" else every_C
    num_columns = 512 if precision == "Int4" else 256
    scale_dtype = torch.bfloat16 if precision == "Int4" else torch.float32
    packed = Packed(codes.repeat(1, 16, 1), torch.ones(1, 16, 1, device="cuda", dtype=scale_dtype))
    rows = index_rows(torch.zeros(num_columns, device="cuda", dtype=torch.int), num_slots=1, block_rows=64)
    one_hot_PM = torch.eye(num_columns, device="cuda", dtype=dtype)
    out_PN = rows_times_packed(one_hot_PM, packed, packing, rows)
    assert torch.equal(out_PN.float(), unpack(packed, packing, num_columns=num_columns)[0].T)
