"""Picks in the order of their addresses, and back: on a GPU by our kernels, elsewhere by plain torch; equal in result.

T tokens, D model, K picks per token, N = T*K, A addresses, P picks that are sent (LOST ones stay at home).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from moe_runtime.kernels.choose import runs_triton
from moe_runtime.kernels.index import SlotRows, index_rows
from moe_runtime.kernels.permute import combine, permute


class PickOrder(Protocol):
    """How many picks go to each address, [A] int64, and the two ways of rows. Picks of one address go by token."""

    @property
    def counts_A(self) -> torch.Tensor: ...

    def send(self, x_TD: torch.Tensor, num_sent: int) -> torch.Tensor:
        """[P, D] each pick's token, differentiable. num_sent: P, which the caller has told the host already."""

    def bring_home(self, home_PD: torch.Tensor, weight_TK: torch.Tensor, num_sent: int) -> torch.Tensor:
        """[T, D] weighted sum over each token's picks, differentiable."""


def order_picks(address_TK: torch.Tensor, num_addresses: int) -> PickOrder:
    if runs_triton(address_TK):
        rows = index_rows(address_TK.reshape(-1), num_slots=num_addresses, block_rows=1)
        return _IndexedOrder(rows, address_TK.shape[1])
    counts_A = torch.bincount(address_TK.reshape(-1) + 1, minlength=num_addresses + 1)[1:]
    return _SortedOrder(counts_A, address_TK)


@dataclass(slots=True)
class _SortedOrder:
    counts_A: torch.Tensor
    address_TK: torch.Tensor
    sent_P: torch.Tensor | None = None

    def send(self, x_TD: torch.Tensor, num_sent: int) -> torch.Tensor:
        address_N = self.address_TK.reshape(-1)
        # LOST sorts before every address
        self.sent_P = torch.argsort(address_N, stable=True)[address_N.numel() - num_sent :]
        return x_TD[self.sent_P // self.address_TK.shape[1]]

    def bring_home(self, home_PD: torch.Tensor, weight_TK: torch.Tensor, num_sent: int) -> torch.Tensor:  # noqa: ARG002
        assert self.sent_P is not None, "nothing has been sent"
        num_tokens, top_k = weight_TK.shape
        # rows of LOST picks stay zero
        output_ND = home_PD.new_zeros(num_tokens * top_k, home_PD.shape[-1]).index_copy(0, self.sent_P, home_PD)
        return (output_ND.view(num_tokens, top_k, home_PD.shape[-1]) * weight_TK.unsqueeze(-1)).sum(dim=1)


@dataclass(frozen=True, slots=True)
class _IndexedOrder:
    rows: SlotRows
    top_k: int

    @property
    def counts_A(self) -> torch.Tensor:
        return self.rows.count_S.long()

    def _sent(self, num_sent: int) -> SlotRows:
        return replace(self.rows, pick_P=self.rows.pick_P[:num_sent])

    def send(self, x_TD: torch.Tensor, num_sent: int) -> torch.Tensor:
        return permute(x_TD, self._sent(num_sent), top_k=self.top_k)

    def bring_home(self, home_PD: torch.Tensor, weight_TK: torch.Tensor, num_sent: int) -> torch.Tensor:
        return combine(home_PD, weight_TK, self._sent(num_sent))
