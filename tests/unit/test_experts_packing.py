"""A layer's parameters as packed stacks and back, whichever way round a family keeps its matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core.contract.packing import Packing, Precision
from moe_runtime.experts.families import ExpertsModule, UnsupportedModel
from moe_runtime.experts.packing import LayerPacking

NUM_EXPERTS = 3
PRECISIONS: tuple[Precision, ...] = ("BFloat16", "Float8", "Int8", "Int4")


def entry_of(shapes: dict[str, tuple[int, ...]], *, is_turned: bool) -> ExpertsModule:
    module = torch.nn.Module()
    module.is_transposed = is_turned  # type: ignore[assignment]
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = torch.from_numpy(rng.normal(size=(NUM_EXPERTS, *shape)).astype(np.float32))
        module.register_parameter(name, torch.nn.Parameter(value))
    return ExpertsModule("experts", module, tuple(shapes), NUM_EXPERTS)


@st.composite
def layers(draw: st.DrawFn) -> tuple[ExpertsModule, LayerPacking]:
    dim, hidden = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    is_turned = draw(st.booleans())
    sides = {"gate_up_proj": (2 * hidden, dim), "down_proj": (dim, hidden)}
    shapes: dict[str, tuple[int, ...]] = {name: side[::-1] if is_turned else side for name, side in sides.items()}
    if draw(st.booleans()):
        shapes["down_proj_bias"] = (dim,)
    entry = entry_of(shapes, is_turned=is_turned)
    precision = draw(st.sampled_from(PRECISIONS))
    packing = Packing.of(precision, None if precision == "BFloat16" else draw(st.sampled_from((0, 1, 2, 4))))
    return entry, LayerPacking(entry, packing, family="some")


def parameters(entry: ExpertsModule) -> dict[str, torch.Tensor]:
    return {name: entry.module.get_parameter(name).detach() for name in entry.parameter_names}


@given(layers())
def test_empty_slots_have_the_shapes_and_types_of_packed_experts(case: tuple[ExpertsModule, LayerPacking]) -> None:
    entry, layer = case
    stacks, blank = layer.pack_experts(parameters(entry)), layer.blank(NUM_EXPERTS)
    assert {n: (t.shape, t.dtype) for n, t in stacks.items()} == {n: (t.shape, t.dtype) for n, t in blank.items()}
    assert all(torch.equal(value, torch.zeros_like(value)) for value in layer.unpack_slots(blank, [0]).values())


@given(layers(), st.permutations(range(NUM_EXPERTS)))
def test_slots_come_back_as_they_were_in_the_order_asked(
    case: tuple[ExpertsModule, LayerPacking], slots: list[int]
) -> None:
    entry, layer = case
    whole = parameters(entry)
    back = layer.unpack_slots(layer.pack_experts(whole), slots)
    for name, value in whole.items():
        assert back[name].shape == value.shape
        if name.endswith("bias"):
            assert torch.equal(back[name], value[slots])
        else:
            assert bool(((back[name] - value[slots]).abs() <= 0.15 * value.abs().max()).all())


@given(layers())
def test_a_group_lies_along_what_a_product_sums_over(case: tuple[ExpertsModule, LayerPacking]) -> None:
    entry, layer = case
    if not layer.packing.is_scaled:
        return
    stacks = layer.pack_experts(parameters(entry))
    for name in ("gate_up_proj", "down_proj"):
        summed_over = -2 if layer.matrices[name].is_turned else -1
        columns = entry.module.get_parameter(name).shape[summed_over]
        assert stacks[f"{name}.scales"].shape[-1] == layer.packing.num_groups(columns)


def test_unpacked_bytes_are_those_of_float32() -> None:
    entry = entry_of({"gate_up_proj": (8, 4), "down_proj": (4, 4), "down_proj_bias": (4,)}, is_turned=False)
    layer = LayerPacking(entry, Packing.of("Int4"), family="some")
    assert layer.unpacked_bytes == 4 * (8 * 4 + 4 * 4 + 4)


def test_experts_without_matrices_are_refused_by_family() -> None:
    with pytest.raises(UnsupportedModel, match="model family some is not supported: experts has no matrices"):
        LayerPacking(entry_of({"scale": (4,)}, is_turned=False), Packing.of("Int8"), family="some")
