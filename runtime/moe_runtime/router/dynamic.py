"""Routers whose tokens take different numbers of experts.

TopP (Huang 2024, 2403.07652): a token takes its best experts until their probabilities sum to `top_p`, so that it takes
few where the gate is sure; the probabilities are the weights. The entropy loss keeps the gate from being unsure of all.

AnnealedTopK: K falls in a straight line from `start_k` to the model's own over the first part of the training, from
dense to sparse (EvoMoE, 2112.14397, begins with all experts). A server's K is the model's own.
"""

from moe_runtime.router.face import NO_EXPERT, Moment, Tokens
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best


class TopP(Kind):
    """expert_TK is always [T, max_k], so that ranks' shapes agree; NO_EXPERT after a token's last pick."""

    def __init__(self, *, num_experts: int, top_p: float, max_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_p, self.max_k = num_experts, top_p, max_k
        self.scores = Scores(before=True, renormalise=False)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:  # noqa: ARG002  the same at all times
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        value_TK, expert_TK = score_TE.detach().topk(self.max_k, dim=-1)
        reached_TK = value_TK.cumsum(dim=-1) - value_TK  # by the picks before this one
        return Picks(
            expert_TK=expert_TK.masked_fill(reached_TK >= self.top_p, NO_EXPERT),
            score_TE=score_TE.detach(),
            weigh=self.scores.weigher(logits_TE, score_TE),
            probability_TE=score_TE,
            logits_TE=logits_TE,
        )


class AnnealedTopK(Kind):
    def __init__(self, *, num_experts: int, top_k: int, start_k: int, until: float, scores: Scores) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.start_k, self.until, self.scores = num_experts, top_k, start_k, until, scores

    def current_k(self, progress: float) -> int:
        """Experts per token at this part of the training."""
        done = min(1.0, progress / self.until)
        return round(self.start_k + (self.top_k - self.start_k) * done)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        return Picks(
            expert_TK=best(score_TE.detach(), self.current_k(moment.progress)),
            score_TE=score_TE.detach(),
            weigh=self.scores.weigher(logits_TE, score_TE),
            probability_TE=self.scores.probability(score_TE),
            logits_TE=logits_TE,
        )
