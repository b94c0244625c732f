"""From a gate's logits to each token's experts, their weights and the load, for routers that choose by score alone.

Scores by softmax or sigmoid; a bias moves the choice and never the weight (auxiliary-loss-free balancing, 2408.15664);
the choice may be limited to the best groups of neighbouring experts (DeepSeek-V2 2405.04434 by a group's best, V3
2412.19437 by the sum of its two best). Everything is float32 whatever the logits' precision.

Experts compete by their logits where only a monotone score stands between, else by score plus bias; among equals the
lower id wins, so the same logits give the same experts everywhere. NaN wins against all: ids are always experts.

Suffixes: T tokens, E experts, G groups, J = E / G experts of a group, K picks of a token.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.kernels.choose import runs_triton

ScoreFunction = Literal["Softmax", "Sigmoid"]

TINY = 1e-20
"""Added to the sum that weights are divided by: scores that all underflowed give zeros."""


@dataclass(frozen=True, slots=True)
class GateRule:
    """How logits become picks.

    function        what turns logits into scores
    over_chosen     softmax over the chosen experts alone, for the weights (the same as softmax over all, divided by the
                    sum of the chosen); of Softmax only
    renormalise     weights are divided by their sum, without over_chosen, where they sum to one already
    scale           weights are multiplied by it last
    num_groups      groups of neighbouring experts, of which a token uses the `group_topk` best
    group_best      a group competes by the sum of so many of its best (1 or 2)
    """

    top_k: int
    function: ScoreFunction = "Softmax"
    over_chosen: bool = False
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    group_topk: int = 1
    group_best: int = 2

    def check(self, num_experts: int) -> None:
        """Raises InvalidInput when a layer of so many experts cannot have this rule."""
        if self.num_groups < 1 or num_experts % self.num_groups or not 1 <= self.group_topk <= self.num_groups:
            raise InvalidInput(
                f"num_groups must divide the experts and group_topk be one of 1..num_groups (got {self.num_groups} and "
                f"{self.group_topk} for {num_experts} experts)"
            )
        of_group = num_experts // self.num_groups
        if not 1 <= self.top_k <= self.group_topk * of_group:
            raise InvalidInput(
                f"top_k must be one of 1..{self.group_topk * of_group}, the experts of {self.group_topk} of "
                f"{self.num_groups} groups (got {self.top_k})"
            )
        if self.is_grouped and not 1 <= self.group_best <= min(2, of_group):
            raise InvalidInput(f"group_best must be 1 or 2 of a group's {of_group} experts (got {self.group_best})")
        if self.over_chosen and (self.function != "Softmax" or self.renormalise):
            raise InvalidInput("over_chosen is of Softmax and sums to one already: not with Sigmoid or renormalise")

    @property
    def is_grouped(self) -> bool:
        return self.group_topk < self.num_groups


def gate(
    logits_TE: torch.Tensor, rule: GateRule, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(expert_TK int64, weight_TK float32, count_E int64); best pick first, weights with a gradient to the logits.

    Raises InvalidInput, see `GateRule.check`.
    """
    rule.check(logits_TE.shape[1])
    if bias_E is not None and bias_E.shape != logits_TE.shape[1:]:
        raise InvalidInput(f"bias must be [{logits_TE.shape[1]}] as the experts are (got {list(bias_E.shape)})")
    if runs_triton(logits_TE):
        if not (torch.is_grad_enabled() and logits_TE.requires_grad):  # autograd's way costs the host a launch more
            from moe_runtime.kernels.gate_triton import gate_forward

            return gate_forward(logits_TE, rule, bias_E)
        chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Gate.apply(logits_TE, rule, bias_E)
        return chosen
    return gate_reference(logits_TE, rule, bias_E)


def gate_reference(
    logits_TE: torch.Tensor, rule: GateRule, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in plain torch, whatever the device."""
    logits_TE = logits_TE.float()
    score_TE = logits_TE.softmax(dim=-1) if rule.function == "Softmax" else logits_TE.sigmoid()
    with torch.no_grad():
        choice_TE = (
            logits_TE if bias_E is None and not rule.is_grouped else score_TE + (0 if bias_E is None else bias_E)
        )
        if rule.is_grouped:
            choice_TGJ = torch.stack(choice_TE.chunk(rule.num_groups, dim=1), dim=1)
            group_TG = choice_TGJ.topk(rule.group_best, dim=-1).values.sum(dim=-1)
            is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, _best(group_TG, rule.group_topk), False)
            choice_TE = choice_TGJ.masked_fill(is_out_TG.unsqueeze(-1), float("-inf")).flatten(1)
        expert_TK = _best(choice_TE, rule.top_k)
        count_E = torch.bincount(expert_TK.reshape(-1), minlength=logits_TE.shape[1])
    if rule.over_chosen:
        weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
    else:
        weight_TK = score_TE.gather(1, expert_TK)
        if rule.renormalise:
            weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + TINY)
    return expert_TK, weight_TK * rule.scale, count_E


def _best(score: torch.Tensor, count: int) -> torch.Tensor:
    """Indices along the last dim; torch's own topk takes any of equals."""
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :count]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, rule: GateRule, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from moe_runtime.kernels.gate_triton import gate_forward

        expert_TK, weight_TK, count_E = gate_forward(logits_TE.detach(), rule, bias_E)
        ctx.save_for_backward(logits_TE, expert_TK)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_TK, count_E)
        return expert_TK, weight_TK, count_E

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Any, grad_TK: torch.Tensor, __: Any) -> tuple[torch.Tensor | None, ...]:
        from moe_runtime.kernels.gate_triton import gate_backward

        logits_TE, expert_TK = ctx.saved_tensors
        return gate_backward(grad_TK, logits_TE, expert_TK, ctx.rule), None, None
