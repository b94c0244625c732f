"""From a gate's logits to scores, to probabilities for the losses, and to the weights of a choice.

Softmax over the chosen experts alone is the same as softmax over all and division by the sum (Mixtral, Qwen3); without
the division it is Switch's and OLMoE's. Sigmoid scores are divided by their sum and scaled (DeepSeek-V3, 2412.19437);
so are roots of softplus, which do not saturate (DeepSeek-V4).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from moe_runtime.kernels.gate import TINY
from moe_runtime.router.picks import gather

ScoreFunction = Literal["Softmax", "Sigmoid", "SqrtSoftplus"]


@dataclass(frozen=True, slots=True)
class Scores:
    """How logits become weights; `before` is whether softmax runs over all experts, before the choice."""

    function: ScoreFunction = "Softmax"
    before: bool = False
    renormalise: bool = True
    scale: float = 1.0

    def score(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """What experts compete by, each >= 0."""
        if self.function == "SqrtSoftplus":
            return torch.nn.functional.softplus(logits_TE).sqrt()
        return logits_TE.softmax(dim=-1) if self.function == "Softmax" else logits_TE.sigmoid()

    def probability(self, score_TE: torch.Tensor) -> torch.Tensor:
        """Scores as shares of a token, for the losses."""
        return score_TE if self.function == "Softmax" else score_TE / (score_TE.sum(dim=-1, keepdim=True) + TINY)

    def weigh(self, logits_TE: torch.Tensor, score_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
        """Weights of a choice, 0 at NO_EXPERT."""
        if self.function == "Softmax" and not self.before:
            # a token without any pick has only -inf: its NaN must not reach the gradient either
            chosen_TK = gather(logits_TE, expert_TK, missing=float("-inf"))
            nobody_T1 = (expert_TK < 0).all(dim=-1, keepdim=True)
            return chosen_TK.masked_fill(nobody_T1, 0.0).softmax(dim=-1).masked_fill(expert_TK < 0, 0.0) * self.scale
        weight_TK = gather(score_TE, expert_TK, missing=0.0)
        if self.renormalise:
            weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + TINY)
        return weight_TK * self.scale

    def weigher(self, logits_TE: torch.Tensor, score_TE: torch.Tensor) -> "partial[torch.Tensor]":
        return partial(self.weigh, logits_TE, score_TE)
