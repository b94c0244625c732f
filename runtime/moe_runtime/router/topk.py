"""The plain routers: each token takes its K best experts.

Switch (2101.03961) is K = 1 with the probability as weight; Mixtral, Qwen3, OLMoE and DeepSeek differ in what turns
logits into weights (`scores`), in groups (`groups`) and in the balancing bias:

auxiliary-loss-free balancing (2408.15664): a bias is added to the scores for the choice only, never to the weights, and
after each step moves by a fixed rate up for experts below the mean load and down for those above.
"""

import torch

from moe_runtime.kernels.choose import runs_triton
from moe_runtime.kernels.gate import GateRule, gate
from moe_runtime.router.face import NO_EXPERT, Layout, Moment, Tokens
from moe_runtime.router.groups import GroupLimit
from moe_runtime.router.locality import Locality
from moe_runtime.router.noise import uniform
from moe_runtime.router.picks import Kind, Picks, logits_of
from moe_runtime.router.scores import Scores


def best(compete_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """expert_TK, the best first; NO_EXPERT where fewer than K are in reach (-inf is out of reach)."""
    value_TK, expert_TK = compete_TE.topk(top_k, dim=-1)
    return expert_TK.masked_fill(value_TK == float("-inf"), NO_EXPERT)


class TopK(Kind):
    """expert_dropout leaves whole experts out of a training step's choice (MoEC, 2207.09094), the same for all tokens
    of this rank and never so many that fewer than K remain. Dropout inside the experts is the model's, not a router's.
    is_capped: a capacity comes after it.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        scores: Scores,
        groups: GroupLimit | None = None,
        locality: Locality | None = None,
        bias_update_rate: float = 0.0,
        expert_dropout: float = 0.0,
        is_capped: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.scores = num_experts, top_k, scores
        self.groups, self.locality, self.is_capped = groups, locality, is_capped
        self.bias_update_rate, self.expert_dropout = bias_update_rate, expert_dropout
        self.bias_E: torch.Tensor | None
        self.register_buffer("bias_E", torch.zeros(num_experts) if bias_update_rate else None)

    def rule(self) -> GateRule | None:
        """What the kernel is to do; None: this router does what the kernel does not."""
        groups = self.groups
        if self.locality is not None or (groups is not None and groups.by_device):
            return None
        if self.scores.function == "SqrtSoftplus":
            return None
        num_groups = groups.holds_GE.shape[0] if groups is not None else 1
        over_chosen = self.scores.function == "Softmax" and (self.scores.renormalise or not self.scores.before)
        return GateRule(
            top_k=self.top_k,
            function=self.scores.function,
            over_chosen=over_chosen,
            renormalise=self.scores.renormalise and not over_chosen,
            scale=self.scores.scale,
            num_groups=num_groups,
            group_topk=min(num_groups, groups.group_topk) if groups is not None else 1,
            group_best=min(groups.best, self.num_experts // num_groups) if groups is not None else 1,
        )

    def forward(self, tokens: Tokens, moment: Moment) -> Picks:
        logits_TE = logits_of(tokens, self.num_experts)
        rule = self.rule() if runs_triton(logits_TE) and self._needs_picks_alone(moment) else None
        if rule is not None:
            expert_TK, weight_TK, _ = gate(logits_TE, rule, self.bias_E)
            probability_TE = None
            if moment.is_training:
                probability_TE = self.scores.probability(self.scores.score(logits_TE))
            return Picks(expert_TK, logits_TE.detach(), lambda _: weight_TK, probability_TE, logits_TE)
        score_TE = self.scores.score(logits_TE)
        with torch.no_grad():
            compete_TE = score_TE if self.bias_E is None else score_TE + self.bias_E
            if self.groups is not None:
                compete_TE = compete_TE.masked_fill(~self.groups.reach(compete_TE), float("-inf"))
            if self.expert_dropout and moment.is_training:
                compete_TE = compete_TE.masked_fill(self._left_out(moment, score_TE.device), float("-inf"))
            if self.locality is None:
                expert_TK = best(compete_TE, self.top_k)
            else:
                expert_TK = self.locality.choose(compete_TE, score_TE, lambda by_TE: best(by_TE, self.top_k))
        return Picks(
            expert_TK=expert_TK,
            score_TE=score_TE.detach().masked_fill(compete_TE == float("-inf"), float("-inf")),
            weigh=self.scores.weigher(logits_TE, score_TE),
            probability_TE=self.scores.probability(score_TE),
            logits_TE=logits_TE,
        )

    def _needs_picks_alone(self, moment: Moment) -> bool:
        """Nobody will ask how another choice would weigh, nor is anybody left out of this one."""
        if self.is_capped and moment.looks_at_batch:
            return False
        return not (self.expert_dropout and moment.is_training)

    def use_layout(self, layout: Layout) -> None:
        for part in (self.groups, self.locality):
            if part is not None:
                part.use_layout(layout)

    def after_step(self, load_E: torch.Tensor) -> None:
        if self.bias_E is not None:
            load_E = load_E.to(self.bias_E.device)
            # compared as load * E against the sum: exact in integers, so that all ranks move alike
            self.bias_E += self.bias_update_rate * (load_E.sum() - load_E * self.num_experts).sign()

    def _left_out(self, moment: Moment, device: torch.device) -> torch.Tensor:
        draw_E = uniform(moment, self.num_experts, device=device)
        spared_K = draw_E.topk(self.top_k).indices
        return (draw_E < self.expert_dropout).index_fill(0, spared_K, False)
