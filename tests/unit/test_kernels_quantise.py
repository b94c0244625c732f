"""Packed weights: what comes back, how far it is off, and that no shape is too odd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core.contract.packing import BITS, Packing, Precision
from moe_core.outcome import InvalidInput
from moe_runtime.kernels.quantise import Packed, best_scales, pack, unpack

SCALED: tuple[Precision, ...] = ("Float8", "Int8", "Int4")
RELATIVE_STEP = {"Float8": 2.0**-4, "Int8": 1 / 127, "Int4": 1 / 7}
"""Half a step of the codes (Float8: of the number itself), as a share of the extreme, times two for kept scales."""


def weights(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32)) * scale


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, Packing]:
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40)))
    packing = Packing.of(draw(st.sampled_from(SCALED)), draw(st.sampled_from((0, 1, 3, 8, 32, 64))))
    return weights(*shape, seed=draw(st.integers(0, 99)), scale=10.0 ** draw(st.integers(-20, 20))), packing


@given(matrices())
def test_no_number_is_further_off_than_a_step(case: tuple[torch.Tensor, Packing]) -> None:
    weight, packing = case
    back = unpack(pack(weight, packing), packing, num_columns=weight.shape[-1])
    assert back.shape == weight.shape
    size = packing.group_size or weight.shape[-1]
    for first in range(0, weight.shape[-1], size):
        group = slice(first, first + size)
        extreme = weight[..., group].abs().amax(-1, keepdim=True)
        error = (back - weight)[..., group].abs()
        assert bool((error <= extreme * RELATIVE_STEP[packing.precision]).all())


@given(matrices())
def test_what_was_packed_packs_to_the_same_codes_again(case: tuple[torch.Tensor, Packing]) -> None:
    weight, packing = case
    packed = pack(weight, packing)
    back = unpack(packed, packing, num_columns=weight.shape[-1])
    again = pack(back, packing, scales_XNG=packed.scales)
    assert torch.equal(again.codes.view(torch.uint8), packed.codes.view(torch.uint8))


@given(matrices())
def test_a_matrix_packs_alone_as_it_does_among_others(case: tuple[torch.Tensor, Packing]) -> None:
    weight, packing = case
    for scales_of in (None, best_scales):
        together = pack(weight, packing, scales_XNG=scales_of(weight, packing) if scales_of else None)
        for i in range(len(weight)):
            alone = pack(weight[i], packing, scales_XNG=scales_of(weight[i], packing) if scales_of else None)
            assert torch.equal(alone.codes.view(torch.uint8), together.codes[i].view(torch.uint8))
            assert alone.scales is not None and together.scales is not None
            assert torch.equal(alone.scales, together.scales[i])


@given(matrices())
def test_packed_bytes_are_what_the_contract_says(case: tuple[torch.Tensor, Packing]) -> None:
    weight, packing = case
    packed = pack(weight, packing)
    num_bytes = packed.codes.nbytes + (packed.scales.nbytes if packed.scales is not None else 0)
    assert num_bytes == len(weight) * packing.matrix_bytes(*weight.shape[1:])


@given(matrices())
def test_the_best_scales_are_no_worse_than_the_extremes(case: tuple[torch.Tensor, Packing]) -> None:
    weight, packing = case
    unit = float(weight.abs().amax())
    weight = weight / (unit or 1.0)  # squares of very small numbers are zero in float32
    by_extreme, best = pack(weight, packing), pack(weight, packing, scales_XNG=best_scales(weight, packing))
    assert squared_error(best, weight, packing) <= squared_error(by_extreme, weight, packing) * (1 + 1e-6)


def squared_error(packed: Packed, weight: torch.Tensor, packing: Packing) -> float:
    return float((unpack(packed, packing, num_columns=weight.shape[-1]) - weight).double().square().sum())


@pytest.mark.parametrize("precision", SCALED)
def test_columns_that_count_more_are_resolved_better(precision: Precision) -> None:
    packing = Packing.of(precision, 32)
    weight = weights(16, 32)
    weight[:, 0] = 6.0  # an extreme that nothing is multiplied with
    importance = torch.ones(32)
    importance[0] = 0.0
    errors = []
    for scales in (best_scales(weight, packing), best_scales(weight, packing, importance_XM=importance)):
        back = unpack(pack(weight, packing, scales_XNG=scales), packing, num_columns=32)
        errors.append(float((back - weight)[:, 1:].square().sum()))
    assert errors[1] < errors[0]


def test_the_larger_extreme_takes_the_longer_side_of_int4() -> None:
    packing = Packing.of("Int4", 0)
    packed = pack(torch.tensor([[8.0, -7.0, 1.0], [-8.0, 7.0, 1.0]]), packing)
    assert packed.scales is not None
    assert packed.scales.float().tolist() == [[-1.0], [1.0]]
    assert packed.codes.tolist() == [[0 | 15 << 4, 7 | 8 << 4], [0 | 15 << 4, 9 | 8 << 4]]


@pytest.mark.parametrize("precision", [*SCALED])
def test_zeros_stay_zeros(precision: Precision) -> None:
    packing = Packing.of(precision, 4)
    back = unpack(pack(torch.zeros(2, 3, 10), packing), packing, num_columns=10)
    assert torch.equal(back, torch.zeros(2, 3, 10))


@pytest.mark.parametrize("precision", ["Float32", "BFloat16"])
def test_full_precisions_are_casts(precision: Precision) -> None:
    packing, weight = Packing.of(precision), weights(2, 3, 5)
    packed = pack(weight, packing)
    assert packed.scales is None
    assert packed.codes.element_size() * 8 == BITS[precision]
    assert torch.equal(unpack(packed, packing, num_columns=5), weight.to(packed.codes.dtype).float())


@pytest.mark.parametrize("precision", SCALED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(precision: Precision, bad: float) -> None:
    weight = weights(2, 3, 8)
    weight[1, 2, 3] = bad
    with pytest.raises(InvalidInput, match="finite"):
        pack(weight, Packing.of(precision))


@pytest.mark.parametrize("precision", SCALED)
def test_no_matrices_are_packed_to_nothing(precision: Precision) -> None:
    packing = Packing.of(precision, 4)
    packed = pack(torch.zeros(0, 3, 10), packing)
    assert unpack(packed, packing, num_columns=10).shape == (0, 3, 10)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"\[2, 3, 2\], not \[2, 3, 1\]"):
        pack(weights(2, 3, 8), Packing.of("Int4", 4), scales_XNG=torch.ones(2, 3, 1))


def test_a_group_of_a_full_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="BFloat16 has no scales"):
        Packing.of("BFloat16", 32)
