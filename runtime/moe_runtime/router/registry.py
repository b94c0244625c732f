"""From a config to a layer's router: the one place that knows every kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.contract.router import RouterConfig, why_misfit
from moe_core.contract.router_rules import DEFAULTS, RouterType
from moe_core.outcome import InvalidInput
from moe_runtime.router.assignment import Base
from moe_runtime.router.cached import Cached
from moe_runtime.router.capacity import Capacity
from moe_runtime.router.custom import CustomRouter
from moe_runtime.router.dynamic import AnnealedTopK, TopP
from moe_runtime.router.expert_choice import ExpertChoice
from moe_runtime.router.fixed import ByClass, Frozen
from moe_runtime.router.groups import GroupLimit
from moe_runtime.router.hierarchical import Hierarchical
from moe_runtime.router.layer import LayerRouter, LossTerms
from moe_runtime.router.locality import Locality
from moe_runtime.router.noisy import GumbelTopK, NoisyTopK
from moe_runtime.router.picks import Kind
from moe_runtime.router.scores import Scores
from moe_runtime.router.sinkhorn import Sinkhorn
from moe_runtime.router.soft import SoftMoE
from moe_runtime.router.table import ByPosition, Hash, balanced_table, random_table
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
    seed: int

    def option(self, name: str) -> Any:
        value = getattr(self.config, name)
        return DEFAULTS.get(name) if value is None else value

    @property
    def num_ids(self) -> int:
        """The number of token ids. Raises InvalidInput where nobody said it."""
        if self.vocab_size is None:
            raise InvalidInput(f"router {self.config.type}: routes by token id need vocab_size (got None)")
        return self.vocab_size

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
        if bias is None:
            return None
        by_domain = self.option("locality_by") == "Domain"
        return Locality(num_experts=self.num_experts, bias=bias, budget=budget, by_domain=by_domain)


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
        is_capped=recipe.config.expert_capacity_factor is not None,
    )


def _switch(recipe: Recipe) -> Kind:
    return TopK(
        num_experts=recipe.num_experts,
        top_k=1,
        scores=Scores(before=True, renormalise=False),
        locality=recipe.locality,
        expert_dropout=recipe.option("expert_dropout") or 0.0,
        is_capped=recipe.config.expert_capacity_factor is not None,
    )


def _hierarchical(recipe: Recipe) -> Kind:
    num_groups, group_topk = recipe.config.num_groups, recipe.config.group_topk
    assert num_groups is not None and group_topk is not None, "the config's rules ask for both"
    return Hierarchical(
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        dim=recipe.dim,
        num_groups=num_groups,
        group_topk=group_topk,
        group_loss_coeff=recipe.option("group_aux_loss_coeff") or 0.0,
        layer_idx=recipe.layer_idx,
        seed=recipe.seed,
    )


def _hash(recipe: Recipe) -> Kind:
    vocab_size, count_V = recipe.num_ids, recipe.token_counts_V
    seed, layer_idx = recipe.option("seed"), recipe.layer_idx
    num_experts, top_k = recipe.num_experts, recipe.top_k
    table_VK = None
    if recipe.option("hash_table") == "Random":
        table_VK = random_table(
            num_experts=num_experts, top_k=top_k, vocab_size=vocab_size, seed=seed, layer_idx=layer_idx
        )
    elif count_V is not None:
        if count_V.shape[0] != vocab_size:
            raise InvalidInput(f"token counts are one per id, {vocab_size} (got {count_V.shape[0]})")
        table_VK = balanced_table(count_V, num_experts=num_experts, top_k=top_k, seed=seed, layer_idx=layer_idx)
    return Hash(num_experts=num_experts, top_k=top_k, vocab_size=vocab_size, table_VK=table_VK)


def _heuristic(recipe: Recipe) -> Kind:
    if recipe.config.heuristic == "Position":
        return ByPosition(num_experts=recipe.num_experts, top_k=recipe.top_k)
    return ByClass(num_experts=recipe.num_experts, top_k=recipe.top_k, num_classes=recipe.config.classes)


KINDS: dict[RouterType, Callable[[Recipe], Kind]] = {
    "TopK": _top_k,
    "Switch": _switch,
    "NoisyTopK": lambda r: NoisyTopK(
        num_experts=r.num_experts, top_k=r.top_k, dim=r.dim, load_loss_coeff=r.option("load_loss_coeff") or 0.0
    ),
    "GumbelTopK": lambda r: GumbelTopK(num_experts=r.num_experts, top_k=r.top_k, noise_scale=r.option("gumbel_scale")),
    "TopP": lambda r: TopP(
        num_experts=r.num_experts, top_p=r.option("top_p"), max_k=r.option("max_k") or r.num_experts
    ),
    "AnnealedTopK": lambda r: AnnealedTopK(
        num_experts=r.num_experts,
        top_k=r.top_k,
        start_k=r.option("start_k") or r.num_experts,
        until=r.option("anneal_until_percent") / 100,
        scores=r.scores,
    ),
    "Hierarchical": _hierarchical,
    "ExpertChoice": lambda r: ExpertChoice(
        num_experts=r.num_experts, top_k=r.top_k, factor=r.option("expert_capacity_factor") or 1.0
    ),
    "SoftMoE": lambda r: SoftMoE(
        num_experts=r.num_experts,
        dim=r.dim,
        rows=r.option("rows_per_expert"),
        normalised=r.option("soft_normalize"),
        layer_idx=r.layer_idx,
        seed=r.seed,
    ),
    "Sinkhorn": lambda r: Sinkhorn(
        num_experts=r.num_experts,
        top_k=r.top_k,
        tolerance=r.option("sinkhorn_tolerance"),
        iterations=r.option("sinkhorn_iterations"),
    ),
    "Base": lambda r: Base(num_experts=r.num_experts),
    "Hash": _hash,
    "Heuristic": _heuristic,
    "Frozen": lambda r: Frozen(
        num_experts=r.num_experts,
        top_k=r.top_k,
        dim=r.dim,
        scores=r.scores,
        seed=r.option("seed") if r.option("frozen_gate") == "Random" else None,
        layer_idx=r.layer_idx,
    ),
    "Cached": lambda r: Cached(
        num_experts=r.num_experts,
        top_k=r.top_k,
        vocab_size=r.num_ids,
        width=r.option("cached_dim"),
        since=r.option("cached_from_percent") / 100,
        distill_coeff=r.option("distill_loss_coeff"),
        layer_idx=r.layer_idx,
        seed=r.seed,
    ),
}
"""Every type but Custom, which is no kind: its class answers with a whole routing."""


def build_router(
    config: RouterConfig,
    *,
    num_experts: int,
    top_k: int,
    dim: int,
    layer_idx: int,
    vocab_size: int | None = None,
    token_counts_V: torch.Tensor | None = None,
    seed: int = 0,
) -> LayerRouter | CustomRouter:
    """The router of MoE layer `layer_idx`: `top_k` of `num_experts` per token, tokens of width `dim`.

    Tables and fixed gates are drawn from the config's seed, what is learned begins at `seed`; both by layer and nothing
    else, so that all ranks build the same.
    vocab_size is needed by routes per token id, token_counts_V [V] (how often each id occurs) by a balanced hash.
    Raises InvalidInput when router and model do not fit.
    """
    if problems := why_misfit(config, num_experts=num_experts, top_k=top_k):
        raise InvalidInput(f"router {config.type}: {'; '.join(problems)}")
    if config.class_path is not None:
        return CustomRouter(
            config.class_path,
            num_experts=num_experts,
            top_k=top_k,
            dim=dim,
            layer_idx=layer_idx,
            options=config.options or {},
        )
    recipe = Recipe(config, num_experts, top_k, dim, layer_idx, vocab_size, token_counts_V, seed)
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
