"""Gate, index, permute, combine, map and count on a GPU: what plain torch gives on a CPU."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from moe_runtime.kernels.gate import GateRule, gate, gate_reference
from moe_runtime.kernels.index import SlotRows, index_rows, index_rows_reference
from moe_runtime.kernels.map_count import map_and_count, map_and_count_reference
from moe_runtime.kernels.permute import combine, combine_reference, permute, permute_reference

pytestmark = pytest.mark.usefixtures("poisoned")

TOKENS = [0, 1, 37, 4096]
RULES = {
    "E128 top8": (128, GateRule(8, renormalise=True)),
    "E512 top10": (512, GateRule(10)),
    "E8 top2": (8, GateRule(2, over_chosen=True)),
    "E256 top8 of 4 groups": (256, GateRule(8, "Sigmoid", renormalise=True, scale=2.5, num_groups=8, group_topk=4)),
    "E160 top6 of 3 groups by their best": (160, GateRule(6, num_groups=8, group_topk=3, group_best=1)),
    "E60 top4": (60, GateRule(4, "Sigmoid")),
    "E384 top1": (384, GateRule(1)),
    "E2048 top33": (2048, GateRule(33, renormalise=True)),
}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(rows: SlotRows) -> SlotRows:
    def move(value: Any) -> Any:
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return SlotRows(**{part.name: move(getattr(rows, part.name)) for part in fields(SlotRows)})


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", RULES)
def test_the_gate_and_its_gradient_equal_plain_torchs(name: str, num_tokens: int, with_bias: bool) -> None:
    num_experts, rule = RULES[name]
    logits_TE = (drawn(num_tokens, num_experts, seed=1) * 2).requires_grad_()
    bias_E = drawn(num_experts, seed=2) * 0.1 if with_bias else None
    there_TE = logits_TE.detach().cuda().requires_grad_()
    expert_TK, weight_TK, count_E = gate(there_TE, rule, None if bias_E is None else bias_E.cuda())
    wanted_TK, wanted_weight_TK, _ = gate_reference(logits_TE, rule, bias_E)
    # scores that differ in the last bit only may change places; then so do their weights
    same_T = (expert_TK.cpu() == wanted_TK).all(dim=1)
    assert num_tokens == 0 or float(same_T.float().mean()) > 0.999
    torch.testing.assert_close(
        weight_TK.detach().cpu()[same_T], wanted_weight_TK.detach()[same_T], rtol=1e-5, atol=1e-7
    )
    assert torch.equal(count_E.cpu(), torch.bincount(expert_TK.cpu().reshape(-1), minlength=num_experts))

    grad_TK = drawn(num_tokens, rule.top_k, seed=3)
    (grad_TE,) = torch.autograd.grad(weight_TK, there_TE, grad_TK.cuda())
    (wanted_TE,) = torch.autograd.grad(wanted_weight_TK, logits_TE, grad_TK)
    torch.testing.assert_close(grad_TE.cpu()[same_T], wanted_TE[same_T], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_choose_as_in_plain_torch(dtype: torch.dtype) -> None:
    logits_TE = drawn(500, 64, seed=4).to(dtype)  # many equal ones
    rule = GateRule(6, renormalise=True)
    expert_TK, weight_TK, _ = gate(logits_TE.cuda(), rule)
    wanted_TK, wanted_weight_TK, _ = gate_reference(logits_TE, rule)
    assert torch.equal(expert_TK.cpu(), wanted_TK)
    torch.testing.assert_close(weight_TK.cpu(), wanted_weight_TK, rtol=1e-5, atol=1e-7)


def test_logits_that_are_nan_choose_experts_that_exist() -> None:
    logits_TE = drawn(100, 60, seed=5)
    logits_TE[::2] = float("nan")
    expert_TK, _, count_E = gate(logits_TE.cuda(), GateRule(4, "Sigmoid", num_groups=6, group_topk=2))
    assert bool(((expert_TK >= 0) & (expert_TK < 60)).all())
    assert int(count_E.sum()) == 400


@pytest.mark.parametrize("block_rows", [1, 16, 128])
@pytest.mark.parametrize("num_slots", [1, 8, 60, 128, 512, 2048])
@pytest.mark.parametrize("num_picks", [0, 1, 999, 70_000])
def test_the_index_is_bit_for_bit_the_references(num_picks: int, num_slots: int, block_rows: int) -> None:
    share_N = torch.rand(num_picks, generator=torch.Generator().manual_seed(num_slots)) ** 2
    slot_N = (share_N * (num_slots + 1)).long() - 1
    got = index_rows(slot_N.cuda(), num_slots=num_slots, block_rows=block_rows)
    wanted = index_rows_reference(slot_N, num_slots=num_slots, block_rows=block_rows)
    for name in (part.name for part in fields(SlotRows)):
        value = getattr(got, name)
        value = value.cpu() if isinstance(value, torch.Tensor) else value
        torch.testing.assert_close(value, getattr(wanted, name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [33, 2048])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_permute_and_combine_and_their_gradients_equal_plain_torchs(
    num_tokens: int, dim: int, dtype: torch.dtype
) -> None:
    top_k, num_slots = 3, 11
    slot_N = torch.randint(-1, num_slots, (num_tokens * top_k,), generator=torch.Generator().manual_seed(0))
    rows = index_rows_reference(slot_N, num_slots=num_slots, block_rows=16)
    x_TD, weight_TK = drawn(num_tokens, dim, seed=1).to(dtype), drawn(num_tokens, top_k, seed=2)
    probe_TD = drawn(num_tokens, dim, seed=3).to(dtype)

    results = []
    for device, exact, run_permute, run_combine in (
        ("cpu", torch.float32, permute_reference, combine_reference),
        ("cuda", dtype, permute, combine),
    ):
        index = rows if device == "cpu" else moved(rows)
        leaves = [x_TD.to(device, exact).requires_grad_(), weight_TK.to(device).requires_grad_()]
        permuted_PD = run_permute(leaves[0], index, top_k=top_k)
        out_TD = run_combine(permuted_PD * 2, leaves[1], index)
        grads = torch.autograd.grad(out_TD, leaves, probe_TD.to(device, exact))
        results.append([part.detach().cpu().float() for part in (permuted_PD, out_TD, *grads)])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_experts", [5, 128, 512])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_addresses_and_counts_equal_plain_torchs(num_tokens: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    expert_TK = torch.randint(-1, num_experts, (num_tokens, 8), generator=generator)
    address_WE = torch.randint(-1, 600, (16, num_experts), generator=generator)
    loads = [torch.full((num_experts,), 3), torch.full((num_experts,), 3, device="cuda")]
    wanted_TK = map_and_count_reference(expert_TK, address_WE, first_way=5, load_E=loads[0])
    got_TK = map_and_count(expert_TK.cuda(), address_WE.cuda(), first_way=5, load_E=loads[1])
    assert torch.equal(got_TK.cpu(), wanted_TK)
    assert torch.equal(loads[1].cpu(), loads[0])
