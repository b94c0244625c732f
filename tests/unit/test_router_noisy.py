"""Noise in routers: what it promises in the mean, and that it is gone where nobody trains."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import norm

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.noisy import chance_of_choice
from router_cases import DIM, SERVING, make_router, make_tokens, route, training

LOGITS = torch.tensor([1.0, 0.3, -0.5, 0.0])


def same_tokens(count: int) -> Tokens:
    return Tokens(torch.zeros(count, DIM), LOGITS.expand(count, -1))


@pytest.mark.parametrize("kind", ["NoisyTopK", "GumbelTopK"])
def test_without_training_there_is_no_noise(kind: str) -> None:
    tokens = make_tokens(30, 8)
    plain = route(make_router(8, 2, type="TopK"), tokens)
    quiet = route(make_router(8, 2, type=kind), tokens, SERVING)
    assert torch.equal(quiet.expert_TK, plain.expert_TK)
    torch.testing.assert_close(quiet.weight_TK, plain.weight_TK)


@pytest.mark.parametrize("kind", ["NoisyTopK", "GumbelTopK"])
def test_the_same_generator_draws_the_same_routes(kind: str) -> None:
    router, tokens = make_router(8, 2, type=kind), make_tokens(30, 8)
    first, again, other = (route(router, tokens, training(seed=seed)).expert_TK for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["NoisyTopK", "GumbelTopK"])
def test_noise_without_a_generator_is_refused(kind: str) -> None:
    with pytest.raises(InvalidInput, match=r"moment\.generator"):
        route(make_router(8, 2, type=kind), make_tokens(3, 8), Moment(is_training=True))


def test_gumbel_picks_are_a_draw_without_replacement_from_the_softmax() -> None:
    """Against Plackett and Luce's formula for ordered pairs."""
    count = 40000
    picks = route(make_router(4, 2, type="GumbelTopK"), same_tokens(count), training()).expert_TK
    seen = Counter(map(tuple, picks.tolist()))
    p = LOGITS.softmax(dim=0).tolist()
    for first in range(4):
        for second in set(range(4)) - {first}:
            expected = p[first] * p[second] / (1 - p[first])
            spread = 5 * math.sqrt(expected * (1 - expected) / count)
            assert seen[first, second] / count == pytest.approx(expected, abs=spread)


def test_gumbel_weights_are_those_of_the_logits_without_noise() -> None:
    tokens = make_tokens(20, 8)
    assert tokens.logits_TE is not None
    routing = route(make_router(8, 2, type="GumbelTopK"), tokens, training())
    expected = tokens.logits_TE.gather(1, routing.expert_TK).softmax(dim=-1)
    torch.testing.assert_close(routing.weight_TK, expected)


def test_noisy_weights_are_a_softmax_over_the_best_noisy_logits() -> None:
    """The noise is drawn again beside the router, from an equal generator."""
    tokens = make_tokens(25, 6)
    assert tokens.logits_TE is not None
    router = make_router(6, 2, type="NoisyTopK")
    weight_ED = router.get_parameter("kind.noise_weight_ED")
    weight_ED.data.copy_(torch.randn(6, DIM, generator=torch.Generator().manual_seed(3)) * 0.2)
    noise = torch.randn(25, 6, generator=torch.Generator().manual_seed(9)).double().numpy()
    scale = np.log1p(np.exp(tokens.x_TD.double().numpy() @ weight_ED.detach().double().numpy().T)) + 0.01
    noisy = tokens.logits_TE.double().numpy() + noise * scale
    routing = route(router, tokens, training(seed=9))
    for token in range(25):
        chosen = np.argsort(-noisy[token])[:2]
        power = np.exp(noisy[token][chosen])
        assert routing.expert_TK[token].tolist() == chosen.tolist()
        np.testing.assert_allclose(routing.weight_TK[token].detach().numpy(), power / power.sum(), rtol=1e-4)


def test_the_chance_of_a_choice_is_that_of_drawing_its_noise_again() -> None:
    generator = torch.Generator().manual_seed(0)
    clean_TE, noise_TE = torch.randn(2, 3, 5, generator=generator)
    scale_TE = torch.rand(3, 5, generator=generator) + 0.2
    noisy_TE = clean_TE + noise_TE * scale_TE
    got = chance_of_choice(clean_TE, noisy_TE, scale_TE, 2)
    for token in range(3):
        for expert in range(5):
            others = sorted(noisy_TE[token][[e for e in range(5) if e != expert]].tolist())
            gap = (float(clean_TE[token, expert]) - others[-2]) / float(scale_TE[token, expert])
            assert float(got[token, expert]) == pytest.approx(norm.cdf(gap), abs=1e-5)


def test_expected_load_is_the_mean_load_over_draws() -> None:
    tokens = same_tokens(20000)
    router = make_router(4, 2, type="NoisyTopK")
    picks = route(router, tokens, training()).expert_TK
    share = torch.bincount(picks.flatten(), minlength=4) / 20000
    scale_TE = torch.full((20000, 4), math.log(2) + 0.01)
    drawn = LOGITS + scale_TE * torch.randn(20000, 4, generator=torch.Generator().manual_seed(5))
    expected = chance_of_choice(LOGITS.expand(20000, -1), drawn, scale_TE, 2).mean(dim=0)
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)


def test_the_load_loss_evens_what_the_importance_loss_cannot_see() -> None:
    """Going down the load loss by offsets of the logits makes the experts' expected loads more equal."""
    router = make_router(4, 2, type="NoisyTopK", load_loss_coeff=1.0)
    offset_E = torch.zeros(4, requires_grad=True)
    losses = []
    for step in range(40):
        tokens = Tokens(torch.zeros(400, DIM), LOGITS + offset_E.expand(400, -1))
        loss = route(router, tokens, training(seed=step)).losses["load"]
        losses.append(float(loss.detach()))
        (grad_E,) = torch.autograd.grad(loss, offset_E)
        offset_E.data -= grad_E
    assert losses[-1] < 0.1 * losses[0]


def test_gradients_of_the_load_loss_are_right() -> None:
    tokens = make_tokens(6, 5)
    assert tokens.logits_TE is not None
    router = make_router(5, 2, type="NoisyTopK", load_loss_coeff=1.0)
    weight_ED = router.get_parameter("kind.noise_weight_ED")
    weight_ED.data = torch.randn(5, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.3

    def loss(logits_TE: torch.Tensor, weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = {"kind.noise_weight_ED": weight_ED}
        given = (Tokens(tokens.x_TD.double(), logits_TE), training(seed=4))
        routing = torch.func.functional_call(router, parameters, given)
        return routing.losses["load"], routing.weight_TK

    assert torch.autograd.gradcheck(loss, [tokens.logits_TE.double().requires_grad_(), weight_ED])


def test_when_a_token_takes_all_experts_nobodys_chance_is_in_doubt() -> None:
    routing = route(make_router(4, 4, type="NoisyTopK", load_loss_coeff=1.0), make_tokens(10, 4), training())
    assert float(routing.losses["load"].detach()) == 0.0
