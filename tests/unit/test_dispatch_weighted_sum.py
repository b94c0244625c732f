"""Results come home weighted and summed per token, whichever picks were sent."""

import pytest
import torch

from moe_runtime.dispatch.weighted_sum import weighted_sum


def plain(home_PD: torch.Tensor, sent_P: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    every_ND = home_PD.new_zeros(weight_TK.numel(), home_PD.shape[1]).index_copy(0, sent_P, home_PD)
    return (every_ND.view(*weight_TK.shape, -1) * weight_TK.unsqueeze(-1)).sum(dim=1)


@pytest.mark.parametrize("num_sent", [0, 1, 9, 15], ids=["none", "one", "some", "all"])
def test_sum_and_gradients_equal_the_plain_ones(num_sent: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    sent_P = torch.randperm(15, generator=numbers)[:num_sent]
    home_PD = torch.randn(num_sent, 4, generator=numbers, requires_grad=True)
    weight_TK = torch.rand(5, 3, generator=numbers, requires_grad=True)
    wanted_TD = torch.randn(5, 4, generator=numbers)

    summed_TD, expected_TD = weighted_sum(home_PD, sent_P, weight_TK), plain(home_PD, sent_P, weight_TK)

    torch.testing.assert_close(summed_TD, expected_TD)
    given = torch.autograd.grad(summed_TD, (home_PD, weight_TK), wanted_TD)
    expected = torch.autograd.grad(expected_TD, (home_PD, weight_TK), wanted_TD)
    for mine, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rows_that_are_not_numbers_stay_out_of_tokens_without_them() -> None:
    home_PD = torch.tensor([[float("nan")], [1.0]])

    summed_TD = weighted_sum(home_PD, torch.tensor([0, 1]), torch.ones(3, 1))

    assert torch.equal(summed_TD[1:], torch.tensor([[1.0], [0.0]]))
