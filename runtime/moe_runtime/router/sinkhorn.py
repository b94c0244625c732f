"""Balanced routing by optimal transport (Clark 2022, 2202.01169; Megatron's `sinkhorn`).

In training the tokens' logits are scaled by row and column until every token spends the same and every expert gets the
same; tokens take the best of that plan, without a gradient. The weights are the plain scores: probabilities, for K = 1
the sigmoid. Rounds run in logarithms, so that large logits do not overflow.

The plan of a batch looks at all its tokens. Where they do not compete, a token takes its best logits.
"""

import math

import torch

from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best


class Sinkhorn(Kind):
    looks_ahead = True

    def __init__(self, *, num_experts: int, top_k: int, tolerance: float, iterations: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.tolerance, self.iterations = num_experts, top_k, tolerance, iterations
        self.scores = Scores("Sigmoid" if top_k == 1 else "Softmax", before=True, renormalise=False)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        compete_TE = logits_TE.detach()
        if moment.looks_at_batch:
            compete_TE = log_plan(compete_TE, tolerance=self.tolerance, iterations=self.iterations)
        return Picks(
            expert_TK=best(compete_TE, self.top_k),
            score_TE=compete_TE,
            weigh=self.scores.weigher(logits_TE, score_TE),
            logits_TE=logits_TE,
        )


def log_plan(logits_TE: torch.Tensor, *, tolerance: float, iterations: int) -> torch.Tensor:
    """Logarithm of the plan exp(logits_TE) scaled so that rows sum to 1 / T and columns to 1 / E.

    Columns are exact, rows as near as rounds bring them: no row is further off than `tolerance` of its share, or
    `iterations` rounds have run.
    """
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        return logits_TE
    expert_E = logits_TE.new_zeros(num_experts)
    token_T = logits_TE.new_zeros(num_tokens)
    for _ in range(iterations):
        spent_T = (logits_TE + expert_E).logsumexp(dim=1) + math.log(num_tokens)
        off = float((token_T + spent_T).exp().sub(1.0).abs().max())  # device sync: rounds depend on the data
        token_T = -spent_T
        expert_E = -(logits_TE + token_T[:, None]).logsumexp(dim=0) - math.log(num_experts)
        if off <= tolerance:
            break
    return logits_TE + token_T[:, None] + expert_E
