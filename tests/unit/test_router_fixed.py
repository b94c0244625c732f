"""Routes that no gate decides, that a gate no longer learns, and that were learned once and kept."""

import pytest
import torch

from moe_core.contract.router import RouterConfig
from moe_core.outcome import InvalidInput
from moe_runtime.router.face import Tokens
from moe_runtime.router.registry import build_router
from moe_runtime.router.table import balanced_table
from router_cases import DIM, SERVING, make_router, make_tokens, route, training


def test_a_hashed_token_takes_the_same_experts_wherever_it_stands() -> None:
    router, tokens = make_router(8, 2, type="Hash"), make_tokens(300, 8)
    assert tokens.ids_T is not None
    routing = route(router, tokens, training())
    taken: dict[int, list[int]] = {}
    for token_id, picks in zip(tokens.ids_T.tolist(), routing.expert_TK.tolist(), strict=True):
        assert taken.setdefault(token_id, picks) == picks
    assert (routing.weight_TK == 0.5).all()
    assert len({tuple(picks) for picks in taken.values()}) > 20


def test_layers_and_seeds_hash_differently_and_ranks_alike() -> None:
    tokens = make_tokens(100, 8)
    first, rank, layer, seed = (
        route(router, tokens).expert_TK
        for router in (
            make_router(8, 2, type="Hash"),
            make_router(8, 2, type="Hash"),
            make_router(8, 2, layer_idx=1, type="Hash"),
            make_router(8, 2, type="Hash", seed=1),
        )
    )
    assert torch.equal(first, rank)
    assert not torch.equal(first, layer)
    assert not torch.equal(first, seed)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_balanced_table_spreads_the_counts_as_a_greedy_loop_does(top_k: int) -> None:
    count_V = (1e6 / torch.arange(1, 201) ** 0.8).long()
    table_VK = balanced_table(count_V, num_experts=8, top_k=top_k, seed=0, layer_idx=0)
    load_E = torch.zeros(8, dtype=torch.int64).index_add(0, table_VK.flatten(), count_V.repeat_interleave(top_k))
    mine = [0] * 8
    for count in sorted(count_V.tolist(), reverse=True):
        for expert in sorted(range(8), key=lambda e: mine[e])[:top_k]:
            mine[expert] += count
    assert sorted(load_E.tolist()) == sorted(mine)
    assert float(load_E.double().mean() / load_E.max()) > 0.95


def test_experts_of_one_id_are_distinct() -> None:
    for way in ("Random", "Balanced"):
        table_VK = make_router(4, 3, type="Hash", hash_table=way).get_buffer("kind.table_VK")
        assert all(len(set(row)) == 3 for row in table_VK.tolist())


def test_a_balanced_table_without_counts_waits_for_the_weights() -> None:
    config = RouterConfig(type="Hash", hash_table="Balanced")
    router = build_router(config, num_experts=8, top_k=2, dim=DIM, layer_idx=0, vocab_size=64)
    tokens = make_tokens(5, 8)
    with pytest.raises(InvalidInput, match="neither built from token counts nor loaded"):
        router(tokens, SERVING)
    saved = make_router(8, 2, type="Hash", hash_table="Balanced")
    router.load_state_dict(saved.state_dict())
    assert torch.equal(router(tokens, SERVING).expert_TK, route(saved, tokens).expert_TK)


@pytest.mark.parametrize("kind", ["Hash", "Cached"])
def test_ids_beyond_the_vocabulary_and_missing_ids_are_refused(kind: str) -> None:
    router, tokens = make_router(8, 2, type=kind), make_tokens(3, 8)
    with pytest.raises(InvalidInput, match=r"ids run from 0 to 63 \(got 3 to 64\)"):
        route(router, Tokens(tokens.x_TD, tokens.logits_TE, ids_T=torch.tensor([3, 64, 5])))
    with pytest.raises(InvalidInput, match="needs ids_T"):
        route(router, Tokens(tokens.x_TD, tokens.logits_TE))


def test_a_hash_without_a_vocabulary_is_not_built() -> None:
    with pytest.raises(InvalidInput, match="need vocab_size"):
        build_router(RouterConfig(type="Hash"), num_experts=8, top_k=2, dim=DIM, layer_idx=0)


def test_places_of_a_sequence_take_the_experts_in_turn() -> None:
    tokens = Tokens(torch.zeros(5, DIM), None, position_T=torch.tensor([0, 1, 2, 3, 7]))
    routing = make_router(5, 2, type="Heuristic", heuristic="Position")(tokens, SERVING)
    assert routing.expert_TK.tolist() == [[0, 1], [2, 3], [4, 0], [1, 2], [4, 0]]


def test_a_class_chooses_by_the_gate_among_its_own_experts() -> None:
    tokens = make_tokens(40, 10)
    assert tokens.logits_TE is not None and tokens.class_T is not None
    router = make_router(10, 2, type="Heuristic", heuristic="Class", num_classes=3)
    third = Tokens(tokens.x_TD, tokens.logits_TE, class_T=torch.arange(40) % 3)
    assert third.class_T is not None
    stretches = [range(4), range(4, 7), range(7, 10)]
    for row, picks, class_id in zip(
        tokens.logits_TE, route(router, third).expert_TK.tolist(), third.class_T.tolist(), strict=True
    ):
        mine = list(stretches[class_id])
        assert picks == [mine[i] for i in row[mine].topk(2).indices.tolist()]


