"""Gates that do not learn, and gates that choose among the experts of a token's class only.

Frozen: a gate drawn once (SMoE-Dropout, Chen 2023, 2303.01610: a random fixed router keeps experts from collapsing), or
the model's own as it is: its logits pass no gradient, neither to the gate nor to what is below.

ByClass: every class of tokens (modality) has its own stretch of experts, chosen among by the gate (MoMa, 2407.21770).
"""

import torch

from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.noise import seeded
from moe_runtime.router.picks import Kind, Picks, classes_of, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best


class Frozen(Kind):
    """seed None: the model's own gate."""

    def __init__(
        self, *, num_experts: int, top_k: int, dim: int, scores: Scores, seed: int | None, layer_idx: int
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.scores = num_experts, top_k, scores
        gate_ED = None
        if seed is not None:
            gate_ED = torch.randn(num_experts, dim, generator=seeded(seed, layer_idx)) / dim**0.5
        self.gate_ED: torch.Tensor | None
        self.register_buffer("gate_ED", gate_ED)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:  # noqa: ARG002  the same at all times
        if self.gate_ED is None:
            logits_TE = logits_of(tokens, self.num_experts).detach()
        else:
            logits_TE = tokens.x_TD.float() @ self.gate_ED.float().T
        score_TE = self.scores.score(logits_TE)
        return Picks(best(score_TE.detach(), self.top_k), score_TE.detach(), self.scores.weigher(logits_TE, score_TE))


class ByClass(Kind):
    def __init__(self, *, num_experts: int, top_k: int, num_classes: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.num_classes = num_experts, top_k, num_classes
        self.scores = Scores()
        class_E = torch.arange(num_experts) * num_classes // num_experts
        self.register_buffer("class_E", class_E, persistent=False)
        self.class_E: torch.Tensor

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:  # noqa: ARG002  the same at all times
        own_TE = classes_of(tokens, self.num_classes)[:, None] == self.class_E
        logits_TE = logits_of(tokens, self.num_experts).masked_fill(~own_TE, float("-inf"))
        score_TE = self.scores.score(logits_TE)
        return Picks(
            expert_TK=best(logits_TE.detach(), self.top_k),
            score_TE=score_TE.detach().masked_fill(~own_TE, float("-inf")),
            weigh=self.scores.weigher(logits_TE, score_TE),
            probability_TE=score_TE,
            logits_TE=logits_TE,
        )
