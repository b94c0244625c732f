"""Top-k routers: against loops in numpy, and against the routers of transformers' families."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from moe_core.contract.router import RouterConfig
from moe_core.outcome import InvalidInput
from moe_runtime.kernels.gate import gate_reference
from moe_runtime.router import topk
from moe_runtime.router.face import NO_EXPERT, Layout, Moment, Tokens
from moe_runtime.router.registry import build_router
from moe_runtime.router.topk import TopK
from router_cases import DIM, SERVING, dense, make_router, make_tokens, route, softmax, training

SHAPES = [(1, 4, 2), (33, 8, 2), (7, 5, 5), (0, 8, 2), (64, 60, 4)]


def naive(logits: np.ndarray[Any, Any], top_k: int, way: str) -> np.ndarray[Any, Any]:
    """[T, E] weights by a loop over tokens."""
    weights = np.zeros_like(logits)
    for token, row in enumerate(logits):
        score = softmax(row)
        if way in ("sigmoid", "root-softplus"):
            score = 1.0 / (1.0 + np.exp(-row)) if way == "sigmoid" else np.sqrt(np.log1p(np.exp(row)))
        chosen = sorted(range(len(row)), key=lambda e: -score[e])[:top_k]
        if way == "softmax-then-topk":
            weights[token, chosen] = score[chosen]
        elif way == "topk-then-softmax":
            weights[token, chosen] = softmax(row[chosen])
        else:
            weights[token, chosen] = 2.5 * score[chosen] / score[chosen].sum()
    return weights


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("softmax-then-topk", {"pre_softmax": True}),
        ("topk-then-softmax", {"pre_softmax": True, "norm_topk_prob": True}),
        ("topk-then-softmax", {}),
        ("sigmoid", {"score_function": "Sigmoid", "topk_scaling_factor": 2.5}),
        ("root-softplus", {"score_function": "SqrtSoftplus", "topk_scaling_factor": 2.5}),
    ],
)
def test_weights_are_those_of_a_loop_over_tokens(
    num_tokens: int, num_experts: int, top_k: int, way: str, options: dict[str, Any]
) -> None:
    tokens = make_tokens(num_tokens, num_experts)
    assert tokens.logits_TE is not None
    got = dense(route(make_router(num_experts, top_k, type="TopK", **options), tokens), num_experts)
    expected = naive(tokens.logits_TE.double().numpy(), top_k, way)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6, atol=1e-7)


def test_switch_takes_one_expert_whose_probability_is_its_weight() -> None:
    tokens = make_tokens(20, 6)
    assert tokens.logits_TE is not None
    routing = route(make_router(6, 2, type="Switch"), tokens)
    expected_T, expert_T = tokens.logits_TE.softmax(dim=-1).max(dim=-1)
    assert torch.equal(routing.expert_TK, expert_T[:, None])
    torch.testing.assert_close(routing.weight_TK[:, 0], expected_T)


def family_gate(family: str, **config: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    """A family's router with random weights, and the hidden states that it is asked about."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(family, hidden_size=DIM, num_attention_heads=4, **config)
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    router = next(getattr(module, name) for name in dir(module) if name.lower().endswith("topkrouter"))
    gate: torch.nn.Module = router(made)
    generator = torch.Generator().manual_seed(1)
    for value in (*gate.parameters(), *gate.buffers()):
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return gate.eval(), torch.randn(50, DIM, generator=generator)


@pytest.mark.parametrize(
    ("family", "config", "num_experts", "options"),
    [
        ("mixtral", {"num_local_experts": 8}, 8, {}),
        ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True}, 8, {}),
        ("qwen2_moe", {"num_experts": 8, "norm_topk_prob": False}, 8, {"pre_softmax": True}),
        ("olmoe", {"num_experts": 8, "norm_topk_prob": False}, 8, {"pre_softmax": True}),
        (
            "deepseek_v3",
            {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
            16,
            {
                **{"score_function": "Sigmoid", "num_groups": 4, "group_topk": 2, "topk_scaling_factor": 2.5},
                "enable_expert_bias": True,
            },
        ),
        (
            "deepseek_v2",
            {
                **{"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
                "topk_method": "group_limited_greedy",
            },
            16,
            {
                **{"pre_softmax": True, "num_groups": 4, "group_topk": 2, "group_score": "Max"},
                "topk_scaling_factor": 1.5,
            },
        ),
    ],
)
def test_a_familys_own_router_says_the_same(
    family: str, config: dict[str, Any], num_experts: int, options: dict[str, Any]
) -> None:
    gate, hidden_TD = family_gate(family, num_experts_per_tok=4, **config)
    _, weight_TK, expert_TK = gate(hidden_TD)
    weights = dict(gate.named_parameters())
    tokens = Tokens(hidden_TD, (hidden_TD @ weights["weight"].T).detach())
    router = make_router(num_experts, 4, type="TopK", **options)
    if options.get("enable_expert_bias"):
        router.get_buffer("kind.bias_E").copy_(gate.get_buffer("e_score_correction_bias"))
    expected = torch.zeros(50, num_experts).scatter_add(1, expert_TK, weight_TK.float().detach())
    torch.testing.assert_close(dense(route(router, tokens), num_experts), expected, rtol=1e-5, atol=1e-6)


