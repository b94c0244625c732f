"""Nearer experts for at most so much of a token's probability."""

import itertools

import pytest
import torch

from moe_runtime.router.face import Layout
from router_cases import make_router, make_tokens, route

NEAR = torch.tensor([0.0, 1.0, 3.0, 0.0, 3.0, 1.0, 3.0, 3.0])


def layout(distance_E: torch.Tensor) -> Layout:
    return Layout(distance_E, torch.ones(1, distance_E.numel(), dtype=torch.bool))


@pytest.mark.parametrize("budget", [0, 1, 5, 20, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_token_gives_up_no_more_than_the_budget_and_never_goes_further(budget: int, seed: int) -> None:
    tokens = make_tokens(300, 8, seed=seed)
    assert tokens.logits_TE is not None
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    plain = route(make_router(8, 3, type="TopK"), tokens).expert_TK
    router = make_router(8, 3, type="TopK", locality_bias=10.0, locality_budget_percent=budget)
    router.use_layout(layout(NEAR))
    near = route(router, tokens).expert_TK
    kept_T = probability_TE.gather(1, near).sum(dim=-1) / probability_TE.gather(1, plain).sum(dim=-1)
    assert float(kept_T.min()) >= 1 - budget / 100 - 1e-6
    assert (NEAR[near].sum(dim=-1) <= NEAR[plain].sum(dim=-1)).all()


def test_the_whole_budget_and_a_large_bias_take_the_nearest_there_are() -> None:
    tokens = make_tokens(50, 8)
    router = make_router(8, 3, type="TopK", locality_bias=1000.0, locality_budget_percent=100)
    router.use_layout(layout(NEAR))
    assert (NEAR[route(router, tokens).expert_TK].sum(dim=-1) == 1.0).all()


def test_of_the_choices_on_the_way_it_takes_the_nearest_affordable() -> None:
    """Against every lambda of a fine grid."""
    tokens = make_tokens(60, 8, seed=5)
    assert tokens.logits_TE is not None
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    router = make_router(8, 2, type="TopK", locality_bias=1.0, locality_budget_percent=10)
    router.use_layout(layout(NEAR))
    got = NEAR[route(router, tokens).expert_TK].sum(dim=-1)
    for token, row in enumerate(probability_TE):
        best = 0.9 * float(row.topk(2).values.sum())
        choices = [(row - step / 4096 * NEAR).topk(2).indices for step in range(4097)]
        affordable = [float(NEAR[c].sum()) for c in choices if float(row[c].sum()) >= best]
        assert float(got[token]) <= min(affordable) + 1e-6


def test_traffic_falls_on_an_even_load() -> None:
    tokens = make_tokens(500, 8)
    plain = route(make_router(8, 2, type="TopK"), tokens).expert_TK
    distances = []
    for budget in (0, 5, 15, 40):
        router = make_router(8, 2, type="TopK", locality_bias=5.0, locality_budget_percent=budget)
        router.use_layout(layout(NEAR))
        distances.append(float(NEAR[route(router, tokens).expert_TK].sum()))
    assert distances[0] == float(NEAR[plain].sum())
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))


def test_without_a_layout_nobody_is_near() -> None:
    tokens = make_tokens(30, 8)
    router = make_router(8, 2, type="TopK", locality_bias=5.0)
    assert torch.equal(route(router, tokens).expert_TK, route(make_router(8, 2, type="TopK"), tokens).expert_TK)
