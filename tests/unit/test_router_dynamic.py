"""Numbers of experts that differ by token or by time, and choices in two tiers."""

from typing import Any

import numpy as np
import pytest
import torch

from moe_runtime.router.face import NO_EXPERT, Moment, Tokens
from moe_runtime.router.losses import switch_loss
from router_cases import SERVING, dense, make_router, make_tokens, route, softmax, training


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("max_k", [None, 3])
def test_a_token_takes_the_fewest_experts_that_reach_the_mass(top_p: float, max_k: int | None) -> None:
    tokens = make_tokens(60, 8)
    assert tokens.logits_TE is not None
    options = {} if max_k is None else {"max_k": max_k}
    routing = route(make_router(8, 2, type="TopP", top_p=top_p, **options), tokens)
    for row, got_E in zip(tokens.logits_TE.double().numpy(), dense(routing, 8).numpy(), strict=True):
        probability = softmax(row)
        expected, total = np.zeros(8), 0.0
        for expert in np.argsort(-probability)[: max_k or 8]:
            if total >= top_p - 1e-9:
                break
            expected[expert] = probability[expert]
            total += probability[expert]
        np.testing.assert_allclose(got_E, expected, rtol=1e-5, atol=1e-7)


def test_a_sure_gate_takes_one_expert_and_an_unsure_one_many() -> None:
    logits_TE = torch.tensor([[9.0, 0, 0, 0], [0.3, 0.2, 0.1, 0.0]])
    routing = route(make_router(4, 2, type="TopP", top_p=0.7), Tokens(torch.zeros(2, 4), logits_TE))
    assert (routing.expert_TK != NO_EXPERT).sum(dim=-1).tolist() == [1, 3]


def test_the_entropy_loss_makes_tokens_take_fewer() -> None:
    tokens = make_tokens(100, 8)
    assert tokens.logits_TE is not None
    router = make_router(8, 2, type="TopP", top_p=0.6, entropy_loss_coeff=1.0)
    logits_TE = tokens.logits_TE.requires_grad_()
    before = route(router, Tokens(tokens.x_TD, logits_TE), training())
    (grad_TE,) = torch.autograd.grad(before.losses["entropy"], logits_TE)
    after = route(router, Tokens(tokens.x_TD, (logits_TE - 300 * grad_TE).detach()), training())
    assert (after.expert_TK != NO_EXPERT).sum() < (before.expert_TK != NO_EXPERT).sum()


def test_k_falls_from_all_experts_to_the_models_own() -> None:
    router, tokens = make_router(8, 2, type="AnnealedTopK", anneal_until_percent=50), make_tokens(20, 8)
    widths = [route(router, tokens, training(progress=p)).expert_TK.shape[1] for p in (0.0, 0.125, 0.25, 0.5, 0.9)]
    assert widths == [8, 6, 5, 2, 2]


def test_a_server_and_the_end_of_the_training_route_as_top_k() -> None:
    router, tokens = make_router(8, 2, type="AnnealedTopK", start_k=4), make_tokens(20, 8)
    plain = route(make_router(8, 2, type="TopK"), tokens)
    for moment in (SERVING, Moment(is_training=True, progress=1.0)):
        routing = route(router, tokens, moment)
        assert torch.equal(routing.expert_TK, plain.expert_TK)
        torch.testing.assert_close(routing.weight_TK, plain.weight_TK)


def test_two_tiers_weigh_by_group_times_expert() -> None:
    tokens = make_tokens(50, 12)
    assert tokens.logits_TE is not None
    router = make_router(12, 4, type="Hierarchical", num_groups=3, group_topk=2)
    gate_GD = router.get_parameter("kind.group_gate_GD")
    gate_GD.data.mul_(30)
    group_logits = (tokens.x_TD @ gate_GD.detach().T).double().numpy()
    got = dense(route(router, tokens), 12).numpy()
    for token, row in enumerate(tokens.logits_TE.double().numpy()):
        p, expected = softmax(group_logits[token]), np.zeros(12)
        for group in np.argsort(-p)[:2]:
            q = softmax(row[group * 4 : group * 4 + 4])
            for expert in np.argsort(-q)[:2]:
                expected[group * 4 + expert] = p[group] * q[expert]
        np.testing.assert_allclose(got[token], expected, rtol=1e-4, atol=1e-7)


def test_probabilities_of_two_tiers_sum_to_one_and_a_token_stays_in_its_groups() -> None:
    router, tokens = make_router(12, 4, type="Hierarchical", num_groups=4, group_topk=2), make_tokens(50, 12)
    routing = route(router, tokens, training())
    assert routing.probability_TE is not None
    torch.testing.assert_close(routing.probability_TE.sum(dim=-1), torch.ones(50))
    assert all(len(set(row)) == 2 for row in (routing.expert_TK // 3).tolist())


def test_a_pick_without_room_finds_it_inside_the_tokens_groups_or_nowhere() -> None:
    options: dict[str, Any] = {"num_groups": 3, "group_topk": 1, "expert_capacity_factor": 0.5, "overflow": "Reroute"}
    router, tokens = make_router(12, 2, type="Hierarchical", **options), make_tokens(60, 12, skew=1.0)
    p_TG = tokens.x_TD @ router.get_parameter("kind.group_gate_GD").T
    routing = route(router, tokens, training())
    is_pick = routing.expert_TK != NO_EXPERT
    assert torch.equal((routing.expert_TK // 4)[is_pick], p_TG.argmax(dim=-1, keepdim=True).expand(-1, 2)[is_pick])
    assert routing.counts["rerouted"] > 0 and routing.counts["dropped"] > 0


def test_the_group_loss_is_the_balance_loss_of_groups() -> None:
    router = make_router(12, 2, type="Hierarchical", num_groups=3, group_topk=1, group_aux_loss_coeff=0.5)
    tokens = make_tokens(50, 12)
    routing = route(router, tokens, training())
    p_TG = (tokens.x_TD @ router.get_parameter("kind.group_gate_GD").T).softmax(dim=-1)
    torch.testing.assert_close(routing.losses["group_aux"], 0.5 * switch_loss(p_TG, p_TG.topk(1).indices))


@pytest.mark.parametrize("kind", ["TopP", "Hierarchical"])
def test_gradients_of_weights_are_right(kind: str) -> None:
    options = {"num_groups": 2, "group_topk": 1} if kind == "Hierarchical" else {}
    router, tokens = make_router(4, 2, type=kind, **options), make_tokens(5, 4)
    assert tokens.logits_TE is not None
    given = tokens.logits_TE.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: router(Tokens(tokens.x_TD, logits), SERVING).weight_TK, [given])
