"""BASE layers (Lewis 2021, 2103.16716): the exactly balanced assignment of tokens to experts with the greatest sum of
logits, one expert per token.

Every rank assigns its own tokens evenly to all experts, so load is even over all ranks as well: each expert gets the
floor or the ceiling of T / E. The expert's result is weighed by the sigmoid of the logit, through which the gate
learns.

The assignment looks at all tokens of the batch. Where they do not compete, a token takes its best expert.
"""

from typing import Any

import numpy as np
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best

MOST_TOKENS = 8192
"""Of one rank's step: the assignment is over a square of so many float64 (512 MiB), and took 4.5 s for 64 experts."""

SOFTNESS, PRICE_ROUNDS = 0.02, 60
"""Seen on 1,024 and 4,096 normal values of 8 to 128 experts, even and skewed: 0.33 s became 0.09, 18 s 1 to 2."""
Values = np.ndarray[Any, np.dtype[np.float64]]


class Base(Kind):
    looks_ahead = True

    def __init__(self, *, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.scores = Scores("Sigmoid", renormalise=False)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        if moment.looks_at_batch:
            # device sync: the assignment is made on the host
            assigned_T = assign_evenly(logits_TE.detach().double().cpu().numpy())
            expert_TK = torch.from_numpy(assigned_T).to(logits_TE.device)[:, None]
        else:
            expert_TK = best(logits_TE.detach(), 1)
        return Picks(
            expert_TK=expert_TK,
            score_TE=score_TE.detach(),
            weigh=self.scores.weigher(logits_TE, score_TE),
            logits_TE=logits_TE,
        )


def assign_evenly(value_TE: Values) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[T] experts with the greatest sum of value_TE such that each has floor(T / E) or ceil(T / E) tokens.

    Solved as a square assignment: every expert has floor(T / E) places that must be filled and, if T / E leaves a rest,
    one that may; nobody's rows fill the latter where no token does. Every place is filled by one row, so that a price
    per expert changes no comparison of assignments: near the best prices the solver is 4 to 20 times as fast.

    Values that are not finite are for whoever sees the weights to refuse; the experts are then dealt out in turn.
    Raises InvalidInput for more than MOST_TOKENS tokens.
    """
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_experts = value_TE.shape
    if num_tokens > MOST_TOKENS:
        raise InvalidInput(f"BASE assigns at most {MOST_TOKENS} tokens of a rank at once (got {num_tokens})")
    if not np.isfinite(value_TE).all():
        return np.resize(np.arange(num_experts, dtype=np.int64), num_tokens)
    price_E = prices(value_TE)
    least, rest = divmod(num_tokens, num_experts)
    expert_of_place = np.repeat(np.arange(num_experts), least)
    nobody_P = np.full(expert_of_place.size, -np.inf)
    if rest:
        expert_of_place = np.concatenate([expert_of_place, np.arange(num_experts)])
        nobody_P = np.concatenate([nobody_P, -price_E])
    value_TP = (value_TE - price_E)[:, expert_of_place]
    nobody_NP = np.tile(nobody_P, (num_experts - rest if rest else 0, 1))
    _, place = linear_sum_assignment(np.concatenate([value_TP, nobody_NP]), maximize=True)
    return np.asarray(expert_of_place[place[:num_tokens]], dtype=np.int64)


def prices(value_TE: Values) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[E] What makes all experts about equally welcome: an even plan's that is almost sharp (as in `sinkhorn`)."""
    num_tokens, num_experts = value_TE.shape
    spread = float(value_TE.std()) if num_tokens else 0.0
    price_E = np.zeros(num_experts)
    if spread == 0.0:
        return price_E
    sharp_TE = value_TE / (SOFTNESS * spread)
    for _ in range(PRICE_ROUNDS):
        left_TE = sharp_TE - price_E
        left_TE = left_TE - left_TE.max(axis=1, keepdims=True)
        left_TE = left_TE - np.log(np.exp(left_TE).sum(axis=1, keepdims=True))
        # 1e-30: an expert that no token wants at all gets cheaper, not a price that is no number
        price_E = price_E + np.log(np.exp(left_TE).sum(axis=0) * num_experts / num_tokens + 1e-30)
    return price_E * (SOFTNESS * spread)
