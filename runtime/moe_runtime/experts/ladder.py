"""What answers for an expert without a live copy: its generalist, or nobody (drop and renormalise).

A generalist is a small map computed on the token's own rank, so that it needs no peer:

    y = up^T (down x) + bias + scale * shared(x)        shared: the layer's always-on expert, where it has one

T tokens, K picks, D model, E logical experts, M lost experts with a generalist, r rank of the map.
"""

from collections.abc import Callable, Sequence

import torch

from moe_runtime.dispatch.plan import LOST
from moe_runtime.experts.generalists import LayerGeneralists

SharedExpert = Callable[[torch.Tensor], torch.Tensor]


class LayerLadder:
    """The lost experts of one layer in one epoch. Empty while every expert has a live copy."""

    def __init__(self, shared: SharedExpert | None = None) -> None:
        self._shared = shared
        self._column_E: torch.Tensor | None = None
        self._num_mapped = 0

    def set_lost(
        self, lost: Sequence[int], generalists: LayerGeneralists | None, *, num_experts: int, device: str
    ) -> None:
        """Without generalists, and for experts that calibration left without one, the picks of lost experts are dropped
        and the token's other picks take their share.
        """
        if not lost:
            self._column_E = None
            return
        mapped = [e for e in lost if generalists is not None and generalists.has_map[e]]
        self._num_mapped = len(mapped)
        # where each lost expert's map lies; column M: dropped, column M + 1: alive
        column = dict.fromkeys(range(num_experts), len(mapped) + 1) | dict.fromkeys(lost, len(mapped))
        column |= {e: i for i, e in enumerate(mapped)}
        self._column_E = torch.tensor([column[e] for e in range(num_experts)], device=device)
        self._drops = len(mapped) < len(lost)
        if generalists is not None and mapped:
            index = torch.tensor(mapped)
            self._down_MRD = generalists.down_ERD[index].to(device)
            self._up_MRD = generalists.up_ERD[index].to(device)
            self._bias_MD = generalists.bias_ED[index].to(device)
            self._scale_M = generalists.shared_scale_E[index].to(device)
            self._uses_shared = self._shared is not None and bool((self._scale_M != 0).any())

    def answer(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, address_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight_TK of all picks, what this rank adds itself [T, D] or None)."""
        column_E = self._column_E
        if column_E is None:
            return weight_TK, None
        lost_TK = address_TK == LOST  # a lost expert with a living stand-in has an address
        column_TK = column_E[expert_TK]  # of a pick that nobody takes any column: its weight is zero
        if self._drops:
            weight_TK = renormalised(weight_TK, lost_TK & (column_TK == self._num_mapped))
        if not self._num_mapped:
            return weight_TK, None
        lost_weight_TK = weight_TK.masked_fill(~lost_TK, 0.0)
        all_columns = x_TD.new_zeros(x_TD.shape[0], self._num_mapped + 2)
        weight_TM = all_columns.scatter_add(1, column_TK, lost_weight_TK.to(x_TD.dtype))[:, : self._num_mapped]
        num_mapped, rank, dim = self._down_MRD.shape
        inner_TMR = (x_TD @ self._down_MRD.reshape(num_mapped * rank, dim).T).view(-1, num_mapped, rank)
        inner_TMR = inner_TMR * weight_TM.unsqueeze(-1)
        local_TD = inner_TMR.reshape(-1, num_mapped * rank) @ self._up_MRD.reshape(num_mapped * rank, dim)
        local_TD = local_TD + weight_TM @ self._bias_MD
        if self._uses_shared and self._shared is not None:
            local_TD = local_TD + (weight_TM @ self._scale_M).unsqueeze(-1) * self._shared(x_TD)
        return weight_TK, local_TD


def renormalised(weight_TK: torch.Tensor, dropped_TK: torch.Tensor) -> torch.Tensor:
    """Weights with the dropped picks at zero and the others scaled to the same sum; a token that loses all gets zero.

    >>> renormalised(torch.tensor([[0.6, 0.2]]), torch.tensor([[False, True]]))[0].tolist()
    [0.800000011920929, 0.0]
    """
    kept_TK = weight_TK.masked_fill(dropped_TK, 0.0)
    kept_T1 = kept_TK.sum(-1, keepdim=True)
    share_T1 = weight_TK.sum(-1, keepdim=True) / torch.where(kept_T1 == 0, torch.ones_like(kept_T1), kept_T1)
    return kept_TK * share_T1
