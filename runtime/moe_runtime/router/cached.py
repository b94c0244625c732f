"""Routes learned first, then kept: a token's id alone decides, so that routes no longer move (StableMoE, 2204.08396).

In the first part of the training tokens are routed by the gate, and a small router of token ids (an embedding of the id
against one per expert) learns the gate's first choice by cross-entropy. Then its choice is written down once for every
id, and nothing moves it any more; the gate's probability of the chosen experts still weighs, and learns. The paper
weighs K = 1 by a sigmoid; so is it here, and by a softmax over the chosen for more.
"""

import torch

from moe_runtime.router.face import NO_EXPERT, Moment, Tokens
from moe_runtime.router.noise import seeded
from moe_runtime.router.picks import Kind, Picks, ids_of, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best


class Cached(Kind):
    """since: part of the training after which routes are kept; a server has them kept."""

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        vocab_size: int,
        width: int,
        since: float,
        distill_coeff: float,
        layer_idx: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.since, self.distill_coeff = num_experts, top_k, since, distill_coeff
        self.scores = Scores("Sigmoid", renormalise=False) if top_k == 1 else Scores()
        generator = seeded(seed, layer_idx)
        self.word_VC = torch.nn.Parameter(torch.randn(vocab_size, width, generator=generator) / width**0.5)
        self.centroid_EC = torch.nn.Parameter(torch.randn(num_experts, width, generator=generator))
        self.table_VK: torch.Tensor
        self.register_buffer("table_VK", torch.full((vocab_size, top_k), NO_EXPERT, dtype=torch.int32))
        self._coming_VK: torch.Tensor | None = None  # of a step that is not committed yet

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        ids_T = ids_of(tokens, len(self.table_VK))
        logits_TE = logits_of(tokens, self.num_experts)
        score_TE = self.scores.score(logits_TE)
        by_id_TE = self.word_VC[ids_T].float() @ self.centroid_EC.float().T
        losses: dict[str, torch.Tensor] = {}
        self._coming_VK = None  # a step that failed may have left what an older snapshot is not ready for
        if moment.progress < self.since:
            compete_TE = logits_TE.detach()
            expert_TK = best(compete_TE, self.top_k)
            if moment.is_training and self.distill_coeff:
                gap = torch.nn.functional.cross_entropy(by_id_TE, compete_TE.argmax(dim=-1), reduction="sum")
                losses["distill"] = self.distill_coeff * gap / max(1, by_id_TE.shape[0])
        else:
            compete_TE = by_id_TE.detach()
            written_TK = self.table_VK[ids_T].long()
            expert_TK = torch.where(written_TK == NO_EXPERT, best(compete_TE, self.top_k), written_TK)
            if moment.is_training:
                self._coming_VK = self._written_down()
        return Picks(
            expert_TK=expert_TK,
            score_TE=compete_TE,
            weigh=self.scores.weigher(logits_TE, score_TE),
            probability_TE=self.scores.probability(score_TE),
            logits_TE=logits_TE,
            losses=losses,
        )

    def after_step(self, load_E: torch.Tensor) -> None:  # noqa: ARG002  whatever the load
        coming_VK, self._coming_VK = self._coming_VK, None
        if coming_VK is not None:
            self.table_VK.copy_(coming_VK)

    @torch.no_grad()
    def _written_down(self) -> torch.Tensor | None:
        """Every id's experts as the small router has them now; None if they are written already."""
        if int(self.table_VK[0, 0]) != NO_EXPERT:  # device sync
            return None
        by_id_VE = self.word_VC.float() @ self.centroid_EC.float().T
        return by_id_VE.topk(self.top_k, dim=-1).indices.int()
