"""Balance losses: against loops, against transformers, and that a step down them evens the load."""

from typing import Any

import numpy as np
import pytest
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.losses import (
    SteeredCoefficient,
    entropy_loss,
    importance_loss,
    sequence_loss,
    squared_variation,
    switch_loss,
    z_loss,
)
from router_cases import make_router, make_tokens, route, training


def example(num_tokens: int = 24, num_experts: int = 6, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = make_tokens(num_tokens, num_experts, seed=seed, skew=0.3)
    assert tokens.logits_TE is not None
    probability_TE = tokens.logits_TE.double().softmax(dim=-1)
    return probability_TE, probability_TE.topk(2).indices


def loop_switch(probability: np.ndarray[Any, Any], picks: np.ndarray[Any, Any]) -> float:
    total = 0.0
    num_experts = probability.shape[1]
    for expert in range(num_experts):
        share = sum(1 for row in picks for e in row if e == expert) / picks.size
        total += share * sum(row[expert] for row in probability) / len(probability)
    return float(num_experts * total)


def test_switch_loss_is_that_of_a_loop() -> None:
    probability_TE, expert_TK = example()
    assert float(switch_loss(probability_TE, expert_TK)) == pytest.approx(
        loop_switch(probability_TE.numpy(), expert_TK.numpy()), rel=1e-6
    )


def test_switch_loss_is_transformers_divided_by_the_experts_of_a_token() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    tokens = make_tokens(40, 8, skew=0.2)
    assert tokens.logits_TE is not None
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    theirs = load_balancing_loss_func((tokens.logits_TE,), num_experts=8, top_k=2)
    torch.testing.assert_close(switch_loss(probability_TE, probability_TE.topk(2).indices), theirs / 2)


def test_switch_loss_is_one_when_load_is_even() -> None:
    probability_TE = torch.full((12, 4), 0.25)
    assert float(switch_loss(probability_TE, torch.arange(12)[:, None] % 4)) == pytest.approx(1.0)


def test_a_sequences_loss_is_the_mean_of_the_loss_of_each() -> None:
    probability_TE, expert_TK = example()
    sequence_T = torch.tensor([0] * 5 + [2] * 12 + [3] * 7)  # nobody is of sequence 1
    each = [
        loop_switch(probability_TE[sequence_T == row].numpy(), expert_TK[sequence_T == row].numpy())
        for row in (0, 2, 3)
    ]
    assert float(sequence_loss(probability_TE, expert_TK, sequence_T)) == pytest.approx(np.mean(each), rel=1e-6)


def test_the_ranks_global_losses_average_to_the_loss_of_all_their_tokens() -> None:
    probability_TE, expert_TK = example(24)
    halves = [(probability_TE[:12], expert_TK[:12]), (probability_TE[12:], expert_TK[12:])]
    count_E = torch.bincount(expert_TK.flatten(), minlength=6).float()
    ranks = [switch_loss(p, e, sum_over_ranks=lambda _: count_E) for p, e in halves]
    assert float(sum(ranks)) / 2 == pytest.approx(float(switch_loss(probability_TE, expert_TK)), rel=1e-6)


@pytest.mark.parametrize(
    ("scope", "expected"), [("AuxLoss", switch_loss), ("SeqAuxLoss", sequence_loss), ("GlobalAuxLoss", switch_loss)]
)
def test_the_scope_of_a_configured_loss_is_the_one_given(scope: str, expected: Any) -> None:
    tokens = make_tokens(30, 6, skew=0.4)
    assert tokens.logits_TE is not None
    router = make_router(6, 2, type="TopK", aux_loss_coeff=0.5, load_balancing_type=scope)
    asked: list[torch.Tensor] = []

    def sum_over_ranks(count_E: torch.Tensor) -> torch.Tensor:
        asked.append(count_E)
        return count_E * 2

    routing = route(router, tokens, training(sum_over_ranks=sum_over_ranks))
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    more = (tokens.sequence_T,) if scope == "SeqAuxLoss" else ()
    torch.testing.assert_close(routing.losses["aux"], 0.5 * expected(probability_TE, routing.expert_TK, *more))
    assert len(asked) == (scope == "GlobalAuxLoss")


def test_a_loss_per_sequence_without_sequences_is_refused() -> None:
    router = make_router(6, 2, type="TopK", aux_loss_coeff=0.5, load_balancing_type="SeqAuxLoss")
    tokens = make_tokens(8, 6)
    with pytest.raises(InvalidInput, match="needs sequence_T"):
        router(Tokens(tokens.x_TD, tokens.logits_TE), training())


def test_losses_are_of_training_alone() -> None:
    router = make_router(6, 2, type="TopK", aux_loss_coeff=0.5, z_loss_coeff=0.1, importance_loss_coeff=0.1)
    assert set(route(router, make_tokens(8, 6), training()).losses) == {"aux", "z", "importance"}
    assert route(router, make_tokens(8, 6), Moment()).losses == {}


def test_squared_variation_is_variance_over_squared_mean() -> None:
    amounts = np.array([1.0, 5.0, 2.0, 0.0])
    got = float(squared_variation(torch.from_numpy(amounts)))
    assert got == pytest.approx(amounts.var() / amounts.mean() ** 2)
    assert float(squared_variation(torch.ones(5))) == 0.0
    assert float(squared_variation(torch.zeros(5))) == 0.0


def test_importance_sums_weights_by_expert_and_skips_picks_that_are_none() -> None:
    expert_TK = torch.tensor([[0, 1], [0, -1], [2, 0]])
    weight_TK = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    expected = squared_variation(torch.tensor([2.25, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(importance_loss(weight_TK, expert_TK, 4), expected)


def test_z_loss_is_the_mean_squared_log_of_the_denominator() -> None:
    logits = np.random.default_rng(0).normal(size=(10, 4))
    expected = np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits])
    assert float(z_loss(torch.from_numpy(logits))) == pytest.approx(expected)


def test_entropy_is_that_of_scipy() -> None:
    from scipy.stats import entropy

    probability_TE, _ = example()
    assert float(entropy_loss(probability_TE)) == pytest.approx(entropy(probability_TE.numpy(), axis=1).mean())


@pytest.mark.parametrize("name", ["aux", "sequence", "importance", "z", "entropy"])
def test_gradients_are_right(name: str) -> None:
    sequence_T = torch.tensor([0, 0, 1, 1, 1])

    def loss(logits_TE: torch.Tensor) -> torch.Tensor:
        probability_TE = logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = probability_TE.topk(2)
        losses = {
            "aux": lambda: switch_loss(probability_TE, expert_TK),
            "sequence": lambda: sequence_loss(probability_TE, expert_TK, sequence_T),
            "importance": lambda: importance_loss(weight_TK, expert_TK, 4),
            "z": lambda: z_loss(logits_TE),
            "entropy": lambda: entropy_loss(probability_TE),
        }
        return losses[name]()

    logits_TE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, [logits_TE])


@pytest.mark.parametrize(
    "options",
    [
        {"aux_loss_coeff": 1.0},
        {"aux_loss_coeff": 1.0, "load_balancing_type": "SeqAuxLoss"},
        {"importance_loss_coeff": 1.0, "pre_softmax": True},
    ],
)
def test_going_down_a_balance_loss_evens_the_load(options: dict[str, Any]) -> None:
    tokens = make_tokens(256, 6, skew=0.5)
    assert tokens.logits_TE is not None
    router = make_router(6, 2, type="TopK", **options)
    offset_E = torch.zeros(6, requires_grad=True)
    balance = []
    for _ in range(60):
        routing = route(
            router, Tokens(tokens.x_TD, tokens.logits_TE + offset_E, sequence_T=tokens.sequence_T), training()
        )
        load_E = torch.bincount(routing.expert_TK.flatten(), minlength=6)
        balance.append(float(load_E.float().mean() / load_E.max()))
        (grad_E,) = torch.autograd.grad(sum(routing.losses.values(), torch.zeros(())), offset_E)
        offset_E.data -= grad_E
    assert balance[-1] > balance[0] + 0.2


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_losses_of_few_tokens_are_finite_with_a_gradient(num_tokens: int) -> None:
    options: dict[str, Any] = {"aux_loss_coeff": 1.0, "z_loss_coeff": 1.0, "importance_loss_coeff": 1.0}
    tokens = make_tokens(num_tokens, 6)
    assert tokens.logits_TE is not None
    logits_TE = tokens.logits_TE.requires_grad_()
    routing = route(make_router(6, 2, type="TopK", **options), Tokens(tokens.x_TD, logits_TE), training())
    (grad_TE,) = torch.autograd.grad(sum(routing.losses.values(), torch.zeros(())), logits_TE)
    assert grad_TE.isfinite().all()


def test_the_coefficient_rises_below_its_target_and_falls_above() -> None:
    router = make_router(*(4, 2), type="TopK", aux_loss_coeff=0.1, aux_loss_target_percent=80, aux_loss_adapt_rate=0.1)
    tokens = make_tokens(16, 4)

    def loss() -> float:
        return float(route(router, tokens, training()).losses["aux"])

    start = loss()
    router.after_step(torch.tensor([10, 2, 2, 2]))
    assert loss() == pytest.approx(1.1 * start)
    router.after_step(torch.tensor([4, 4, 4, 4]))
    assert loss() == pytest.approx(start)


def test_a_coefficient_stays_within_bounds_and_comes_back() -> None:
    steered = SteeredCoefficient(1.0, target=0.9, rate=0.5)
    for _ in range(100):
        steered.after_step(torch.tensor([9, 1]))
    assert float(steered.factor) == 1000.0
    for _ in range(20):
        steered.after_step(torch.tensor([5, 5]))
    assert float(steered.factor) < 1.0


def test_a_step_without_tokens_moves_no_coefficient() -> None:
    steered = SteeredCoefficient(1.0, target=0.9, rate=0.5)
    steered.after_step(torch.zeros(4, dtype=torch.int64))
    assert float(steered.factor) == 1.0
