"""Routers that add noise to the gate's logits in training, and none when they do not train.

NoisyTopK (Shazeer 2017, 1701.06538): H = x Wg + normal * softplus(x Wn), the best K of H weigh by a softmax over H. Wn
is learned, through the weights and through the load loss: the expected number of tokens of expert i is the sum of cdf((
(x Wg)_i - (K-th best H of the others)) / softplus(x Wn)_i), smooth where the count itself has no gradient.

GumbelTopK (Kool 2019, 1903.06059): with Gumbel noise the best K are a draw without replacement from the softmax (the
first pick follows it exactly); the weights are those of the logits without noise.
"""

import torch

from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.losses import squared_variation
from moe_runtime.router.noise import normal, uniform
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best

LEAST_NOISE = 1e-2
"""Added to the noise's scale, so that a learned scale of nothing still explores (as in the authors' Tensor2Tensor)."""


class NoisyTopK(Kind):
    def __init__(self, *, num_experts: int, top_k: int, dim: int, load_loss_coeff: float = 0.0) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.load_loss_coeff = num_experts, top_k, load_loss_coeff
        self.scores = Scores()
        self.noise_weight_ED = torch.nn.Parameter(torch.zeros(num_experts, dim))  # the paper begins at zero

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        clean_TE = logits_of(tokens, self.num_experts)
        losses: dict[str, torch.Tensor] = {}
        noisy_TE = clean_TE
        if moment.is_training:
            x_TD = tokens.x_TD.to(clean_TE.dtype)
            scale_TE = torch.nn.functional.softplus(x_TD @ self.noise_weight_ED.to(clean_TE.dtype).T) + LEAST_NOISE
            noisy_TE = clean_TE + scale_TE * normal(moment, *clean_TE.shape, device=clean_TE.device)
            if self.load_loss_coeff:
                expected_TE = chance_of_choice(clean_TE, noisy_TE, scale_TE, self.top_k)
                losses["load"] = self.load_loss_coeff * squared_variation(expected_TE.sum(dim=0))
        score_TE = self.scores.score(noisy_TE)
        return Picks(
            expert_TK=best(noisy_TE.detach(), self.top_k),
            score_TE=score_TE.detach(),
            weigh=self.scores.weigher(noisy_TE, score_TE),
            probability_TE=clean_TE.softmax(dim=-1),
            logits_TE=clean_TE,
            losses=losses,
        )


def chance_of_choice(
    clean_TE: torch.Tensor, noisy_TE: torch.Tensor, scale_TE: torch.Tensor, top_k: int
) -> torch.Tensor:
    """[T, E]: the chance that an expert is among the K best if its own noise, and only that, were drawn again."""
    if top_k == noisy_TE.shape[-1]:
        return torch.ones_like(noisy_TE)
    value_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    # whoever is chosen competes with the K+1st, whoever is not with the K-th
    is_chosen_TE = noisy_TE >= value_TK[:, top_k - 1 : top_k]
    to_beat_TE = torch.where(is_chosen_TE, value_TK[:, top_k : top_k + 1], value_TK[:, top_k - 1 : top_k])
    chance_TE: torch.Tensor = torch.special.ndtr((clean_TE - to_beat_TE) / scale_TE)
    return chance_TE


class GumbelTopK(Kind):
    def __init__(self, *, num_experts: int, top_k: int, noise_scale: float) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.noise_scale = num_experts, top_k, noise_scale
        self.scores = Scores()

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        compete_TE = logits_TE.detach()
        if moment.is_training:
            drawn_TE = uniform(moment, *logits_TE.shape, device=logits_TE.device)
            tiny = torch.finfo(drawn_TE.dtype).tiny
            compete_TE = compete_TE - self.noise_scale * (-drawn_TE.clamp_min(tiny).log()).log()
        return Picks(
            expert_TK=best(compete_TE, self.top_k),
            score_TE=compete_TE,
            weigh=self.scores.weigher(logits_TE, score_TE),
            probability_TE=score_TE,
            logits_TE=logits_TE,
        )
