"""The ladder: what a token gets when its expert has no live copy."""

import pytest
import torch

from moe_runtime.dispatch.plan import LOST
from moe_runtime.dispatch.reference import run_local
from moe_runtime.experts.generalists import LayerGeneralists
from moe_runtime.experts.ladder import LayerLadder, renormalised

DIM = 4


def generalists(*, has_map: tuple[bool, ...], shared_scale: tuple[float, ...] = (0.0, 0.0, 0.0)) -> LayerGeneralists:
    """Expert e answers (e + 1) * x + 10 * e."""
    eye = torch.eye(DIM)
    return LayerGeneralists(
        down_ERD=torch.stack([eye * (e + 1) for e in range(3)]),
        up_ERD=torch.stack([eye] * 3),
        bias_ED=torch.stack([torch.full((DIM,), 10.0 * e) for e in range(3)]),
        shared_scale_E=torch.tensor(shared_scale),
        has_map=has_map,
        stand_in=(-1, -1, -1),
        kind=("low_rank",) * 3,
    )


def ladder(
    lost: tuple[int, ...], fitted: LayerGeneralists | None, shared: torch.nn.Module | None = None
) -> LayerLadder:
    made = LayerLadder(shared)
    made.set_lost(lost, fitted, num_experts=3, device="cpu")
    return made


X = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
EXPERTS = torch.tensor([[0, 2], [2, 1]])
WEIGHTS = torch.tensor([[0.6, 0.2], [0.5, 0.5]])


def address(lost: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([LOST if e in lost else e for e in range(3)])[EXPERTS]


def test_without_lost_experts_nothing_changes() -> None:
    weights, local = ladder((), None).answer(X, EXPERTS, address(()), WEIGHTS)
    assert weights is WEIGHTS
    assert local is None


def test_a_dropped_pick_leaves_its_weight_to_the_others() -> None:
    weights, local = ladder((0,), None).answer(X, EXPERTS, address((0,)), WEIGHTS)
    assert local is None
    assert torch.allclose(weights, torch.tensor([[0.0, 0.8], [0.5, 0.5]]))


def test_a_token_that_loses_all_its_picks_gets_zero() -> None:
    weights = renormalised(WEIGHTS, torch.tensor([[True, True], [False, False]]))
    assert torch.equal(weights, torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
    assert torch.equal(run_local(X, torch.full((2, 2), LOST), weights, lambda rows, _: rows), torch.zeros(2, DIM))


def test_a_generalist_answers_with_the_picks_own_weight() -> None:
    weights, local = ladder((2,), generalists(has_map=(True,) * 3)).answer(X, EXPERTS, address((2,)), WEIGHTS)
    assert torch.equal(weights, WEIGHTS)
    assert local is not None
    assert torch.allclose(local, torch.stack([0.2 * (3 * X[0] + 20), 0.5 * (3 * X[1] + 20)]))


def test_generalist_and_drop_mix_in_one_token() -> None:
    fitted = generalists(has_map=(True, True, False))
    weights, local = ladder((0, 2), fitted).answer(X, EXPERTS, address((0, 2)), WEIGHTS)
    assert torch.allclose(weights, torch.tensor([[0.8, 0.0], [0.0, 1.0]]))
    assert local is not None
    assert torch.allclose(local, torch.stack([0.8 * X[0], torch.zeros(DIM)]))


def test_a_living_stand_in_takes_the_pick_instead_of_the_map() -> None:
    to_expert_one = torch.tensor([[0, 1], [1, 1]])
    weights, local = ladder((2,), generalists(has_map=(True,) * 3)).answer(X, EXPERTS, to_expert_one, WEIGHTS)
    assert torch.equal(weights, WEIGHTS)
    assert local is not None
    assert torch.equal(local, torch.zeros(2, DIM))


def test_the_shared_expert_answers_scaled() -> None:
    fitted = generalists(has_map=(True,) * 3, shared_scale=(0.0, 0.0, 2.0))
    shared = torch.nn.Linear(DIM, DIM)
    _, local = ladder((2,), fitted, shared).answer(X, EXPERTS, address((2,)), WEIGHTS)
    assert local is not None
    expected = 0.2 * (3 * X[0] + 20 + 2.0 * shared(X[0]))
    assert torch.allclose(local[0], expected, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_renormalising_keeps_the_sum_of_the_weights(top_k: int) -> None:
    weights = torch.rand(16, top_k)
    dropped = torch.zeros(16, top_k, dtype=torch.bool)
    dropped[::2, 0] = top_k > 1
    assert torch.allclose(renormalised(weights, dropped).sum(-1), weights.sum(-1))
