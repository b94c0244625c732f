"""Experts choose tokens, not tokens experts (Zhou 2022, 2202.09368): load is even by construction.

Each expert takes its `c * T / E` best tokens of this rank's batch by the tokens' probabilities, which are the weights.
c, the experts a token gets on average, is the model's K times the capacity factor; a token may get none or all E.

Who is chosen depends on the other tokens, later ones included. Where tokens do not compete, each takes its K most
probable experts with their probabilities as weights: what training resembles on average, and no more than that.
"""

import math

import torch

from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best


class ExpertChoice(Kind):
    looks_ahead = True

    def __init__(self, *, num_experts: int, top_k: int, factor: float) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.factor = num_experts, top_k, factor
        self.scores = Scores(before=True, renormalise=False)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        compete_TE = score_TE.detach()
        if moment.looks_at_batch:
            compete_TE = compete_TE.masked_fill(~self._chosen(compete_TE), float("-inf"))
        return Picks(
            expert_TK=best(compete_TE, self.num_experts if moment.looks_at_batch else self.top_k),
            score_TE=compete_TE,
            weigh=self.scores.weigher(logits_TE, score_TE),
            logits_TE=logits_TE,
        )

    def _chosen(self, score_TE: torch.Tensor) -> torch.Tensor:
        num_tokens = score_TE.shape[0]
        room = min(num_tokens, math.ceil(self.factor * self.top_k * num_tokens / self.num_experts))
        token_RE = score_TE.topk(room, dim=0).indices
        return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, token_RE, True)
