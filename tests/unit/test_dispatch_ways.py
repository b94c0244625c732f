"""Both ways over a group equal the one-rank reference, for any layout: threads stand for ranks here."""

from collections.abc import Sequence

import pytest
import torch

from memory_group import MemoryGroup, together
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.choice import WAYS
from moe_runtime.dispatch.all_to_all import run_by_pick, run_by_token
from moe_runtime.dispatch.mixture import in_turn
from moe_runtime.dispatch.plan import LOST, DispatchPlan, make_plan
from moe_runtime.dispatch.reference import run_local

DIM, NUM_EXPERTS, TOP_K = 6, 5, 3


MATRIX_EDD = torch.randn(NUM_EXPERTS, DIM, DIM, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "even": ((3, 2), (0, 1, 2, 3, 4)),
    "copies_and_an_empty_slot": ((3, 4, 2), (0, 1, 2, 3, 4, -1, 0, 2, 0)),
    "copies_of_most": ((4, 4, 4), (0, 1, 2, 3, 0, 1, 2, 4, 3, 4, 0, 1)),
    "a_rank_without_slots": ((0, 5), (4, 3, 2, 1, 0)),
    "a_lost_expert": ((2, 1, 1), (0, 1, 2, 3)),
    "everything_lost_but_one": ((0, 1), (2,)),
}


def tokens_of(rank: int, uneven: bool) -> int:
    return (4, 0, 7)[rank] if uneven else 3


def one_rank(
    group: MemoryGroup, plan: DispatchPlan, logical_of_slot: Sequence[int], way: str, uneven: bool
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Ours, the reference, and the gradients of ours (inputs, weights)."""
    rank = group.position
    generator = torch.Generator().manual_seed(rank)
    num_tokens = tokens_of(rank, uneven)
    x_TD = torch.randn(num_tokens, DIM, generator=generator, requires_grad=True)
    weight_TK = torch.rand(num_tokens, TOP_K, generator=generator, requires_grad=True)
    expert_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens + 1)])[
        1:
    ]
    address_TK = plan.layers[0].addresses(expert_TK)

    def run_slots(rows_RD: torch.Tensor, slot_R: torch.Tensor) -> torch.Tensor:
        expert_R = torch.tensor(logical_of_slot)[slot_R]
        assert int(expert_R.min()) >= 0
        return torch.einsum("rd,rdf->rf", rows_RD, MATRIX_EDD[expert_R])

    def run_experts(rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rd,rdf->rf", rows_RD, MATRIX_EDD[expert_R])

    if way == "by_pick":
        [ours] = in_turn([run_by_pick(x_TD, address_TK, weight_TK, plan=plan, group=group, run_slots=run_slots)])
        gradients = list(torch.autograd.grad(ours.square().sum(), [x_TD, weight_TK]))
    else:
        counts = [tokens_of(r, uneven) for r in range(group.size)]
        with torch.no_grad():
            ours = run_by_token(
                x_TD, address_TK, weight_TK, plan=plan, group=group, run_slots=run_slots, tokens_of_position=counts
            )
        gradients = []
    known_TK = torch.where(address_TK == LOST, LOST, expert_TK)
    reference = run_local(x_TD, known_TK, weight_TK, run_experts)
    if gradients:
        gradients += list(torch.autograd.grad(reference.square().sum(), [x_TD, weight_TK], allow_unused=True))
    return ours.detach(), reference.detach(), gradients


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("way", ["by_pick", "by_token"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_equal_the_reference_and_its_gradients(layout: str, way: str, uneven: bool) -> None:
    slots_of_rank, row = LAYOUTS[layout]
    emap = ExpertMap(generation=0, num_logical_experts=NUM_EXPERTS, slots_of_rank=slots_of_rank, logical_of_slot=(row,))
    ranks = range(emap.num_ranks)

    def run(group: MemoryGroup) -> tuple[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], int]:
        rank = group.position
        held = [row[slot] for slot in emap.slot_range(rank)]
        return one_rank(group, make_plan(emap, ranks, rank=rank), held, way, uneven), group.num_exchanges

    results = together(run, emap.num_ranks)

    for (ours, reference, gradients), _ in results:
        assert torch.allclose(ours, reference, atol=1e-5)
        for mine, theirs in zip(gradients[:2], gradients[2:], strict=True):
            assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-4)
    # forward: counts, rows, results; backward: results, rows. By token: there and back.
    assert {exchanges for _, exchanges in results} == {5 if way == "by_pick" else 2}


@pytest.mark.parametrize("way", ["by_pick", "by_token"])
def test_rows_that_arrive_at_the_copies_are_as_many_as_their_shares_say(way: str) -> None:
    """Expert 0 has copies with the shares 5, 2 and 1, expert 1 an even pair; every token picks both."""
    emap = ExpertMap(
        generation=0,
        num_logical_experts=2,
        slots_of_rank=(1, 2, 2),
        logical_of_slot=((0, 0, 1, 0, 1),),
        share_of_slot=((5, 2, 0, 1, 0),),
    )
    ranks = range(emap.num_ranks)
    tokens = [2 * WAYS] * emap.num_ranks
    rows_of_slot = torch.zeros(5, dtype=torch.long)

    def run(group: MemoryGroup) -> None:
        rank = group.position
        plan = make_plan(emap, ranks, rank=rank)
        address_TK = plan.layers[0].addresses(torch.tensor([[0, 1]] * tokens[rank]))
        x_TD, weight_TK = torch.ones(tokens[rank], DIM), torch.ones(tokens[rank], 2)

        def run_slots(rows_RD: torch.Tensor, slot_R: torch.Tensor) -> torch.Tensor:
            own = emap.slot_range(rank)
            rows_of_slot[own.start : own.stop] += torch.bincount(slot_R, minlength=len(own))
            return rows_RD

        with torch.no_grad():
            if way == "by_pick":
                in_turn([run_by_pick(x_TD, address_TK, weight_TK, plan=plan, group=group, run_slots=run_slots)])
            else:
                run_by_token(
                    x_TD,
                    address_TK,
                    weight_TK,
                    plan=plan,
                    group=group,
                    run_slots=run_slots,
                    tokens_of_position=tokens,
                )

    together(run, emap.num_ranks)
    assert rows_of_slot.tolist() == [60, 24, 48, 12, 48]
