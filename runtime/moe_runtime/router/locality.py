"""Hardware-aware choice: nearer experts instead of better ones, for at most a given part of a token's probability.

By pick, where every pick travels on its own: experts compete by score - lambda * distance. For each token the largest
lambda up to the bias is taken at which the chosen experts' scores still sum to (1 - budget) of what the plain choice
has. As lambda grows, both the chosen scores' sum and the chosen distances' sum fall, never rise (the Lagrangian of a
linear choice), so a bisection finds it.

By domain, where a token crosses to a domain once for all its picks there: its own domain, and of the others those that
hold the most of its plain choice, one after the other; of all these ever wider choices the one is taken that loses
least, a domain counting as much as the bias in score, and no choice below the budget. Sparing one of two picks in the
same domain spares nothing then, and costs nothing here.
"""

from collections.abc import Callable

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import NO_EXPERT, Layout
from moe_runtime.router.picks import gather

HALVINGS = 12
"""Lambda is found to one part in 4096 of the bias; any lambda it settles on keeps the budget exactly."""

Choose = Callable[[torch.Tensor], torch.Tensor]
"""From what experts compete by, [T, E], to expert_TK."""


class Locality(torch.nn.Module):
    """bias: score per unit of distance, or per domain, at most. budget: part of the chosen scores' sum that may be
    given up. Suffix A: domains, the own one first.
    """

    def __init__(self, *, num_experts: int, bias: float, budget: float, by_domain: bool = False) -> None:
        super().__init__()
        self.bias, self.budget, self.by_domain = bias, budget, by_domain
        self._is_all_here = True
        self.register_buffer("distance_E", torch.zeros(num_experts), persistent=False)
        self.register_buffer("holds_AE", torch.ones(1, num_experts, dtype=torch.bool), persistent=False)
        self.distance_E: torch.Tensor
        self.holds_AE: torch.Tensor

    def use_layout(self, layout: Layout) -> None:
        """Raises InvalidInput when domains are asked for and the layout does not tell them."""
        self.distance_E = layout.distance_E.to(self.distance_E)
        self._is_all_here = not bool(layout.distance_E.any())  # device sync: once per epoch
        if self.by_domain:
            domain_G = layout.domain_G
            if domain_G is None:
                raise InvalidInput("locality by domain needs a layout with domain_G (got None)")
            holds = [layout.holds_GE[domain_G == domain].any(dim=0) for domain in range(int(domain_G.max()) + 1)]
            self.holds_AE = torch.stack(holds).to(self.holds_AE)

    def choose(self, compete_TE: torch.Tensor, score_TE: torch.Tensor, choose: Choose) -> torch.Tensor:
        """expert_TK: no further than `choose(compete_TE)`, within the budget of score_TE."""
        plain_TK = choose(compete_TE)
        if self.by_domain:
            return self._fewer_domains(plain_TK, compete_TE, score_TE, choose)
        return plain_TK if self._is_all_here else self._nearer_picks(plain_TK, compete_TE, score_TE, choose)

    def _nearer_picks(
        self, plain_TK: torch.Tensor, compete_TE: torch.Tensor, score_TE: torch.Tensor, choose: Choose
    ) -> torch.Tensor:
        enough_T = (1.0 - self.budget) * _sum(score_TE, plain_TK)
        low_T = torch.zeros_like(enough_T)
        high_T = torch.full_like(enough_T, self.bias)
        best_TK, probe_T = plain_TK, high_T
        for _ in range(HALVINGS + 1):
            near_TK = choose(compete_TE - probe_T[:, None] * self.distance_E)
            affordable_T = _sum(score_TE, near_TK) >= enough_T
            best_TK = torch.where(affordable_T[:, None], near_TK, best_TK)
            low_T = torch.where(affordable_T, probe_T, low_T)
            high_T = torch.where(affordable_T, high_T, probe_T)
            probe_T = (low_T + high_T) / 2
        return best_TK

    def _fewer_domains(
        self, plain_TK: torch.Tensor, compete_TE: torch.Tensor, score_TE: torch.Tensor, choose: Choose
    ) -> torch.Tensor:
        had_T = _sum(score_TE, plain_TK)
        enough_T = (1.0 - self.budget) * had_T
        order_TA = self._by_need(plain_TK, score_TE)
        num_plain_T = (plain_TK != NO_EXPERT).sum(dim=-1)
        reach_TE = torch.zeros_like(score_TE, dtype=torch.bool)
        best_TK, least_T = plain_TK, torch.full_like(had_T, float("inf"))
        for num_far in range(self.holds_AE.shape[0]):
            reach_TE = reach_TE | self.holds_AE[order_TA[:, num_far]]
            near_TK = choose(compete_TE.masked_fill(~reach_TE, float("-inf")))
            has_T = _sum(score_TE, near_TK)
            is_whole_T = (near_TK != NO_EXPERT).sum(dim=-1) == num_plain_T
            loss_T = had_T - has_T + self.bias * num_far
            better_T = is_whole_T & (has_T >= enough_T) & (loss_T < least_T)
            best_TK = torch.where(better_T[:, None], near_TK, best_TK)
            least_T = torch.where(better_T, loss_T, least_T)
        return best_TK

    def _by_need(self, plain_TK: torch.Tensor, score_TE: torch.Tensor) -> torch.Tensor:
        """[T, A] domains: the own one, then by what they hold of the plain choice that the own one does not."""
        picked_TK = gather(score_TE, plain_TK, missing=0.0)
        picked_TE = torch.zeros_like(score_TE).scatter_add_(1, plain_TK.clamp_min(0), picked_TK)
        held_TA = picked_TE.masked_fill(self.holds_AE[0], 0.0) @ self.holds_AE.to(picked_TE.dtype).T
        held_TA[:, 0] = float("inf")
        return held_TA.argsort(dim=-1, descending=True, stable=True)


def _sum(score_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    return gather(score_TE, expert_TK, missing=0.0).sum(dim=-1)
