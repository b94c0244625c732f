"""Dispatch on one rank: no group, no bytes; the readable reference that every other dispatcher must equal.

T tokens, D model, K picks per token, N = T*K picks.
"""

from collections.abc import Callable

import torch

from moe_runtime.dispatch.plan import LOST

RunSlots = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows_RD, local_slot_R) -> outputs_RD of this rank's slots, unweighted."""


def run_local(
    x_TD: torch.Tensor, address_TK: torch.Tensor, weight_TK: torch.Tensor, run_slots: RunSlots
) -> torch.Tensor:
    """[T, D] sum over picks of weight * expert(x). Picks with a LOST address give nothing."""
    num_tokens, top_k = address_TK.shape
    address_N = address_TK.reshape(-1)
    kept_P = torch.nonzero(address_N != LOST).squeeze(-1)  # device sync: sizes the experts' batch
    if kept_P.numel() == 0:
        return x_TD * 0.0
    outputs_PD = run_slots(x_TD[kept_P // top_k], address_N[kept_P])
    weighted_PD = outputs_PD * weight_TK.reshape(-1)[kept_P].unsqueeze(-1)
    if kept_P.numel() == address_N.numel():
        return weighted_PD.view(num_tokens, top_k, -1).sum(dim=1).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, kept_P // top_k, weighted_PD.to(x_TD.dtype))
