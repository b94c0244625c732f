"""Which options each type of router uses, what they are where nobody gives them, and which go together.

One table for all who ask: the spec's rules are made from it, the runtime's config is checked by it, the docs are held
against it.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

RouterType = Literal[
    "TopK",
    "Switch",
    "NoisyTopK",
    "GumbelTopK",
    "TopP",
    "AnnealedTopK",
    "Hierarchical",
    "ExpertChoice",
    "SoftMoE",
    "Sinkhorn",
    "Base",
    "Hash",
    "Heuristic",
    "Frozen",
    "Cached",
    "Custom",
]

_SCORE = {"score_function", "pre_softmax", "norm_topk_prob", "topk_scaling_factor"}
_GROUPS = {"num_groups", "group_topk", "group_score", "group_by"}
_BIAS = {"enable_expert_bias", "bias_update_rate"}
_LOCALITY = {"locality_bias", "locality_by", "locality_budget_percent"}
_CAPACITY = {
    *("expert_capacity_factor", "token_drop_policy", "overflow", "queue_passes", "norm_kept_prob"),
    *("adaptive_capacity_decay", "class_capacity_percents", "class_first_ids"),
}
_BALANCE = {
    *("load_balancing_type", "aux_loss_coeff", "aux_loss_target_percent", "aux_loss_adapt_rate"),
    *("importance_loss_coeff", "z_loss_coeff"),
}
_TRAINED = _CAPACITY | _BALANCE | {"input_jitter_eps"}

OPTIONS_OF: Mapping[RouterType, frozenset[str]] = {
    "TopK": frozenset(_SCORE | _GROUPS | _BIAS | _LOCALITY | _TRAINED | {"expert_dropout"}),
    "Switch": frozenset(_LOCALITY | _TRAINED | {"expert_dropout"}),
    "NoisyTopK": frozenset(_TRAINED | {"load_loss_coeff"}),
    "GumbelTopK": frozenset(_TRAINED | {"gumbel_scale"}),
    "TopP": frozenset(_TRAINED | {"top_p", "max_k", "entropy_loss_coeff"}),
    "AnnealedTopK": frozenset(_SCORE | _TRAINED | {"start_k", "anneal_until_percent"}),
    "Hierarchical": frozenset(_TRAINED | {"num_groups", "group_topk", "group_aux_loss_coeff"}),
    "ExpertChoice": frozenset({"expert_capacity_factor", "input_jitter_eps", "z_loss_coeff"}),
    "SoftMoE": frozenset({"rows_per_expert", "soft_normalize"}),
    "Sinkhorn": frozenset(
        _CAPACITY | {"sinkhorn_tolerance", "sinkhorn_iterations", "input_jitter_eps", "z_loss_coeff"}
    ),
    "Base": frozenset({"z_loss_coeff"}),
    "Hash": frozenset(_CAPACITY | {"hash_table", "seed"}),
    "Heuristic": frozenset(_CAPACITY | _BALANCE | {"heuristic", "num_classes"}),
    "Frozen": frozenset(_SCORE | _CAPACITY | {"frozen_gate", "seed"}),
    "Cached": frozenset(_TRAINED | {"cached_from_percent", "cached_dim", "distill_loss_coeff"}),
    "Custom": frozenset({"class_path", "options"}),
}
"""Options that each type uses; any other is refused."""

DEFAULTS: Mapping[str, Any] = {
    "score_function": "Softmax",
    "pre_softmax": False,
    "topk_scaling_factor": 1.0,
    "group_score": "Top2Sum",
    "group_by": "Index",
    "enable_expert_bias": False,
    "bias_update_rate": 0.001,
    "gumbel_scale": 1.0,
    "top_p": 0.4,
    "anneal_until_percent": 50,
    "locality_by": "Pick",
    "locality_budget_percent": 5,
    "rows_per_expert": 1,
    "soft_normalize": True,
    "sinkhorn_tolerance": 0.0001,
    "sinkhorn_iterations": 100,
    "hash_table": "Random",
    "num_classes": 2,
    "frozen_gate": "Random",
    "cached_from_percent": 10,
    "cached_dim": 50,
    "distill_loss_coeff": 0.3,
    "seed": 0,
    "token_drop_policy": "Probs",
    "overflow": "Drop",
    "queue_passes": 4,
    "norm_kept_prob": False,
    "load_balancing_type": "AuxLoss",
    "aux_loss_adapt_rate": 0.02,
}
"""What an option is that nobody gave. An option that is not here is off, or is what its description says."""


REQUIRED_BY: Mapping[RouterType, tuple[str, ...]] = {
    "Hierarchical": ("num_groups",),
    "Heuristic": ("heuristic",),
    "Custom": ("class_path",),
}

GIVEN: Final = None
"""In `NEEDS`: any value will do."""

NEEDS: Mapping[str, tuple[tuple[str, Any], ...]] = {
    "num_groups": (("group_topk", GIVEN),),
    "group_topk": (("num_groups", GIVEN), ("group_by", "Device")),
    "group_score": (("group_topk", GIVEN),),
    "group_by": (("group_topk", GIVEN),),
    "norm_topk_prob": (("pre_softmax", True), ("score_function", "Sigmoid"), ("score_function", "SqrtSoftplus")),
    "bias_update_rate": (("enable_expert_bias", True),),
    "locality_budget_percent": (("locality_bias", GIVEN),),
    "locality_by": (("locality_bias", GIVEN),),
    "num_classes": (("heuristic", "Class"),),
    **dict.fromkeys(sorted(_CAPACITY - {"expert_capacity_factor"}), (("expert_capacity_factor", GIVEN),)),
    "queue_passes": (("overflow", "Queue"),),
    "class_first_ids": (("class_capacity_percents", GIVEN), ("heuristic", "Class")),
    "load_balancing_type": (("aux_loss_coeff", GIVEN),),
    "aux_loss_target_percent": (("aux_loss_coeff", GIVEN),),
    "aux_loss_adapt_rate": (("aux_loss_target_percent", GIVEN),),
}
"""An option means something only beside one of these (option, value)."""

CLASHES: Mapping[str, tuple[tuple[str, Any], ...]] = {
    "pre_softmax": (("score_function", "Sigmoid"), ("score_function", "SqrtSoftplus")),
    "num_groups": (("group_by", "Device"),),
    "seed": (("frozen_gate", "Model"),),
    **dict.fromkeys(sorted(_BALANCE), (("heuristic", "Position"),)),
}
"""An option means nothing beside any of these (option, value)."""


def why_refused(router_type: RouterType, given: Mapping[str, Any]) -> list[str]:
    """Every reason why these options do not go together, in a stable order; empty if they do."""
    problems = [f"{router_type} needs {name}" for name in REQUIRED_BY.get(router_type, ()) if name not in given]
    for name, value in given.items():
        if name not in OPTIONS_OF[router_type]:
            users = ", ".join(kind for kind in get_args(RouterType) if name in OPTIONS_OF[kind])
            problems.append(f"{name} is not used by {router_type}, but by {users} (got {value!r})")
            continue
        needs = NEEDS.get(name, ())
        if needs and not any(_is(given, other, wanted) for other, wanted in needs):
            problems.append(f"{name} needs {' or '.join(_told(*need) for need in needs)}")
        for clash in CLASHES.get(name, ()):
            if _is(given, *clash):
                problems.append(f"{name} means nothing with {_told(*clash)}")
    shares = given.get("class_capacity_percents")
    if shares is not None and sum(shares) != 100:
        problems.append(f"class_capacity_percents must sum to 100 (got {list(shares)})")
    starts = given.get("class_first_ids")
    if starts is not None:
        if list(starts) != sorted(starts):
            problems.append(f"class_first_ids must ascend (got {list(starts)})")
        counted = {"num_classes": given.get("num_classes"), "class_capacity_percents": shares and len(shares)}
        problems += [
            f"class_first_ids makes {len(starts) + 1} classes, {name} has {count}"
            for name, count in counted.items()
            if count is not None and count != len(starts) + 1
        ]
    return problems


def _is(given: Mapping[str, Any], name: str, wanted: Any) -> bool:
    return name in given and (wanted is GIVEN or given[name] == wanted)


def _told(name: str, wanted: Any) -> str:
    return name if wanted is GIVEN else f"{name} {wanted}"
