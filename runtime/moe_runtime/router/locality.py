"""Hardware-aware choice: nearer experts instead of better ones, for at most a given part of a token's probability.

Experts compete by score - lambda * distance. For each token the largest lambda up to the bias is taken at which the
chosen experts' scores still sum to (1 - budget) of what the plain choice has. As lambda grows, both the chosen scores'
sum and the chosen distances' sum fall, never rise (the Lagrangian of a linear choice), so a bisection finds it.
"""

from collections.abc import Callable

import torch

from moe_runtime.router.face import Layout
from moe_runtime.router.picks import gather

HALVINGS = 12
"""Lambda is found to one part in 4096 of the bias; any lambda it settles on keeps the budget exactly."""

Choose = Callable[[torch.Tensor], torch.Tensor]
"""From what experts compete by, [T, E], to expert_TK."""


class Locality(torch.nn.Module):
    """bias: score per unit of distance, at most. budget: part of the chosen scores' sum that may be given up."""

    def __init__(self, *, num_experts: int, bias: float, budget: float) -> None:
        super().__init__()
        self.bias, self.budget = bias, budget
        self.register_buffer("distance_E", torch.zeros(num_experts), persistent=False)
        self.distance_E: torch.Tensor

    def use_layout(self, layout: Layout) -> None:
        self.distance_E = layout.distance_E.to(self.distance_E)

    def choose(self, compete_TE: torch.Tensor, score_TE: torch.Tensor, choose: Choose) -> torch.Tensor:
        """expert_TK: nearer than `choose(compete_TE)` or equal, within the budget of score_TE."""
        plain_TK = choose(compete_TE)
        if not bool(self.distance_E.any()):
            return plain_TK
        enough_T = (1.0 - self.budget) * gather(score_TE, plain_TK, missing=0.0).sum(dim=-1)
        low_T = torch.zeros_like(enough_T)
        high_T = torch.full_like(enough_T, self.bias)
        best_TK, probe_T = plain_TK, high_T
        for _ in range(HALVINGS + 1):
            near_TK = choose(compete_TE - probe_T[:, None] * self.distance_E)
            affordable_T = gather(score_TE, near_TK, missing=0.0).sum(dim=-1) >= enough_T
            best_TK = torch.where(affordable_T[:, None], near_TK, best_TK)
            low_T = torch.where(affordable_T, probe_T, low_T)
            high_T = torch.where(affordable_T, high_T, probe_T)
            probe_T = (low_T + high_T) / 2
        return best_TK
