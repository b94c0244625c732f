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
"""Of one rank's step: the assignment is over a square of so many float64 (512 MiB), and takes cubic time at worst."""


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


def assign_evenly(value_TE: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[T] experts with the greatest sum of value_TE such that each has floor(T / E) or ceil(T / E) tokens.

    Solved as a square assignment: every expert has floor(T / E) places that must be filled and, if T / E leaves a rest,
    one that may; nobody's rows fill the latter where no token does. Raises InvalidInput for more than MOST_TOKENS
    tokens.
    """
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_experts = value_TE.shape
    if num_tokens > MOST_TOKENS:
        raise InvalidInput(f"BASE assigns at most {MOST_TOKENS} tokens of a rank at once (got {num_tokens})")
    least, rest = divmod(num_tokens, num_experts)
    expert_of_place = np.repeat(np.arange(num_experts), least)
    value_TP = value_TE[:, expert_of_place]
    if rest:
        must = expert_of_place.size
        expert_of_place = np.concatenate([expert_of_place, np.arange(num_experts)])
        nobody_P = np.concatenate([np.full(must, -np.inf), np.zeros(num_experts)])
        value_TP = np.concatenate([value_TE[:, expert_of_place], np.tile(nobody_P, (num_experts - rest, 1))])
    _, place = linear_sum_assignment(value_TP, maximize=True)
    return np.asarray(expert_of_place[place[:num_tokens]], dtype=np.int64)
