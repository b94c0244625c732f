"""A rank's slots on a GPU: which code runs them, and that it gives what the family's own forward gives."""

import pytest
import torch

from moe_core.contract.packing import Packing
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_runtime.experts.compute import FAMILY, TRITON, SlotCompute
from moe_runtime.experts.families import ExpertsModule, describe
from moe_runtime.experts.packing import LayerPacking
from moe_runtime.experts.store import PackedStore, WholeStore

NUM_SLOTS = 5


def slots(family: str) -> tuple[ExpertsModule, SlotCompute]:
    shape = ModelShape(
        family=family,
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=NUM_SLOTS,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=64,
    )
    _, (entry,), _ = describe(ModelSource(shape=shape))
    torch.manual_seed(0)
    for name in entry.parameter_names:
        value = torch.randn(entry.module.get_parameter(name).shape, device="cuda") * 0.2
        entry.module.register_parameter(name, torch.nn.Parameter(value))
    return entry, SlotCompute(entry, entry.module.forward)


@pytest.mark.parametrize(("family", "way"), [("qwen3_moe", TRITON), ("mixtral", TRITON), ("gpt_oss", FAMILY)])
def test_slots_run_by_the_code_that_is_told_and_give_transformers_numbers(family: str, way: str) -> None:
    entry, compute = slots(family)
    rows_RD = torch.randn(37, 96, device="cuda", requires_grad=True)
    slot_R = torch.randint(0, NUM_SLOTS, (37,), device="cuda")
    leaves = (rows_RD, *(entry.module.get_parameter(name) for name in entry.parameter_names))
    kernel = compute.kernel(rows_RD, WholeStore(entry))
    ones_R1 = torch.ones(37, 1, device="cuda")
    ours_RD = (compute if kernel is None else kernel)(rows_RD, slot_R.unsqueeze(-1), ones_R1)
    theirs_RD = compute.family_forward(rows_RD, slot_R.unsqueeze(-1), ones_R1)
    assert compute.way == way
    torch.testing.assert_close(ours_RD, theirs_RD, rtol=1e-4, atol=1e-4)
    d_out_RD = torch.randn_like(ours_RD)
    gradients = [torch.autograd.grad(out, leaves, d_out_RD) for out in (ours_RD, theirs_RD)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("packing", [Packing.of("Int8"), Packing.of("Int4", 32), Packing.of("Float8")], ids=str)
def test_packed_slots_are_multiplied_as_codes(packing: Packing) -> None:
    entry, compute = slots("qwen3_moe")
    layer = LayerPacking(entry, packing, family="qwen3_moe")
    whole = {name: entry.module.get_parameter(name).detach() for name in entry.parameter_names}
    store = PackedStore(entry, layer)
    store.install(layer.pack_experts(whole), "cuda")
    for name, value in whole.items():
        entry.module.register_parameter(name, torch.nn.Parameter(value))
    rows_RD, slot_R = torch.randn(37, 96, device="cuda"), torch.randint(0, NUM_SLOTS, (37,), device="cuda")
    with torch.no_grad():
        kernel = compute.kernel(rows_RD, store)
        assert kernel is not None
        assert compute.way == TRITON
        ours_RD = kernel(rows_RD, slot_R.unsqueeze(-1), torch.ones(37, 1, device="cuda"))
        for name, value in layer.unpack_slots(store.stacks(), range(NUM_SLOTS)).items():
            entry.module.get_parameter(name).copy_(value)
        theirs_RD = compute.family_forward(rows_RD, slot_R.unsqueeze(-1), torch.ones(37, 1, device="cuda"))
    torch.testing.assert_close(ours_RD, theirs_RD, rtol=1e-4, atol=1e-4)