def test_a_class_without_experts_is_refused() -> None:
    router, tokens = make_router(8, 2, type="Heuristic", heuristic="Class"), make_tokens(3, 8)
    with pytest.raises(InvalidInput, match=r"classes run from 0 to 1 \(got 0 to 2\)"):
        route(router, Tokens(tokens.x_TD, tokens.logits_TE, class_T=torch.tensor([0, 2, 1])))


def test_a_random_gate_is_drawn_once_and_never_trained() -> None:
    router, tokens = make_router(8, 2, type="Frozen", seed=5), make_tokens(30, 8)
    gate_ED = router.get_buffer("kind.gate_ED")
    expected = (tokens.x_TD @ gate_ED.T).topk(2).indices
    assert torch.equal(route(router, tokens, training()).expert_TK, expected)
    assert not list(router.parameters())
    assert torch.equal(gate_ED, make_router(8, 2, type="Frozen", seed=5).get_buffer("kind.gate_ED"))


def test_a_frozen_model_gate_chooses_as_ever_and_gets_no_gradient() -> None:
    tokens = make_tokens(30, 8)
    assert tokens.logits_TE is not None
    logits_TE = tokens.logits_TE.requires_grad_()
    routing = route(make_router(8, 2, type="Frozen", frozen_gate="Model"), Tokens(tokens.x_TD, logits_TE), training())
    plain = route(make_router(8, 2, type="TopK"), tokens)
    assert torch.equal(routing.expert_TK, plain.expert_TK)
    torch.testing.assert_close(routing.weight_TK, plain.weight_TK.detach())
    assert not routing.weight_TK.requires_grad


def test_routes_follow_the_gate_first_and_the_token_id_later() -> None:
    router, tokens = make_router(8, 2, type="Cached", cached_from_percent=40), make_tokens(200, 8)
    assert tokens.ids_T is not None
    early, late = (route(router, tokens, training(progress=progress)) for progress in (0.39, 0.4))
    assert torch.equal(early.expert_TK, route(make_router(8, 2, type="TopK"), tokens).expert_TK)
    assert "distill" in early.losses and "distill" not in late.losses
    taken: dict[int, list[int]] = {}
    for token_id, picks in zip(tokens.ids_T.tolist(), late.expert_TK.tolist(), strict=True):
        assert taken.setdefault(token_id, picks) == picks
    assert torch.equal(route(router, tokens, SERVING).expert_TK, late.expert_TK)


def test_routes_that_were_written_down_stay_when_the_small_router_moves_on() -> None:
    router, tokens = make_router(8, 2, type="Cached", cached_from_percent=40), make_tokens(200, 8)
    nothing_E = torch.zeros(8, dtype=torch.int64)
    late = training(progress=0.4)
    first = route(router, tokens, late).expert_TK
    assert (router.get_buffer("kind.table_VK") == -1).all(), "the step is not committed"
    assert torch.equal(route(router, tokens, late).expert_TK, first)
    router.after_step(nothing_E)
    router.get_parameter("kind.word_VC").data.neg_()
    assert torch.equal(route(router, tokens, training(progress=0.9)).expert_TK, first)
    router.after_step(nothing_E)
    assert torch.equal(route(router, tokens, SERVING).expert_TK, first)


def test_what_a_failed_step_would_have_written_down_is_not_written_after_an_older_snapshot() -> None:
    router, tokens = make_router(8, 2, type="Cached", cached_from_percent=40), make_tokens(20, 8)
    route(router, tokens, training(progress=0.4))  # and the step fails
    route(router, tokens, training(progress=0.3))
    router.after_step(torch.zeros(8, dtype=torch.int64))
    assert (router.get_buffer("kind.table_VK") == -1).all()


def test_the_small_router_learns_the_gates_choice_where_the_id_tells_it() -> None:
    ids_T = torch.arange(64).repeat(4)
    gate_VE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(torch.zeros(256, DIM), gate_VE[ids_T], ids_T=ids_T)
    router = make_router(8, 1, type="Cached", distill_loss_coeff=1.0)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        route(router, tokens, training()).losses["distill"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.equal(route(router, tokens, SERVING).expert_TK[:, 0], gate_VE[ids_T].argmax(dim=-1))


def test_the_gate_still_weighs_what_the_id_has_chosen_and_learns() -> None:
    router, tokens = make_router(8, 2, type="Cached"), make_tokens(30, 8)
    assert tokens.logits_TE is not None
    logits_TE = tokens.logits_TE.requires_grad_()
    routing = route(router, Tokens(tokens.x_TD, logits_TE, ids_T=tokens.ids_T), training(progress=1.0))
    torch.testing.assert_close(routing.weight_TK, logits_TE.gather(1, routing.expert_TK).softmax(dim=-1))
    (grad_TE,) = torch.autograd.grad(routing.weight_TK[:, 0].sum(), logits_TE)
    assert grad_TE.any()
