"""Picks in the order of their addresses, and back: on a GPU by our kernels, elsewhere by plain torch; equal in result.

T tokens, D model, K picks per token, N = T*K, A addresses, P picks that are sent (LOST ones stay at home).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from moe_runtime.dispatch.weighted_sum import weighted_sum
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
        # LOST sorts before every address
        self.sent_P = _sorted(self.address_TK.reshape(-1), len(self.counts_A))[self.address_TK.numel() - num_sent :]
        return x_TD.index_select(0, self.sent_P // self.address_TK.shape[1])

    def bring_home(self, home_PD: torch.Tensor, weight_TK: torch.Tensor, num_sent: int) -> torch.Tensor:  # noqa: ARG002
        assert self.sent_P is not None, "nothing has been sent"
        return weighted_sum(home_PD, self.sent_P, weight_TK)


def _sorted(address_N: torch.Tensor, num_addresses: int) -> torch.Tensor:
    """[N] indices in the order of their addresses, each one's in their own."""
    if address_N.device.type == "cpu" and num_addresses < 1 << 15:
        # numpy sorts 16-bit numbers by radix, which torch does not
        return torch.from_numpy(np.argsort(address_N.numpy().astype(np.int16), kind="stable"))
    return torch.argsort(address_N, stable=True)


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
