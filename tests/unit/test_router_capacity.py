"""Expert capacity: who keeps the room, what becomes of the others, and that nobody counts wrongly."""

import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.capacity import places
from moe_runtime.router.face import NO_EXPERT, Tokens
from router_cases import SERVING, WHOLE_TEXTS, make_router, make_tokens, route, training

SKEWED = make_tokens(60, 6, skew=0.7)


def wanted(tokens: Tokens, top_k: int) -> list[list[int]]:
    assert tokens.logits_TE is not None
    picks: list[list[int]] = tokens.logits_TE.softmax(dim=-1).topk(top_k).indices.tolist()
    return picks


def load(expert_TK: torch.Tensor) -> list[int]:
    return [int((expert_TK == e).sum()) for e in range(6)]


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 6.0])
@pytest.mark.parametrize("policy", ["Probs", "Position"])
def test_an_expert_keeps_its_room_of_the_best_or_the_first(factor: float, policy: str) -> None:
    assert SKEWED.logits_TE is not None
    score_TE = SKEWED.logits_TE.softmax(dim=-1)
    room = math.ceil(factor * 60 * 2 / 6)
    asking = defaultdict(list)
    for token, picks in enumerate(wanted(SKEWED, 2)):
        for expert in picks:
            asking[expert].append(token)
    kept = set()
    for expert, tokens in asking.items():
        by_score_T = (-score_TE[:, expert]).tolist()
        line = sorted(tokens, key=by_score_T.__getitem__) if policy == "Probs" else tokens
        kept |= {(token, expert) for token in line[:room]}
    router = make_router(6, 2, type="TopK", expert_capacity_factor=factor, token_drop_policy=policy)
    routing = route(router, SKEWED, training())
    got = {(t, e) for t, picks in enumerate(routing.expert_TK.tolist()) for e in picks if e != NO_EXPERT}
    assert got == kept
    assert routing.counts["dropped"] == 120 - len(kept)


def test_nothing_is_dropped_by_default_nor_where_tokens_do_not_compete() -> None:
    capped = make_router(6, 2, type="TopK", expert_capacity_factor=0.5)
    assert (route(make_router(6, 2, type="TopK"), SKEWED, training()).expert_TK != NO_EXPERT).all()
    assert (route(capped, SKEWED, SERVING).expert_TK != NO_EXPERT).all()
    assert (route(capped, SKEWED, WHOLE_TEXTS).expert_TK == NO_EXPERT).any()


def test_a_kept_pick_weighs_as_if_nothing_were_dropped_unless_the_sum_is_to_be_kept() -> None:
    full = route(make_router(6, 2, type="TopK"), SKEWED)
    plain = route(make_router(6, 2, type="TopK", expert_capacity_factor=1.0), SKEWED, training())
    kept = plain.expert_TK != NO_EXPERT
    torch.testing.assert_close(plain.weight_TK, full.weight_TK * kept)
    summed = route(make_router(6, 2, type="TopK", expert_capacity_factor=1.0, norm_kept_prob=True), SKEWED, training())
    torch.testing.assert_close(summed.weight_TK.sum(dim=-1), kept.any(dim=-1).float())


def test_with_room_for_all_a_token_of_one_expert_is_always_rerouted() -> None:
    routing = route(
        make_router(6, 2, type="Switch", expert_capacity_factor=1.0, overflow="Reroute"), SKEWED, training()
    )
    assert load(routing.expert_TK) == [10] * 6
    assert routing.counts == {
        "rerouted": 60 - sum(min(10, n) for n in load(torch.tensor(wanted(SKEWED, 1)))),
        "dropped": 0,
    }


def test_who_keeps_its_expert_keeps_it_when_others_are_rerouted() -> None:
    dropped = route(make_router(6, 2, type="TopK", expert_capacity_factor=1.0), SKEWED, training())
    moved = route(make_router(6, 2, type="TopK", expert_capacity_factor=1.0, overflow="Reroute"), SKEWED, training())
    stayed = dropped.expert_TK != NO_EXPERT
    assert torch.equal(moved.expert_TK[stayed], dropped.expert_TK[stayed])
    assert max(load(moved.expert_TK)) <= 20
    assert moved.counts["dropped"] < dropped.counts["dropped"]


def test_a_rerouted_token_would_have_preferred_only_full_experts() -> None:
    assert SKEWED.logits_TE is not None
    routing = route(
        make_router(6, 1, type="Switch", expert_capacity_factor=1.2, overflow="Reroute"), SKEWED, training()
    )
    counts = load(routing.expert_TK)
    for row, expert in zip(SKEWED.logits_TE, routing.expert_TK[:, 0], strict=True):
        better = [e for e in range(6) if row[e] > row[expert]]
        assert all(counts[e] == 12 for e in better)


def test_a_rerouted_pick_weighs_as_the_expert_it_got() -> None:
    assert SKEWED.logits_TE is not None
    router = make_router(6, 2, type="Switch", expert_capacity_factor=1.0, overflow="Reroute")
    routing = route(router, SKEWED, training())
    torch.testing.assert_close(routing.weight_TK, SKEWED.logits_TE.softmax(dim=-1).gather(1, routing.expert_TK))


def test_a_queue_loses_nothing_and_no_pass_is_over_the_room() -> None:
    router = make_router(6, 2, type="TopK", expert_capacity_factor=1.0, overflow="Queue", queue_passes=6)
    routing = route(router, SKEWED, training())
    assert routing.pass_TK is not None and routing.passes == 6
    full = route(make_router(6, 2, type="TopK"), SKEWED)
    assert torch.equal(routing.expert_TK, full.expert_TK)
    torch.testing.assert_close(routing.weight_TK, full.weight_TK)
    for number in range(6):
        assert max(load(routing.expert_TK[routing.pass_TK == number])) <= 20
    assert routing.counts == {"queued": int((routing.pass_TK > 0).sum()), "dropped": 0}