def test_a_token_takes_experts_of_the_allowed_number_of_groups_only() -> None:
    tokens = make_tokens(200, 24)
    routing = route(make_router(24, 6, type="TopK", num_groups=6, group_topk=3), tokens)
    groups = [set(row) for row in (routing.expert_TK // 4).tolist()]
    assert max(map(len, groups)) == 3


def test_groups_by_device_follow_the_layout_with_copies() -> None:
    tokens = make_tokens(100, 6)
    router = make_router(6, 2, type="TopK", group_by="Device", group_topk=1, group_score="Max")
    holds_GE = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    router.use_layout(Layout(torch.zeros(6), holds_GE))
    for picks in route(router, tokens).expert_TK.tolist():
        assert any(holds_E[picks].all() for holds_E in holds_GE)


def test_a_device_with_too_few_experts_leaves_picks_to_nobody() -> None:
    tokens = make_tokens(30, 4)
    router = make_router(4, 3, type="TopK", group_by="Device", group_topk=1)
    router.use_layout(Layout(torch.zeros(4), torch.eye(2, dtype=torch.bool).repeat_interleave(2, dim=1)))
    assert ((route(router, tokens).expert_TK == NO_EXPERT).sum(dim=-1) == 1).all()


def test_a_layout_that_forgets_an_expert_is_refused() -> None:
    router = make_router(4, 2, type="TopK", group_by="Device", group_topk=1)
    with pytest.raises(InvalidInput, match=r"experts without one: \[3\]"):
        router.use_layout(Layout(torch.zeros(4), torch.tensor([[True, True, True, False]])))


def test_the_balancing_bias_moves_choices_and_never_weights() -> None:
    tokens = make_tokens(40, 8)
    assert tokens.logits_TE is not None
    router = make_router(8, 2, type="TopK", pre_softmax=True, enable_expert_bias=True)
    router.get_buffer("kind.bias_E")[5] = 10.0
    routing = route(router, tokens)
    assert (routing.expert_TK[:, 0] == 5).all()
    expected = tokens.logits_TE.softmax(dim=-1).gather(1, routing.expert_TK)
    torch.testing.assert_close(routing.weight_TK, expected)


def test_one_step_moves_the_bias_by_the_rate_against_the_load() -> None:
    router = make_router(4, 2, type="TopK", enable_expert_bias=True, bias_update_rate=0.01)
    router.after_step(torch.tensor([10, 2, 6, 6]))
    torch.testing.assert_close(router.get_buffer("kind.bias_E"), torch.tensor([-0.01, 0.01, 0.0, 0.0]))


def test_the_bias_alone_evens_a_skewed_load() -> None:
    tokens = make_tokens(512, 8, skew=0.5)
    router = make_router(8, 2, type="TopK", score_function="Sigmoid", enable_expert_bias=True, bias_update_rate=0.01)

    def load() -> torch.Tensor:
        return torch.bincount(route(router, tokens).expert_TK.flatten(), minlength=8)

    before = load()
    for _ in range(150):
        router.after_step(load())
    balance = [float(counts.float().mean() / counts.max()) for counts in (before, load())]
    assert balance[0] < 0.6
    assert balance[1] > 0.9


def test_expert_dropout_leaves_experts_out_for_all_tokens_but_never_too_many() -> None:
    tokens = make_tokens(50, 6)
    router = make_router(6, 2, type="TopK", expert_dropout=0.9)
    used = {e for picks in route(router, tokens, training()).expert_TK.tolist() for e in picks}
    assert len(used) < 6
    for seed in range(5):  # nine in ten are left out, but never so many that fewer than two remain
        assert (route(router, tokens, training(seed=seed)).expert_TK != NO_EXPERT).all()
    assert len({e for picks in route(router, tokens, SERVING).expert_TK.tolist() for e in picks}) == 6


def test_a_router_that_draws_needs_a_generator() -> None:
    router = make_router(6, 2, type="TopK", expert_dropout=0.5)
    with pytest.raises(InvalidInput, match="generator"):
        route(router, make_tokens(4, 6), Moment(is_training=True))


def test_jitter_stays_within_eps_and_only_in_training() -> None:
    router = make_router(4, 2, type="TopK", input_jitter_eps=0.1)
    x_TD = torch.ones(100, DIM)
    seen_TD = router.before_gate(x_TD, training())
    assert 0.9 <= float(seen_TD.min()) < 0.92 and 1.08 < float(seen_TD.max()) <= 1.1
    assert router.before_gate(x_TD, SERVING) is x_TD


def test_scores_are_float32_whatever_the_models_precision() -> None:
    tokens = make_tokens(10, 4)
    assert tokens.logits_TE is not None
    half = Tokens(tokens.x_TD.bfloat16(), tokens.logits_TE.bfloat16())
    routing = route(make_router(4, 2, type="TopK"), half)
    assert routing.weight_TK.dtype == torch.float32


def test_logits_of_another_number_of_experts_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"logits must be \[3 tokens, 8 experts\] \(got \[3, 4\]\)"):
        make_router(8, 2, type="TopK")(make_tokens(3, 4), SERVING)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_softmax": True},
        {"pre_softmax": True, "norm_topk_prob": True},
        {"score_function": "Sigmoid", "topk_scaling_factor": 2.5, "enable_expert_bias": True},
        {"score_function": "Sigmoid", "norm_topk_prob": False, "num_groups": 8, "group_topk": 3},
        {"num_groups": 4, "group_topk": 2, "group_score": "Max", "enable_expert_bias": True},
        {"num_groups": 2, "group_topk": 2},
    ],
)
def test_what_the_kernel_is_told_is_what_the_router_does(options: dict[str, Any]) -> None:
    tokens = make_tokens(40, 8)
    assert tokens.logits_TE is not None
    router = make_router(8, 3, type="TopK", **options)
    bias_E = None
    if options.get("enable_expert_bias"):
        bias_E = router.get_buffer("kind.bias_E").copy_(torch.linspace(-0.3, 0.3, 8))
    assert isinstance(router.kind, TopK)
    rule = router.kind.rule()
    assert rule is not None
    rule.check(8)
    expert_TK, weight_TK, _ = gate_reference(tokens.logits_TE, rule, bias_E)
    routing = route(router, tokens)
    assert torch.equal(routing.expert_TK, expert_TK)
    torch.testing.assert_close(routing.weight_TK, weight_TK)


