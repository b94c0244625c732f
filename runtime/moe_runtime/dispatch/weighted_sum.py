"""Picks' results, come home in the order they were sent, to one row a token: gathered, weighted and summed in one pass.

T tokens, D model, K picks per token, N = T*K, P picks that were sent.
"""

from typing import Any

import torch
from torch.nn.functional import embedding_bag


def weighted_sum(home_PD: torch.Tensor, sent_P: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """[T, D] sum over a token's picks of weight * its row, differentiable in both; picks that were not sent give
    nothing. sent_P: which of the N picks each row answers.
    """
    if home_PD.device.type == "cpu" and home_PD.dtype == weight_TK.dtype == torch.float32:
        summed_TD: torch.Tensor = _WeightedSum.apply(home_PD, sent_P, weight_TK)
        return summed_TD
    num_tokens, top_k = weight_TK.shape
    output_ND = home_PD.new_zeros(num_tokens * top_k, home_PD.shape[-1]).index_copy(0, sent_P, home_PD)
    return (output_ND.view(num_tokens, top_k, home_PD.shape[-1]) * weight_TK.unsqueeze(-1)).sum(dim=1)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, home_PD: torch.Tensor, sent_P: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(home_PD, sent_P, weight_TK)
        num_tokens, top_k = weight_TK.shape
        if len(sent_P) == 0:
            return home_PD.new_zeros(num_tokens, home_PD.shape[1])
        if len(sent_P) == weight_TK.numel():
            row_N = torch.empty_like(sent_P)
            row_N[sent_P] = torch.arange(len(sent_P))
            return embedding_bag(row_N.view(num_tokens, top_k), home_PD, per_sample_weights=weight_TK, mode="sum")
        pick_P, row_P = torch.sort(sent_P)
        first_T = torch.searchsorted(pick_P, torch.arange(num_tokens) * top_k)
        weight_P = weight_TK.reshape(-1)[pick_P]
        return embedding_bag(row_P, home_PD, first_T, per_sample_weights=weight_P, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_sum_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        home_PD, sent_P, weight_TK = ctx.saved_tensors
        d_home_PD = d_sum_TD.index_select(0, sent_P // weight_TK.shape[1])
        d_weight_TK = torch.zeros_like(weight_TK)
        d_weight_TK.view(-1)[sent_P] = torch.linalg.vecdot(home_PD, d_home_PD)
        d_home_PD.mul_(weight_TK.reshape(-1)[sent_P].unsqueeze(-1))
        return d_home_PD, None, d_weight_TK