def test_a_queue_drops_what_finds_no_room_in_its_last_pass() -> None:
    router = make_router(6, 2, type="TopK", expert_capacity_factor=0.5, overflow="Queue", queue_passes=2)
    routing = route(router, SKEWED, training())
    assert load(routing.expert_TK) == [min(20, n) for n in load(torch.tensor(wanted(SKEWED, 2)))]
    assert routing.counts["dropped"] > 0


def test_adaptive_room_follows_what_tokens_want_and_sums_to_the_same() -> None:
    uniform = make_router(6, 2, type="TopK", expert_capacity_factor=1.25)
    adaptive = make_router(6, 2, type="TopK", expert_capacity_factor=1.25, adaptive_capacity_decay=0.5)
    first = route(adaptive, SKEWED, training())
    assert torch.equal(first.expert_TK, route(uniform, SKEWED, training()).expert_TK)
    for _ in range(8):
        adaptive.after_step(torch.tensor(load(route(adaptive, SKEWED, training()).expert_TK)))
    assert adaptive.capacity is not None
    room_E = adaptive.capacity.room(120)[:, 0]
    assert 150 <= int(room_E.sum()) <= 156
    assert int(room_E.min()) >= math.ceil(150 / 6 * 0.2)
    assert route(adaptive, SKEWED, training()).counts["dropped"] < first.counts["dropped"] / 4


def test_adaptive_room_is_of_all_ranks_tokens_and_of_committed_steps_only() -> None:
    router = make_router(6, 2, type="TopK", expert_capacity_factor=1.0, adaptive_capacity_decay=0.5)
    seen: list[torch.Tensor] = []

    def with_another_rank(count_E: torch.Tensor) -> torch.Tensor:
        seen.append(count_E)
        return count_E + torch.tensor([0.0, 0, 0, 0, 0, 120.0])

    share_E = router.get_buffer("capacity.wanted_share_E")
    route(router, SKEWED, training(sum_over_ranks=with_another_rank))
    assert float(share_E[5]) == pytest.approx(1 / 6)
    router.after_step(torch.zeros(6, dtype=torch.int64))
    expected = 0.5 / 6 + 0.5 * (float(seen[0][5]) + 120) / 240
    assert float(share_E[5]) == pytest.approx(expected)


def test_each_class_has_room_that_another_cannot_take() -> None:
    """Two in three tokens are text (class 0) and all want expert 0; the images get theirs."""
    logits_TE = torch.zeros(30, 3)
    logits_TE[:, 0] = torch.linspace(5, 6, 30)
    class_T = (torch.arange(30) % 3 == 0).long()
    tokens = Tokens(torch.zeros(30, 4), logits_TE, class_T=class_T)
    router = make_router(
        3, 1, type="Switch", expert_capacity_factor=1.0, class_capacity_percents=(60, 40), token_drop_policy="Position"
    )
    kept_T = route(router, tokens, training()).expert_TK[:, 0] != NO_EXPERT
    assert [int(kept_T[class_T == c].sum()) for c in (0, 1)] == [6, 4]


def test_a_class_without_room_of_its_own_is_refused() -> None:
    router = make_router(6, 2, type="TopK", expert_capacity_factor=1.0, class_capacity_percents=(100,))
    two = make_router(6, 2, type="TopK", expert_capacity_factor=1.0, class_capacity_percents=(50, 50))
    tokens = Tokens(SKEWED.x_TD, SKEWED.logits_TE, class_T=torch.full((60,), 2))
    assert route(router, tokens, training()) is not None
    with pytest.raises(InvalidInput, match=r"classes run from 0 to 1 \(got 2 to 2\)"):
        route(two, tokens, training())
    with pytest.raises(InvalidInput, match="needs class_T"):
        route(two, Tokens(SKEWED.x_TD, SKEWED.logits_TE), training())


@pytest.mark.parametrize("overflow", ["Drop", "Reroute", "Queue"])
@pytest.mark.parametrize("more", [{}, {"class_capacity_percents": (50, 50)}, {"adaptive_capacity_decay": 0.9}])
def test_no_tokens_at_all_are_routed_nowhere(overflow: str, more: dict[str, Any]) -> None:
    router = make_router(6, 2, type="TopK", expert_capacity_factor=1.0, overflow=overflow, **more)
    assert route(router, make_tokens(0, 6), training()).counts["dropped"] == 0


def test_places_are_by_score_and_of_equals_by_index() -> None:
    key_N = torch.tensor([2, 0, 2, 2, 0, 2])
    score_N = torch.tensor([1.0, 5.0, 3.0, 3.0, 6.0, 0.0])
    assert places(key_N, score_N).tolist() == [2, 1, 0, 1, 0, 3]
    assert places(key_N, None).tolist() == [0, 0, 1, 2, 1, 3]


@pytest.mark.parametrize("overflow", ["Drop", "Reroute"])
def test_gradients_reach_the_weights_that_are_kept(overflow: str) -> None:
    router = make_router(6, 2, type="TopK", expert_capacity_factor=0.8, overflow=overflow, norm_kept_prob=True)
    tokens = make_tokens(6, 6, skew=0.5)
    assert tokens.logits_TE is not None
    logits_TE = tokens.logits_TE.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: router(Tokens(tokens.x_TD, given), training()).weight_TK, [logits_TE])
