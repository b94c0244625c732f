"""From a config to a layer's router: the one place that knows every kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.contract.router import RouterConfig, why_misfit
from moe_core.contract.router_rules import DEFAULTS, RouterType
from moe_core.outcome import InvalidInput
from moe_runtime.router.capacity import Capacity
from moe_runtime.router.groups import GroupLimit
from moe_runtime.router.layer import LayerRouter, LossTerms
from moe_runtime.router.locality import Locality
from moe_runtime.router.picks import Kind
from moe_runtime.router.scores import Scores
from moe_runtime.router.topk import TopK

LOSSES = {
    "aux": "aux_loss_coeff",
    "importance": "importance_loss_coeff",
    "z": "z_loss_coeff",
    "entropy": "entropy_loss_coeff",
}
"""Name in `Routing.losses` -> option."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a kind is built from. `option` gives what somebody gave, else the default."""

    config: RouterConfig
    num_experts: int
    top_k: int
    dim: int
    layer_idx: int
    vocab_size: int | None
    token_counts_V: torch.Tensor | None

    def option(self, name: str) -> Any:
        value = getattr(self.config, name)
        return DEFAULTS.get(name) if value is None else value

    @property
    def scores(self) -> Scores:
        return Scores(
            function=self.option("score_function"),
            before=self.option("pre_softmax"),
            renormalise=self.config.renormalises,
            scale=self.option("topk_scaling_factor"),
        )

    @property
    def locality(self) -> Locality | None:
        bias, budget = self.option("locality_bias"), self.option("locality_budget_percent") / 100
        return Locality(num_experts=self.num_experts, bias=bias, budget=budget) if bias is not None else None


def _top_k(recipe: Recipe) -> Kind:
    groups = None
    if recipe.config.group_topk is not None:
        groups = GroupLimit(
            num_experts=recipe.num_experts,
            num_groups=recipe.config.num_groups,
            group_topk=recipe.config.group_topk,
            group_score=recipe.option("group_score"),
        )
    return TopK(
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        scores=recipe.scores,
        groups=groups,
        locality=recipe.locality,
        bias_update_rate=recipe.option("bias_update_rate") if recipe.option("enable_expert_bias") else 0.0,
        expert_dropout=recipe.option("expert_dropout") or 0.0,
    )


def _switch(recipe: Recipe) -> Kind:
    return TopK(
        num_experts=recipe.num_experts,
        top_k=1,
        scores=Scores(before=True, renormalise=False),
        locality=recipe.locality,
        expert_dropout=recipe.option("expert_dropout") or 0.0,
    )


KINDS: dict[RouterType, Callable[[Recipe], Kind]] = {
    "TopK": _top_k,
    "Switch": _switch,
}


def build_router(
    config: RouterConfig,
    *,
    num_experts: int,
    top_k: int,
    dim: int,
    layer_idx: int,
    vocab_size: int | None = None,
    token_counts_V: torch.Tensor | None = None,
) -> LayerRouter:
    """The router of MoE layer `layer_idx`: `top_k` of `num_experts` per token, tokens of width `dim`.

    What is drawn at random comes from the config's seed and the layer alone, so that all ranks build the same.
    vocab_size is needed by routes per token id, token_counts_V [V] (how often each id occurs) by a balanced hash.
    Raises InvalidInput when router and model do not fit.
    """
    if problems := why_misfit(config, num_experts=num_experts, top_k=top_k):
        raise InvalidInput(f"router {config.type}: {'; '.join(problems)}")
    recipe = Recipe(config, num_experts, top_k, dim, layer_idx, vocab_size, token_counts_V)
    capacity = None
    if config.expert_capacity_factor is not None and config.type != "ExpertChoice":
        capacity = Capacity(
            num_experts=num_experts,
            factor=config.expert_capacity_factor,
            first=recipe.option("token_drop_policy"),
            overflow=recipe.option("overflow"),
            passes=recipe.option("queue_passes"),
            keep_sum=recipe.option("norm_kept_prob"),
            decay=config.adaptive_capacity_decay,
            class_shares=tuple(percent / 100 for percent in config.class_capacity_percents or (100,)),
        )
    target = config.aux_loss_target_percent
    losses = LossTerms(
        scope=recipe.option("load_balancing_type"),
        coefficients={name: getattr(config, option) or 0.0 for name, option in LOSSES.items()},
        target=None if target is None else target / 100,
        rate=recipe.option("aux_loss_adapt_rate"),
    )
    return LayerRouter(
        KINDS[config.type](recipe), losses=losses, capacity=capacity, jitter_eps=config.input_jitter_eps or 0.0
    )
