"""What holds of capacity and choice whatever the tokens: drawn numbers, skews, classes and rules."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.router.face import NO_EXPERT, Layout, Routing, Tokens
from moe_runtime.router.layer import LayerRouter
from router_cases import DIM, SERVING, make_router, route, training

SIZES = st.tuples(st.integers(0, 40), st.integers(2, 9)).flatmap(
    lambda size: st.tuples(st.just(size[0]), st.just(size[1]), st.integers(2, size[1]))
)
FACTORS = st.floats(0.1, 3.0)
POLICIES = st.sampled_from(["Probs", "Position"])


def drawn(num_tokens: int, num_experts: int, seed: int, skew: float) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator) - skew * torch.arange(num_experts)
    class_T = torch.randint(0, 2, (num_tokens,), generator=generator)
    return Tokens(torch.zeros(num_tokens, DIM), logits_TE, class_T=class_T)


def taken(routing: Routing, tokens: Tokens, num_experts: int) -> torch.Tensor:
    """[E, C] picks of each expert by class."""
    assert tokens.class_T is not None
    count_EC = torch.zeros(num_experts, 2, dtype=torch.int64)
    for picks, class_id in zip(routing.expert_TK.tolist(), tokens.class_T.tolist(), strict=True):
        for expert in picks:
            if expert != NO_EXPERT:
                count_EC[expert, class_id] += 1
    return count_EC


def room_of(router: LayerRouter, num_picks: int) -> torch.Tensor:
    assert router.capacity is not None
    return router.capacity.room(num_picks)


@settings(max_examples=60, deadline=None)
@given(SIZES, FACTORS, POLICIES, st.booleans(), st.integers(0, 99))
def test_no_expert_is_over_its_room_and_nobody_is_counted_wrongly(
    size: tuple[int, int, int], factor: float, policy: str, by_class: bool, seed: int
) -> None:
    num_tokens, num_experts, top_k = size
    tokens = drawn(num_tokens, num_experts, seed, seed / 50)
    options: dict[str, Any] = {"type": "TopK", "expert_capacity_factor": factor, "token_drop_policy": policy}
    if by_class:
        options["class_capacity_percents"] = (70, 30)
    wanted = route(make_router(num_experts, top_k, type="TopK"), tokens).expert_TK
    for overflow in ("Drop", "Reroute", "Queue"):
        router = make_router(num_experts, top_k, **options, overflow=overflow)
        routing = route(router, tokens, training())
        room_EC, count_EC = room_of(router, num_tokens * top_k), taken(routing, tokens, num_experts)
        passes = 4 if overflow == "Queue" else 1
        if by_class:
            assert (count_EC <= room_EC * passes).all()
        else:
            assert (count_EC.sum(dim=-1) <= room_EC[:, 0] * passes).all()
        kept = routing.expert_TK != NO_EXPERT
        assert routing.counts["dropped"] == int((~kept).sum())
        if overflow != "Reroute":
            assert torch.equal(routing.expert_TK[kept], wanted[kept])


@settings(max_examples=60, deadline=None)
@given(SIZES, FACTORS, POLICIES, st.integers(0, 99), st.floats(0, 2))
def test_a_pick_is_lost_only_where_no_expert_that_its_token_does_not_take_has_room(
    size: tuple[int, int, int], factor: float, policy: str, seed: int, skew: float
) -> None:
    num_tokens, num_experts, top_k = size
    tokens = drawn(num_tokens, num_experts, seed, skew)
    router = make_router(
        *(num_experts, top_k),
        type="TopK",
        expert_capacity_factor=factor,
        token_drop_policy=policy,
        overflow="Reroute",
    )
    routing = route(router, tokens, training())
    has_room_E = taken(routing, tokens, num_experts).sum(dim=-1) < room_of(router, num_tokens * top_k)[:, 0]
    for picks in routing.expert_TK.tolist():
        if NO_EXPERT in picks:
            assert all(expert in picks for expert in has_room_E.nonzero().flatten().tolist())


@settings(max_examples=40, deadline=None)
@given(SIZES, FACTORS, st.sampled_from(["Drop", "Reroute", "Queue"]), st.integers(0, 99))
def test_by_score_it_does_not_matter_in_what_order_tokens_stand(
    size: tuple[int, int, int], factor: float, overflow: str, seed: int
) -> None:
    num_tokens, num_experts, top_k = size
    tokens = drawn(num_tokens, num_experts, seed, 0.5)
    assert tokens.logits_TE is not None
    order_T = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed + 1))
    router = make_router(num_experts, top_k, type="TopK", expert_capacity_factor=factor, overflow=overflow)
    plain = route(router, tokens, training())
    shuffled = route(router, Tokens(tokens.x_TD, tokens.logits_TE[order_T]), training())
    assert torch.equal(shuffled.expert_TK, plain.expert_TK[order_T])
    torch.testing.assert_close(shuffled.weight_TK, plain.weight_TK[order_T])


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 100), st.lists(st.integers(0, 5), min_size=9, max_size=9), st.integers(0, 99))
def test_locality_keeps_the_budget_and_never_takes_a_longer_way(
    size: tuple[int, int, int], budget: int, distances: list[int], seed: int
) -> None:
    num_tokens, num_experts, top_k = size
    tokens = drawn(num_tokens, num_experts, seed, 0.2)
    assert tokens.logits_TE is not None
    distance_E = torch.tensor(distances[:num_experts], dtype=torch.float32)
    plain = route(make_router(num_experts, top_k, type="TopK"), tokens).expert_TK
    router = make_router(num_experts, top_k, type="TopK", locality_bias=3.0, locality_budget_percent=budget)
    router.use_layout(Layout(distance_E, torch.ones(1, num_experts, dtype=torch.bool)))
    near = route(router, tokens, SERVING).expert_TK
    probability_TE = tokens.logits_TE.softmax(dim=-1)
    kept_T, had_T = (probability_TE.gather(1, picks).sum(dim=-1) for picks in (near, plain))
    assert (kept_T >= (1 - budget / 100) * had_T - 1e-6).all()
    assert (distance_E[near].sum(dim=-1) <= distance_E[plain].sum(dim=-1) + 1e-6).all()
