"""Routers that look at the whole batch: what each promises of it, and how each routes a token alone."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe_core.outcome import InvalidInput
from moe_runtime.router.assignment import MOST_TOKENS, assign_evenly
from moe_runtime.router.face import NO_EXPERT, Tokens
from moe_runtime.router.sinkhorn import log_plan
from router_cases import DIM, SERVING, WHOLE_TEXTS, make_router, make_tokens, route, softmax, training

LOOK_AHEAD: dict[str, dict[str, Any]] = {
    "ExpertChoice": {},
    "SoftMoE": {},
    "Sinkhorn": {},
    "Base": {},
    "TopK": {"expert_capacity_factor": 1.0},
}


def shift_last(tokens: Tokens) -> Tokens:
    """Another last token."""
    assert tokens.logits_TE is not None
    logits_TE, x_TD = tokens.logits_TE.clone(), tokens.x_TD.clone()
    logits_TE[-1] = logits_TE[-1].flip(0) * 3
    x_TD[-1] = -x_TD[-1] * 3
    return Tokens(x_TD, logits_TE, sequence_T=tokens.sequence_T)


@pytest.mark.parametrize("kind", LOOK_AHEAD)
def test_who_looks_ahead_says_so(kind: str) -> None:
    """A later token changes some earlier token's route in a whole text."""
    router = make_router(4, 2, type=kind, **LOOK_AHEAD[kind])
    assert router.looks_ahead
    tokens = make_tokens(15, 4, skew=0.4, rows=1)
    before, after = (route(router, given, WHOLE_TEXTS) for given in (tokens, shift_last(tokens)))
    if before.soft is not None and after.soft is not None:
        assert not torch.allclose(before.soft.mix_TP[:-1], after.soft.mix_TP[:-1])
    else:
        assert not torch.equal(before.expert_TK[:-1], after.expert_TK[:-1])


@pytest.mark.parametrize("kind", LOOK_AHEAD)
def test_where_tokens_do_not_compete_each_is_routed_as_if_alone(kind: str) -> None:
    router, tokens = make_router(4, 2, type=kind, **LOOK_AHEAD[kind]), make_tokens(9, 4)
    assert tokens.logits_TE is not None
    together = route(router, tokens, SERVING)
    for token in range(9):
        alone = route(router, Tokens(tokens.x_TD[token, None], tokens.logits_TE[token, None]), SERVING)
        assert torch.equal(alone.expert_TK[0], together.expert_TK[token])
        torch.testing.assert_close(alone.weight_TK[0], together.weight_TK[token])


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_every_expert_chooses_its_most_probable_tokens(factor: float) -> None:
    tokens = make_tokens(30, 6)
    assert tokens.logits_TE is not None
    routing = route(make_router(6, 2, type="ExpertChoice", expert_capacity_factor=factor), tokens, training())
    probability = np.array([softmax(row) for row in tokens.logits_TE.double().numpy()])
    for expert in range(6):
        best = set(np.argsort(-probability[:, expert])[: round(factor * 10)].tolist())
        at_TK = routing.expert_TK == expert
        assert set(at_TK.any(dim=-1).nonzero().flatten().tolist()) == best
        got = routing.weight_TK[at_TK].detach().numpy()
        np.testing.assert_allclose(sorted(got), sorted(probability[sorted(best), expert]), rtol=1e-5)


def test_an_expert_cannot_choose_more_tokens_than_there_are() -> None:
    routing = route(make_router(4, 4, type="ExpertChoice", expert_capacity_factor=3.0), make_tokens(5, 4), training())
    assert (routing.expert_TK != NO_EXPERT).all()


