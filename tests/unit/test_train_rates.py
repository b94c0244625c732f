"""The learning rate over a run, and the update rules."""

import pytest
import torch

from moe_core.contract.runtime_config import TrainingConfig
from moe_runtime.train.gradients import _clip_rows
from moe_runtime.train.losses import balance_loss
from moe_runtime.train.optim import Optimizer, Trained, orthogonalised, rule_for
from moe_runtime.train.schedule import progress, rate_share


def _config(*, max_steps: int | None, max_seconds: int | None, warmup_steps: int = 0) -> TrainingConfig:
    return TrainingConfig(
        data="stdlib",
        sequence_length=16,
        sequences_per_rank=2,
        max_steps=max_steps,
        max_seconds=max_seconds,
        learning_rate=0.01,
        warmup_steps=warmup_steps,
        weight_decay=0.0,
        aux_loss_coefficient=0.0,
        seed=0,
        snapshot_every_steps=10,
        output_path="unused",
    )


def test_progress_follows_the_nearer_bound() -> None:
    config = _config(max_steps=100, max_seconds=50)
    assert progress(config, step=10, seconds=20.0) == pytest.approx(0.4)
    assert progress(config, step=90, seconds=20.0) == pytest.approx(0.9)


def test_progress_ends_at_one() -> None:
    assert progress(_config(max_steps=10, max_seconds=None), step=25, seconds=0.0) == 1.0


def test_the_rate_rises_over_the_warm_up() -> None:
    config = _config(max_steps=1000, max_seconds=None, warmup_steps=9)
    shares = [rate_share(config, step=step, done=0.0) for step in range(12)]
    assert shares[0] == pytest.approx(0.1)
    assert shares == sorted(shares)
    assert shares[9] == 1.0


def test_the_rate_falls_to_zero_at_the_end() -> None:
    config = _config(max_steps=100, max_seconds=None)
    shares = [rate_share(config, step=step, done=step / 100) for step in range(30, 101)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0.0


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 24, 8), (2, 8, 24), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(*shape)))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.3


def test_orthogonalised_zero_stays_zero() -> None:
    assert not orthogonalised(torch.zeros(2, 4, 4)).any()


def test_one_expert_is_updated_the_same_whoever_shares_its_stack() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 8, 4), torch.randn(3, 8, 4)
    whole = _updated(start.clone(), gradient)
    alone = _updated(start[1:2].clone(), gradient[1:2])
    torch.testing.assert_close(whole[1:2], alone)


def _updated(stack: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    optimizer = Optimizer([Trained("experts", stack, "Muon", True)], learning_rate=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.apply({"experts": gradient}, rate_share=1.0, step=step)
    return stack


def test_adamw_equals_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(6, 5), torch.nn.Parameter(torch.empty(6, 5))
    theirs.data.copy_(ours)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    optimizer = Optimizer([Trained("w", ours, "AdamW", False)], learning_rate=0.01, weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(6, 5)
        theirs.grad = gradient.clone()
        reference.step()
        optimizer.apply({"w": gradient}, rate_share=1.0, step=step)
    torch.testing.assert_close(ours, theirs.data, rtol=1e-5, atol=1e-6)


def test_a_rank_without_experts_has_nothing_to_update() -> None:
    empty = torch.zeros(0, 8, 4)
    optimizer = Optimizer([Trained("experts", empty, "Muon", True)], learning_rate=0.1, weight_decay=0.0)
    optimizer.apply({"experts": torch.zeros(0, 8, 4)}, rate_share=1.0, step=0)
    assert empty.shape == (0, 8, 4)


def test_muon_takes_matrices_inside_layers_only() -> None:
    def rule(*shape: int, per_expert: bool = False, is_embedding: bool = False) -> str:
        tensor = torch.zeros(*shape)
        return rule_for(tensor, optimizer="Muon", per_expert=per_expert, is_embedding=is_embedding, num_experts=16)

    assert rule(128, 128) == "Muon"
    assert rule(4, 256, 128, per_expert=True) == "Muon"
    assert rule(4, 256, per_expert=True) == "AdamW"  # biases
    assert rule(256, 128, is_embedding=True) == "AdamW"
    assert rule(16, 128) == "AdamW"  # a router
    assert rule(128) == "AdamW"


def test_balanced_routing_costs_one() -> None:
    logits_TE = torch.eye(4).repeat(8, 1) * 20
    assert float(balance_loss((logits_TE,), 1, like=torch.tensor(0.0))) == pytest.approx(1.0, abs=1e-3)


def test_routing_to_one_expert_costs_their_number() -> None:
    logits_TE = torch.tensor([[20.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert float(balance_loss((logits_TE,), 1, like=torch.tensor(0.0))) == pytest.approx(4.0, abs=1e-3)


def test_a_family_without_router_logits_has_no_balance_loss() -> None:
    assert float(balance_loss(None, 2, like=torch.tensor(0.0))) == 0.0


def test_an_experts_gradient_is_scaled_to_the_norm_over_all_its_parameters() -> None:
    up_ED, down_ED = (
        torch.tensor([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 4.0], [0.4, 0.0], [0.0, 0.0]]),
    )
    stacks = [up_ED.clone(), down_ED.clone()]
    _clip_rows(stacks, 1.0)
    torch.testing.assert_close(stacks[0], torch.tensor([[0.6, 0.0], [0.3, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(stacks[1], torch.tensor([[0.0, 0.8], [0.4, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_not_hidden_by_scaling(bad: float) -> None:
    stack_ED = torch.tensor([[bad, 1.0], [3.0, 4.0]])
    _clip_rows([stack_ED], 1.0)
    assert not torch.isfinite(stack_ED[0]).all() and torch.isfinite(stack_ED[1]).all()
