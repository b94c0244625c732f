"""The gates of transformers' families, most of which `type: TopK` can say: same experts, same weights.

A family is tried with every gate of its module that is a weight [E, D] and a bias or correction per expert. Those that
no options can say are named with what they do.
"""

from importlib import import_module
from typing import Any

import pytest
import torch

from moe_core.contract.families import SERVED
from moe_runtime.router.face import Tokens
from router_cases import SERVING, dense, make_router, route

pytestmark = pytest.mark.integration

DIM, EXPERTS, TOP_K = 16, 16, 4
OVER_CHOSEN: dict[str, Any] = {}
BEFORE: dict[str, Any] = {"pre_softmax": True}
SIGMOID: dict[str, Any] = {"score_function": "Sigmoid"}
GROUPS: dict[str, Any] = {"num_groups": 4, "group_topk": 2}
OPTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    (
        OVER_CHOSEN,
        "aria cohere2_moe gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe mellum "
        "minimax mixtral qwen3_5_moe qwen3_next qwen3_vl_moe qwen4_exp",
    ),
    (BEFORE, "deepseek_ocr2 deepseek_v2 flex_olmo jamba olmoe qwen2_moe qwen3_moe"),
    (GROUPS, "mistral4 mistral_large4"),
    ({"score_function": "SqrtSoftplus"}, "deepseek_v4"),
    (SIGMOID, "axk2 flint inkling2 laguna minimax_m3_vl step3p7"),
    ({**SIGMOID, "norm_topk_prob": False, **GROUPS}, "dots1"),
    (
        {**SIGMOID, **GROUPS},
        "axk1 bailing_hybrid beam deepseek_v3 deepseek_v32 dots3_note exaone_moe glm4_moe glm4_moe_lite glm4v_moe "
        "glm5_next glm_moe_dsa hy_v4 kimi_linear mimo_v2_flash nemotron_h solar_open",
    ),
)
OF_FAMILY = {family: options for options, families in OPTIONS for family in families.split()}
SCALED_ELSEWHERE = {"beam", "minimax_m3_vl"}
"""The layer multiplies the experts' sum, not its gate the weights."""
OTHERWISE = {
    "afmoe": "the layer hands its gate a correction of its own",
    "ernie4_5_moe": "a correction with a row for text and one for pictures",
    "ernie4_5_vl_moe": "a correction with a row for text and one for pictures",
    "gemma4": "a norm before the gate, a factor per expert on the weights",
    "hy_v3": "the layer hands its gate a correction of its own",
    "kolibri1": "the correction is added to logits",
    "lfm2_moe": "the correction is made by the layer",
    "minimax_m2": "the layer hands its gate a correction of its own",
    "muse_spark": "logits are multiplied by a constant first",
    "phimoe": "SparseMixer: each pick by a softmax of its own",
    "zaya": "a gate of several layers",
}


def gate_of(family: str) -> type[torch.nn.Module] | None:
    """The router of this family's text, if its module defines one."""
    try:
        module = import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and name.lower().endswith(("router", "moev1gate"))
        and not any(other in name for other in ("Vision", "Hash"))
    ]
    return found[0] if found else None


def small_config(family: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family).get_text_config(decoder=True)
    for names, value in (
        (("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
        (("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), TOP_K),
    ):
        for name in names:
            if hasattr(config, name):
                setattr(config, name, value)
    config.hidden_size = DIM
    if getattr(config, "n_group", None):
        config.n_group, config.topk_group = 4, 2
    return config


@pytest.mark.parametrize("family", sorted(OF_FAMILY))
def test_a_familys_gate_is_said_by_options(family: str) -> None:
    gate_type = gate_of(family)
    assert gate_type is not None
    config = small_config(family)
    gate: Any = gate_type(config)
    generator = torch.Generator().manual_seed(0)
    for value in (*gate.parameters(), *gate.buffers()):
        value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
    x_TD = torch.randn(50, DIM, generator=generator)
    answer = [given.detach() for given in gate.eval()(x_TD) if isinstance(given, torch.Tensor)]
    expert_TK = next(given for given in answer if not given.is_floating_point())
    weight_TK = [given for given in answer if given.is_floating_point() and given.shape == expert_TK.shape][-1]

    named = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
    weight_ED = next(value for value in named.values() if value.shape == (EXPERTS, DIM))
    per_expert = {name: value for name, value in named.items() if value.shape == (EXPERTS,)}
    linear = [value for name, value in per_expert.items() if name.endswith("bias") and "correction" not in name]
    logits_TE = torch.nn.functional.linear(x_TD, weight_ED, *linear).detach()
    corrections = [value for name, value in per_expert.items() if "correction" in name]
    options = {**OF_FAMILY[family], "enable_expert_bias": bool(corrections)}
    if family not in SCALED_ELSEWHERE:
        options["topk_scaling_factor"] = getattr(config, "routed_scaling_factor", None) or 1.0
    router = make_router(EXPERTS, expert_TK.shape[1], type="TopK", **options)
    for correction_E in corrections:
        router.get_buffer("kind.bias_E").copy_(correction_E)
    expected_TE = torch.zeros(50, EXPERTS).scatter_add(1, expert_TK.long(), weight_TK.float())
    torch.testing.assert_close(dense(route(router, Tokens(x_TD, logits_TE), SERVING), EXPERTS), expected_TE)


def test_a_family_is_said_or_told_why_not() -> None:
    with_gate = {family for family in SERVED if gate_of(family) is not None}
    assert with_gate == set(OF_FAMILY) | set(OTHERWISE)