@pytest.mark.parametrize(
    "options",
    [
        {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1, "importance_loss_coeff": 0.1, "pre_softmax": True},
        {"score_function": "Sigmoid", "num_groups": 4, "group_topk": 2, "aux_loss_coeff": 0.1},
        {"expert_capacity_factor": 0.8, "overflow": "Reroute"},
        {"expert_dropout": 0.4},
    ],
)
@pytest.mark.parametrize("is_training", [True, False])
def test_with_the_kernel_a_router_answers_the_same(
    options: dict[str, Any], is_training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for has_kernel in (False, True):
        monkeypatch.setattr(topk, "runs_triton", lambda _, has_kernel=has_kernel: has_kernel)
        router, tokens = make_router(8, 3, type="TopK", **options), make_tokens(40, 8, skew=0.4)
        assert tokens.logits_TE is not None
        logits_TE = tokens.logits_TE.requires_grad_()
        routing = route(router, tokens, training() if is_training else SERVING)
        total = (routing.weight_TK**2).sum() + sum(routing.losses.values(), torch.zeros(()))
        answers.append((routing.expert_TK, routing.weight_TK.detach(), torch.autograd.grad(total, logits_TE)[0]))
    plain, fused = answers
    assert torch.equal(fused[0], plain[0])
    torch.testing.assert_close(fused[1:], plain[1:])


@pytest.mark.parametrize(
    "options", [{"locality_bias": 1.0}, {"group_by": "Device", "group_topk": 1}, {"score_function": "SqrtSoftplus"}]
)
def test_what_the_kernel_does_not_do_it_is_not_told(options: dict[str, Any]) -> None:
    router = make_router(8, 3, type="TopK", **options)
    assert isinstance(router.kind, TopK) and router.kind.rule() is None


def test_a_router_that_does_not_fit_is_not_built() -> None:
    with pytest.raises(InvalidInput, match="num_groups must divide"):
        build_router(RouterConfig(type="TopK", num_groups=3, group_topk=1), num_experts=8, top_k=2, dim=4, layer_idx=0)


@pytest.mark.parametrize(
    "options", [{}, {"pre_softmax": True}, {"score_function": "Sigmoid"}, {"score_function": "SqrtSoftplus"}]
)
def test_gradients_of_weights_are_right(options: dict[str, Any]) -> None:
    tokens = make_tokens(5, 6)
    assert tokens.logits_TE is not None
    router = make_router(6, 3, type="TopK", **options)
    logits_TE = tokens.logits_TE.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: router(Tokens(tokens.x_TD, given), SERVING).weight_TK, [logits_TE])
