"""The fused gate, in Triton's interpreter, against plain torch and its autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels import gate as face
from moe_runtime.kernels.gate import GateRule, ScoreFunction, gate_reference
from moe_runtime.kernels.gate_triton import Launch, gate_backward, gate_forward

pytestmark = pytest.mark.usefixtures("poisoned")

WEIGHTS: list[tuple[ScoreFunction, bool, bool]] = [
    ("Softmax", False, False),
    ("Softmax", True, False),
    ("Softmax", False, True),
    ("Sigmoid", False, False),
    ("Sigmoid", False, True),
]
GROUPINGS = [(1, 1, 1), (4, 2, 2), (3, 2, 1), (8, 8, 2), (6, 1, 2)]


@st.composite
def rules(draw: st.DrawFn) -> tuple[GateRule, int]:
    """(rule, E)."""
    num_groups, group_topk, group_best = draw(st.sampled_from(GROUPINGS))
    of_group = draw(st.integers(2, 7))
    function, over_chosen, renormalise = draw(st.sampled_from(WEIGHTS))
    rule = GateRule(
        draw(st.integers(1, group_topk * of_group)),
        function,
        over_chosen=over_chosen,
        renormalise=renormalise,
        scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=num_groups,
        group_topk=group_topk,
        group_best=group_best,
    )
    return rule, num_groups * of_group


def logits(num_tokens: int, num_experts: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)) * 2


@settings(max_examples=60)
@given(rules(), st.integers(0, 9), st.booleans(), st.integers(0, 2**31), st.sampled_from([32, 64]))
def test_triton_gate_equals_the_reference(
    case: tuple[GateRule, int], num_tokens: int, with_bias: bool, seed: int, columns: int
) -> None:
    rule, num_experts = case
    logits_TE = logits(num_tokens, num_experts, seed)
    bias_E = logits(1, num_experts, seed + 1)[0] if with_bias else None
    got = gate_forward(logits_TE, rule, bias_E, launch=Launch(columns=columns))
    torch.testing.assert_close(got, gate_reference(logits_TE, rule, bias_E))


@settings(max_examples=30)
@given(st.data())
def test_triton_gate_breaks_ties_as_the_reference_does(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(2, 20))
    few = st.sampled_from([-1.0, -0.0, 0.0, 1.0])
    rows = data.draw(
        st.lists(st.lists(few, min_size=num_experts, max_size=num_experts), min_size=1, max_size=5), label="logits"
    )
    rule = GateRule(data.draw(st.integers(1, num_experts)))
    logits_TE = torch.tensor(rows)
    assert torch.equal(gate_forward(logits_TE, rule, None)[0], gate_reference(logits_TE, rule)[0])


@settings(max_examples=40)
@given(rules(), st.integers(0, 9), st.booleans(), st.integers(0, 2**31))
def test_triton_gate_backward_equals_autograds(
    case: tuple[GateRule, int], num_tokens: int, with_bias: bool, seed: int
) -> None:
    rule, num_experts = case
    logits_TE = logits(num_tokens, num_experts, seed).requires_grad_()
    bias_E = logits(1, num_experts, seed + 1)[0] if with_bias else None
    grad_TK = logits(num_tokens, rule.top_k, seed + 2)
    expert_TK, weight_TK, _ = gate_reference(logits_TE, rule, bias_E)
    (wanted_TE,) = torch.autograd.grad(weight_TK, logits_TE, grad_TK)
    got_TE = gate_backward(grad_TK, logits_TE.detach(), expert_TK, rule, launch=Launch(columns=64))
    torch.testing.assert_close(got_TE, wanted_TE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [512, 384])
def test_many_experts_in_half_precision_and_bfloat16(num_experts: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits_TE = logits(5, num_experts, 3).to(dtype)
        rule = GateRule(10, "Sigmoid", renormalise=True, num_groups=8, group_topk=4)
        torch.testing.assert_close(gate_forward(logits_TE, rule, None), gate_reference(logits_TE, rule))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("rule", [GateRule(2), GateRule(2, "Sigmoid", num_groups=2, group_topk=1)])
def test_logits_of_nan_still_give_experts_that_exist(rule: GateRule) -> None:
    logits_TE = torch.full((3, 6), float("nan"))
    logits_TE[1, :2] = 1.0
    expert_TK, _, count_E = gate_forward(logits_TE, rule, None)
    assert all(0 <= e < 6 for e in expert_TK.flatten().tolist())
    assert all(len(set(row)) == 2 for row in expert_TK.tolist())
    assert int(count_E.sum()) == 6


def test_autograd_through_the_fused_gate_equals_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = logits(6, 9, 4).requires_grad_()
    rule = GateRule(3, renormalise=True, scale=2.0)

    def gradient() -> torch.Tensor:
        _, weight_TK, _ = face.gate(logits_TE, rule)
        (grad_TE,) = torch.autograd.grad((weight_TK * torch.tensor([1.0, -2.0, 3.0])).sum(), logits_TE)
        return grad_TE

    wanted_TE = gradient()
    monkeypatch.setattr(face, "runs_triton", lambda _: True)
    torch.testing.assert_close(gradient(), wanted_TE)
