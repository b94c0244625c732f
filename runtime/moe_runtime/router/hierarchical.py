"""Two tiers: first groups of experts (nodes), then experts inside them (SMILE, 2212.05191; Shazeer 2017, appendix B).

A gate of its own chooses `group_topk` groups, the model's gate the same number of experts in each of them. With p the
softmax over groups and q the softmax inside a group, an expert's weight is p * q, and p * q over all experts sums to 1.
A token is sent to at most `group_topk` nodes whatever its experts are. SMILE balances both tiers: the group loss evens
groups, the balance loss over p * q experts.

Suffixes: H groups that a token takes, e experts of a group.
"""

import torch

from moe_runtime.router.face import Moment, Tokens
from moe_runtime.router.losses import switch_loss
from moe_runtime.router.noise import seeded
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import best


class Hierarchical(Kind):
    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        dim: int,
        num_groups: int,
        group_topk: int,
        group_loss_coeff: float,
        layer_idx: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.num_groups, self.group_topk = num_experts, top_k, num_groups, group_topk
        self.group_loss_coeff = group_loss_coeff
        self.scores = Scores(before=True, renormalise=False)
        drawn_GD = torch.randn(num_groups, dim, generator=seeded(seed, layer_idx))
        self.group_gate_GD = torch.nn.Parameter(0.02 * drawn_GD)

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        num_tokens, per_group = logits_TE.shape[0], self.num_experts // self.num_groups
        group_logits_TG = tokens.x_TD.to(logits_TE.dtype) @ self.group_gate_GD.to(logits_TE.dtype).T
        p_TG = group_logits_TG.softmax(dim=-1)
        q_TGe = logits_TE.view(num_tokens, self.num_groups, per_group).softmax(dim=-1)
        score_TE = (p_TG[:, :, None] * q_TGe).flatten(1)
        group_TH = best(p_TG.detach(), self.group_topk)
        each = self.top_k // self.group_topk
        chosen_THe = q_TGe.detach().gather(1, group_TH[:, :, None].expand(-1, -1, per_group))
        expert_TK = (group_TH[:, :, None] * per_group + chosen_THe.topk(each, dim=-1).indices).flatten(1)
        losses: dict[str, torch.Tensor] = {}
        if moment.is_training and self.group_loss_coeff:
            losses["group_aux"] = self.group_loss_coeff * switch_loss(p_TG, group_TH)
        in_reach_TG = torch.zeros_like(p_TG, dtype=torch.bool).scatter_(1, group_TH, True)
        in_reach_TE = in_reach_TG.repeat_interleave(per_group, dim=1)
        return Picks(
            expert_TK=expert_TK,
            score_TE=score_TE.detach().masked_fill(~in_reach_TE, float("-inf")),
            weigh=self.scores.weigher(score_TE, score_TE),
            probability_TE=score_TE,
            logits_TE=logits_TE,
            losses=losses,
        )
