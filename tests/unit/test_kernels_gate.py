"""The plain gate against transformers' own routers, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_core.outcome import InvalidInput
from moe_runtime.kernels.gate import GateRule, gate

D, E, K = 32, 24, 4

SIZES: dict[str, Any] = {"hidden_size": D, "num_experts_per_tok": K}
DEEPSEEK: dict[str, Any] = {**SIZES, "n_routed_experts": E, "n_group": 6, "topk_group": 2, "routed_scaling_factor": 2.5}
V3 = GateRule(K, "Sigmoid", renormalise=True, scale=2.5, num_groups=6, group_topk=2)

ROUTERS: dict[str, tuple[Callable[[], Any], GateRule]] = {
    "mixtral": (lambda: MixtralTopKRouter(MixtralConfig(num_local_experts=E, **SIZES)), GateRule(K, over_chosen=True)),
    "qwen3_moe": (
        lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=E, norm_topk_prob=False, **SIZES)),
        GateRule(K),
    ),
    "qwen3_moe, renormalised": (
        lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=E, norm_topk_prob=True, **SIZES)),
        GateRule(K, renormalise=True),
    ),
    "gpt_oss": (lambda: GptOssTopKRouter(GptOssConfig(num_local_experts=E, **SIZES)), GateRule(K, over_chosen=True)),
    "deepseek_v2": (
        lambda: DeepseekV2TopkRouter(DeepseekV2Config(topk_method="group_limited_greedy", **DEEPSEEK)),
        GateRule(K, scale=2.5, num_groups=6, group_topk=2, group_best=1),
    ),
    "deepseek_v3": (lambda: DeepseekV3TopkRouter(DeepseekV3Config(norm_topk_prob=True, **DEEPSEEK)), V3),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_gate_takes_the_experts_and_weights_of_transformers_own_router(name: str) -> None:
    make, rule = ROUTERS[name]
    generator = torch.Generator().manual_seed(1)
    router, x_TD = make(), torch.randn(64, D, generator=generator)
    bias_E = None
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        bias_E = getattr(router, "e_score_correction_bias", None)
    logits_TE, wanted_TK, ids_TK = router(x_TD)
    expert_TK, weight_TK, count_E = gate(logits_TE, rule, bias_E)
    order_TK = ids_TK.argsort(dim=-1)
    torch.testing.assert_close(expert_TK.sort(dim=-1).values, ids_TK.gather(1, order_TK))
    torch.testing.assert_close(weight_TK.gather(1, expert_TK.argsort(dim=-1)), wanted_TK.gather(1, order_TK))
    assert count_E.tolist() == [int((ids_TK == e).sum()) for e in range(E)]


def test_among_equals_the_lower_expert_wins_and_the_best_pick_comes_first() -> None:
    expert_TK, _, _ = gate(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), GateRule(3))
    assert expert_TK.tolist() == [[1, 3, 0]]


def test_equal_groups_are_taken_from_the_lowest() -> None:
    rule = GateRule(2, num_groups=3, group_topk=1)
    expert_TK, _, _ = gate(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]), rule)
    assert expert_TK.tolist() == [[2, 3]]


def test_the_bias_moves_the_choice_and_not_the_weight() -> None:
    logits_TE = torch.tensor([[0.5, 0.1]])
    expert_TK, weight_TK, _ = gate(logits_TE, GateRule(1, "Sigmoid"), torch.tensor([0.0, 5.0]))
    assert expert_TK.tolist() == [[1]]
    torch.testing.assert_close(weight_TK, logits_TE[:, 1:].sigmoid())


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (GateRule(0), "top_k must be one of 1..6"),
        (GateRule(7), r"got 7\)"),
        (GateRule(1, num_groups=4, group_topk=2), "got 4 and 2 for 6 experts"),
        (GateRule(1, num_groups=3, group_topk=4), "got 3 and 4 for 6 experts"),
        (GateRule(3, num_groups=3, group_topk=1), "top_k must be one of 1..2"),
        (GateRule(1, num_groups=6, group_topk=2), "1 or 2 of a group's 1 experts"),
        (GateRule(1, "Sigmoid", over_chosen=True), "over_chosen is of Softmax"),
    ],
)
def test_a_rule_that_does_not_fit_the_experts_is_refused_with_its_numbers(rule: GateRule, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        gate(torch.zeros(1, 6), rule)


def test_a_bias_of_other_experts_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"bias must be \[6\]"):
        gate(torch.zeros(1, 6), GateRule(1), torch.zeros(5))
