"""A token takes experts of few groups only, so that it crosses to few nodes or ranks.

DeepSeek-V3 (2412.19437) lets groups of neighbours compete by the sum of their two best scores, DeepSeek-V2 (2405.04434,
device-limited routing) by their best. Groups by device are what each rank holds under the bound map: an expert with
copies on several ranks belongs to all of them.
"""

from typing import Literal

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import Layout

BEST = {"Top2Sum": 2, "Max": 1}


class GroupLimit(torch.nn.Module):
    """`reach` says which experts a token may take. num_groups None: by device."""

    def __init__(
        self, *, num_experts: int, num_groups: int | None, group_topk: int, group_score: Literal["Top2Sum", "Max"]
    ) -> None:
        super().__init__()
        self.group_topk, self.best = group_topk, BEST[group_score]
        self.by_device = num_groups is None
        holds_GE = torch.ones(1, num_experts, dtype=torch.bool)
        if num_groups is not None:
            group_E = torch.arange(num_experts) // (num_experts // num_groups)
            holds_GE = group_E == torch.arange(num_groups)[:, None]
        self.register_buffer("holds_GE", holds_GE, persistent=False)
        self.holds_GE: torch.Tensor

    def use_layout(self, layout: Layout) -> None:
        """Raises InvalidInput when an expert is in no group."""
        if not self.by_device:
            return
        holds_GE = layout.holds_GE
        if holds_GE.ndim != 2 or holds_GE.shape[1] != self.holds_GE.shape[1] or not bool(holds_GE.any(dim=0).all()):
            raise InvalidInput(
                f"a layout names a group for each of {self.holds_GE.shape[1]} experts (got {list(holds_GE.shape)}, "
                f"experts without one: {(~holds_GE.any(dim=0)).nonzero().flatten().tolist()})"
            )
        self.holds_GE = holds_GE.to(self.holds_GE.device)

    def reach(self, score_TE: torch.Tensor) -> torch.Tensor:
        """[T, E] bool: the experts of the `group_topk` best groups by this score."""
        num_groups = self.holds_GE.shape[0]
        if num_groups <= self.group_topk:
            return torch.ones_like(score_TE, dtype=torch.bool)
        groups = [self._compete(score_TE[:, holds_E]) for holds_E in self.holds_GE]
        chosen_TG = torch.stack(groups, dim=1).topk(self.group_topk, dim=-1).indices
        in_group_TG = torch.zeros(score_TE.shape[0], num_groups, device=score_TE.device).scatter_(1, chosen_TG, 1.0)
        return in_group_TG @ self.holds_GE.float() > 0

    def _compete(self, score_Te: torch.Tensor) -> torch.Tensor:
        if score_Te.shape[1] == 0:
            return torch.full(score_Te.shape[:1], float("-inf"), device=score_Te.device)
        return score_Te.topk(min(self.best, score_Te.shape[1]), dim=-1).values.sum(dim=-1)