def test_soft_rows_are_those_of_a_loop_over_sequences() -> None:
    router = make_router(3, 2, type="SoftMoE", rows_per_expert=2, soft_normalize=False)
    tokens = make_tokens(11, 3, rows=3)
    assert tokens.sequence_T is not None
    soft = route(router, tokens, training()).soft
    assert soft is not None
    phi = router.get_parameter("kind.phi_DP").detach().double().numpy()
    logits = tokens.x_TD.double().numpy() @ phi
    rows = tokens.sequence_T.numpy()
    mix, share = np.zeros((2, 11, 3, 3, 2))
    for sequence in range(3):
        mine = np.flatnonzero(rows == sequence)
        for expert, row in itertools.product(range(3), range(2)):
            mix[mine, expert, sequence, row] = softmax(logits[mine, expert * 2 + row])
        for token in mine:
            share[token, :, sequence, :] = softmax(logits[token]).reshape(3, 2)
    np.testing.assert_allclose(soft.mix_TP.detach().numpy(), mix.reshape(11, -1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(soft.share_TP.detach().numpy(), share.reshape(11, -1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalised", [True, False])
def test_soft_mixtures_and_shares_sum_to_one(normalised: bool) -> None:
    router = make_router(4, 2, type="SoftMoE", rows_per_expert=3, soft_normalize=normalised)
    soft = route(router, make_tokens(20, 4), training()).soft
    assert soft is not None
    torch.testing.assert_close(soft.mix_TP.sum(dim=0), torch.ones(4 * 2 * 3))
    torch.testing.assert_close(soft.share_TP.sum(dim=1), torch.ones(20))


def test_normalised_soft_moe_does_not_see_the_length_of_tokens() -> None:
    router, tokens = make_router(4, 2, type="SoftMoE"), make_tokens(10, 4)
    first, longer = (route(router, Tokens(factor * tokens.x_TD, tokens.logits_TE), training()) for factor in (1, 50))
    assert first.soft is not None and longer.soft is not None
    torch.testing.assert_close(first.soft.mix_TP, longer.soft.mix_TP)


def test_a_sequence_without_tokens_has_rows_of_nothing() -> None:
    router, tokens = make_router(2, 1, type="SoftMoE"), make_tokens(4, 2)
    given = Tokens(tokens.x_TD, tokens.logits_TE, sequence_T=torch.tensor([0, 0, 2, 2]))
    soft = route(router, given, training()).soft
    assert soft is not None
    assert soft.mix_TP.sum(dim=0).tolist() == pytest.approx([1, 0, 1, 1, 0, 1])
    grads = torch.autograd.grad(soft.mix_TP.square().sum(), list(router.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_a_token_alone_takes_all_experts_as_a_sequence_of_one_would() -> None:
    router, tokens = make_router(4, 2, type="SoftMoE", rows_per_expert=2), make_tokens(1, 4)
    alone, soft = route(router, tokens, SERVING), route(router, tokens, training()).soft
    assert soft is not None
    assert (soft.mix_TP == 1).all()
    torch.testing.assert_close(alone.weight_TK, soft.share_TP.view(1, 4, 2).sum(dim=-1))


def test_gradients_of_soft_rows_are_right() -> None:
    router, tokens = make_router(2, 1, type="SoftMoE", rows_per_expert=2).double(), make_tokens(5, 2)

    def rows(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        soft = router(Tokens(x_TD, None, sequence_T=tokens.sequence_T), training()).soft
        return soft.mix_TP, soft.share_TP

    assert torch.autograd.gradcheck(rows, [tokens.x_TD.double().requires_grad_()])


def naive_sinkhorn(logits: np.ndarray[Any, Any], rounds: int) -> np.ndarray[Any, Any]:
    plan = np.exp(logits)
    for _ in range(rounds):
        plan = plan / plan.sum(axis=1, keepdims=True) / plan.shape[0]
        plan = plan / plan.sum(axis=0, keepdims=True) / plan.shape[1]
    return np.asarray(plan)


def test_the_plan_is_that_of_plain_scaling_and_has_even_margins() -> None:
    logits_TE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = log_plan(logits_TE, tolerance=1e-10, iterations=1000).exp()
    np.testing.assert_allclose(plan.numpy(), naive_sinkhorn(logits_TE.numpy(), 1000), rtol=1e-6)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((5,), 1 / 5, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(dim=1), torch.full((40,), 1 / 40, dtype=torch.float64))


def test_the_plan_of_huge_logits_is_finite() -> None:
    logits_TE = 300 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert log_plan(logits_TE, tolerance=1e-4, iterations=50).isfinite().all()


def test_sinkhorn_is_more_even_than_the_best_logits_and_weighs_by_plain_scores() -> None:
    tokens = make_tokens(400, 8, skew=0.4)
    assert tokens.logits_TE is not None
    router = make_router(8, 2, type="Sinkhorn")
    planned, greedy = route(router, tokens, training()), route(router, tokens, SERVING)
    balance = [float(counts.float().mean() / counts.max()) for counts in map(load, (planned, greedy))]
    assert balance[0] > balance[1] + 0.3
    expected = tokens.logits_TE.softmax(dim=-1).gather(1, planned.expert_TK)
    torch.testing.assert_close(planned.weight_TK, expected)


def test_sinkhorn_of_one_expert_per_token_weighs_by_the_sigmoid() -> None:
    tokens = make_tokens(20, 4)
    assert tokens.logits_TE is not None
    routing = route(make_router(4, 1, type="Sinkhorn"), tokens, training())
    torch.testing.assert_close(routing.weight_TK, tokens.logits_TE.gather(1, routing.expert_TK).sigmoid())


def load(routing: Any) -> torch.Tensor:
    return torch.bincount(routing.expert_TK.flatten(), minlength=8)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(6, 3), (7, 3), (5, 4), (2, 4), (8, 2), (0, 3), (1, 1)])
def test_the_assignment_is_the_best_of_all_even_ones(num_tokens: int, num_experts: int) -> None:
    value_TE = np.random.default_rng(num_tokens).normal(size=(num_tokens, num_experts))
    allowed = {num_tokens // num_experts, -(-num_tokens // num_experts)}
    best = max(
        sum(value_TE[t, e] for t, e in enumerate(choice))
        for choice in itertools.product(range(num_experts), repeat=num_tokens)
        if all(choice.count(e) in allowed for e in range(num_experts))
    )
    got = assign_evenly(value_TE)
    assert {int((got == e).sum()) for e in range(num_experts)} <= allowed
    assert value_TE[np.arange(num_tokens), got].sum() == pytest.approx(best)


@pytest.mark.parametrize(("num_tokens", "skew"), [(96, 0.0), (96, 3.0), (101, 1.0), (101, 50.0)])
def test_prices_change_no_assignment(num_tokens: int, skew: float) -> None:
    """Against the solver on the values as they are, for as many tokens as leave no rest and for a rest."""
    value_TE = np.random.default_rng(1).normal(size=(num_tokens, 8)) - skew * np.arange(8)
    got = assign_evenly(value_TE)
    least, rest = divmod(num_tokens, 8)
    assert sorted(np.bincount(got, minlength=8).tolist()) == [least] * (8 - rest) + [least + 1] * rest
    place_E = np.concatenate([np.repeat(np.arange(8), least), np.arange(8) if rest else np.arange(0)])
    nobody = np.tile(np.where(np.arange(place_E.size) < 8 * least, -np.inf, 0.0), (8 - rest if rest else 0, 1))
    rows, places = linear_sum_assignment(np.concatenate([value_TE[:, place_E], nobody]), maximize=True)
    best = value_TE[rows[:num_tokens], place_E[places[:num_tokens]]].sum()
    assert value_TE[np.arange(num_tokens), got].sum() == pytest.approx(best, rel=1e-12)


def test_values_that_are_not_finite_end_no_step_here() -> None:
    value_TE = np.zeros((5, 2))
    value_TE[3, 1] = np.nan
    assert assign_evenly(value_TE).tolist() == [0, 1, 0, 1, 0]


def test_base_weighs_by_the_sigmoid_and_decodes_greedily() -> None:
    tokens = make_tokens(21, 4, skew=1.0)
    assert tokens.logits_TE is not None
    router = make_router(4, 2, type="Base")
    trained, served = route(router, tokens, training()), route(router, tokens, SERVING)
    assert sorted(torch.bincount(trained.expert_TK[:, 0]).tolist()) == [5, 5, 5, 6]
    torch.testing.assert_close(trained.weight_TK, tokens.logits_TE.gather(1, trained.expert_TK).sigmoid())
    assert torch.equal(served.expert_TK[:, 0], tokens.logits_TE.argmax(dim=-1))


def test_base_refuses_more_tokens_than_it_can_assign() -> None:
    with pytest.raises(InvalidInput, match=f"at most {MOST_TOKENS} tokens"):
        assign_evenly(np.zeros((MOST_TOKENS + 1, 2)))


@pytest.mark.parametrize("kind", ["ExpertChoice", "Sinkhorn", "Base"])
def test_gradients_of_weights_are_right(kind: str) -> None:
    router, x_TD = make_router(3, 2, type=kind), torch.zeros(6, DIM)
    logits_TE = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: router(Tokens(x_TD, given), training()).weight_TK, [logits_TE])
