"""Nearer experts for at most so much of a token's probability."""

import itertools
from typing import Any

import pytest
import torch

from moe_core.outcome import InvalidInput
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
    lambda_S = torch.arange(4097) / 4096
    for token, row_E in enumerate(probability_TE):
        best = 0.9 * float(row_E.topk(2).values.sum())
        choice_SK = (row_E - lambda_S.unsqueeze(-1) * NEAR).topk(2, dim=-1).indices
        is_affordable_S = row_E[choice_SK].sum(dim=-1) >= best
        assert float(got[token]) <= float(NEAR[choice_SK].sum(dim=-1)[is_affordable_S].min()) + 1e-6


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


DOMAIN_OF = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
"""Of eight experts, on four ranks of which each is a domain; the token's own is 0."""


def by_domain() -> Layout:
    return Layout((DOMAIN_OF > 0).float(), torch.arange(4)[:, None] == DOMAIN_OF, domain_G=torch.arange(4))


def far_domains(expert_TK: torch.Tensor) -> torch.Tensor:
    return torch.stack([(DOMAIN_OF[expert_TK] == far).any(dim=-1) for far in (1, 2, 3)]).sum(dim=0)


@pytest.mark.parametrize("bias", [0.02, 10.0])
@pytest.mark.parametrize("budget", [0, 5, 20, 100])
def test_a_token_crosses_to_no_more_domains_and_keeps_the_budget(budget: int, bias: float) -> None:
    tokens = make_tokens(300, 8)
    assert tokens.logits_TE is not None
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    plain = route(make_router(8, 3, type="TopK"), tokens).expert_TK
    options: dict[str, Any] = {"locality_by": "Domain", "locality_bias": bias, "locality_budget_percent": budget}
    router = make_router(8, 3, type="TopK", **options)
    router.use_layout(by_domain())
    near = route(router, tokens).expert_TK
    kept_T, had_T = (probability_TE.gather(1, picks).sum(dim=-1) for picks in (near, plain))
    assert (kept_T >= (1 - budget / 100) * had_T - 1e-6).all()
    saved_T = far_domains(plain) - far_domains(near)
    assert (saved_T >= 0).all()
    assert (had_T - kept_T <= bias * saved_T + 1e-6).all(), "no more is given up than a domain is worth"


def test_of_two_domains_it_crosses_unless_the_best_at_home_are_within_the_budget() -> None:
    """Against a loop: with one far domain there are only two choices."""
    tokens = make_tokens(200, 8)
    assert tokens.logits_TE is not None
    home_E = torch.arange(8) < 4
    router = make_router(8, 2, type="TopK", locality_by="Domain", locality_bias=10.0, locality_budget_percent=15)
    router.use_layout(Layout((~home_E).float(), torch.stack([home_E, ~home_E]), domain_G=torch.tensor([0, 1])))
    for row, picks in zip(tokens.logits_TE.softmax(dim=-1), route(router, tokens).expert_TK, strict=True):
        best, at_home = row.topk(2), row[:4].topk(2)
        stays = float(at_home.values.sum()) >= 0.85 * float(best.values.sum())
        assert picks.tolist() == (at_home if stays else best).indices.tolist()


def test_sparing_domains_costs_less_than_sparing_picks_where_a_token_crosses_once() -> None:
    tokens = make_tokens(2000, 8, seed=3)
    assert tokens.logits_TE is not None
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    figures = {}
    for way, budget in (("Pick", 15), ("Domain", 12)):
        router = make_router(8, 4, type="TopK", locality_by=way, locality_bias=10.0, locality_budget_percent=budget)
        router.use_layout(by_domain())
        picks = route(router, tokens).expert_TK
        figures[way] = (float(far_domains(picks).sum()), float(probability_TE.gather(1, picks).sum()))
    assert figures["Domain"][0] < figures["Pick"][0]
    assert figures["Domain"][1] > figures["Pick"][1]


def test_an_expert_with_a_copy_at_home_is_at_home() -> None:
    tokens = make_tokens(100, 4)
    router = make_router(4, 2, type="TopK", locality_by="Domain", locality_bias=10.0, locality_budget_percent=0)
    holds_GE = torch.tensor([[True, True, True, True], [False, False, True, True]])
    router.use_layout(Layout(torch.zeros(4), holds_GE, domain_G=torch.tensor([0, 1])))
    assert torch.equal(route(router, tokens).expert_TK, route(make_router(4, 2, type="TopK"), tokens).expert_TK)


def test_a_home_with_too_few_experts_is_no_choice() -> None:
    tokens = make_tokens(50, 8)
    router = make_router(8, 3, type="TopK", locality_by="Domain", locality_bias=10.0, locality_budget_percent=100)
    router.use_layout(by_domain())
    picks = route(router, tokens).expert_TK
    assert (picks >= 0).all() and (far_domains(picks) == 1).all()


def test_a_layout_without_domains_is_refused_where_they_are_asked_for() -> None:
    router = make_router(8, 2, type="TopK", locality_by="Domain", locality_bias=1.0)
    with pytest.raises(InvalidInput, match="needs a layout with domain_G"):
        router.use_layout(layout(NEAR))
