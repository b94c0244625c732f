"""The order of picks by our kernels (interpreted here) is plain torch's: counts, rows sent, sums brought home."""

import pytest
import torch

from moe_runtime.dispatch import order
from moe_runtime.dispatch.order import order_picks
from moe_runtime.dispatch.plan import LOST
from moe_runtime.kernels import index, permute

T, K, A, D = 23, 3, 7, 5


def there_and_back(address_TK: torch.Tensor) -> list[torch.Tensor]:
    """Counts, rows sent, sums, and the gradients of tokens and weights."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(len(address_TK), D, generator=generator, requires_grad=True)
    weight_TK = torch.rand(address_TK.shape, generator=generator, requires_grad=True)
    picks = order_picks(address_TK, A)
    num_sent = int(picks.counts_A.sum())
    sent_PD = picks.send(x_TD, num_sent)
    home_TD = picks.bring_home(sent_PD.sin(), weight_TK, num_sent)
    grads = torch.autograd.grad(home_TD.square().sum(), (x_TD, weight_TK))
    return [picks.counts_A, sent_PD.detach(), home_TD.detach(), *grads]


@pytest.mark.parametrize(
    "address_TK",
    [
        torch.randint(LOST, A, (T, K), generator=torch.Generator().manual_seed(1)),
        torch.full((T, K), LOST),
        torch.full((T, K), 4),
        torch.zeros(0, K, dtype=torch.int64),
    ],
    ids=["some lost", "all lost", "one address", "no tokens"],
)
def test_both_orders_send_and_bring_home_the_same(monkeypatch: pytest.MonkeyPatch, address_TK: torch.Tensor) -> None:
    wanted = there_and_back(address_TK)
    for module in (order, index, permute):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)
    torch.testing.assert_close(there_and_back(address_TK), wanted)
