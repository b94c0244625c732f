"""A router's options: whoever gives one that would do nothing is told so."""

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from moe_core.contract.router import RouterConfig, why_misfit
from moe_core.contract.router_rules import CLASHES, DEFAULTS, NEEDS, OPTIONS_OF, RouterType
from moe_core.outcome import InvalidInput

FIELDS = set(RouterConfig.model_fields) - {"type"}
DEEPSEEK_V3 = RouterConfig(
    type="TopK",
    score_function="Sigmoid",
    topk_scaling_factor=2.5,
    num_groups=8,
    group_topk=4,
    enable_expert_bias=True,
    aux_loss_coeff=0.0001,
    load_balancing_type="SeqAuxLoss",
)


def test_the_tables_name_every_type_and_only_options_that_exist() -> None:
    assert set(OPTIONS_OF) == set(get_args(RouterType))
    assert set().union(*OPTIONS_OF.values()) == FIELDS
    named = {*DEFAULTS, *NEEDS, *CLASHES, *(other for needs in NEEDS.values() for other, _ in needs)}
    assert named | {other for clashes in CLASHES.values() for other, _ in clashes} <= FIELDS


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_a_value_that_could_be_given(name: str) -> None:
    annotation = RouterConfig.model_fields[name].annotation
    assert annotation is not None
    assert TypeAdapter(annotation).validate_python(DEFAULTS[name], strict=True) == DEFAULTS[name]


def test_options_of_a_known_model_go_together_and_survive_the_wire() -> None:
    assert RouterConfig.parse(DEEPSEEK_V3.canonical()) == DEEPSEEK_V3
    assert why_misfit(DEEPSEEK_V3, num_experts=256, top_k=8) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"type": "Hash", "top_p": 0.5}, "top_p is not used by Hash, but by TopP (got 0.5)"),
        ({"type": "TopK", "num_groups": 4}, "num_groups needs group_topk"),
        ({"type": "TopK", "group_topk": 2}, "group_topk needs num_groups or group_by Device"),
        ({"type": "TopK", "norm_topk_prob": True}, "norm_topk_prob needs pre_softmax True or score_function Sigmoid"),
        ({"type": "TopK", "overflow": "Drop"}, "overflow needs expert_capacity_factor"),
        (
            {"type": "TopK", "expert_capacity_factor": 1.0, "overflow": "Drop", "queue_passes": 3},
            "queue_passes needs overflow Queue",
        ),
        (
            {"type": "TopK", "pre_softmax": True, "score_function": "Sigmoid"},
            "pre_softmax means nothing with score_function Sigmoid",
        ),
        ({"type": "Frozen", "frozen_gate": "Model", "seed": 3}, "seed means nothing with frozen_gate Model"),
        ({"type": "Custom"}, "Custom needs class_path"),
        (
            {"type": "TopK", "expert_capacity_factor": 1.0, "class_capacity_percents": (60, 60)},
            "class_capacity_percents must sum to 100 (got [60, 60])",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_with_its_reason(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        RouterConfig(**options)
    assert text in str(caught.value)


def test_a_config_from_the_wire_is_refused_by_the_same_rules() -> None:
    with pytest.raises(InvalidInput, match="top_p is not used by Hash"):
        RouterConfig.parse('{"type": "Hash", "top_p": 0.5}')


@pytest.mark.parametrize(
    ("config", "num_experts", "top_k", "text"),
    [
        (DEEPSEEK_V3, 60, 4, "num_groups must divide the number of experts (got 8 and 60)"),
        (DEEPSEEK_V3, 8, 6, "group_topk 4 leaves a token 4 experts; it takes 6"),
        (RouterConfig(type="TopK"), 8, 1, "a single expert's weight would always be 1"),
        (RouterConfig(type="TopK"), 8, 9, "top_k 9 exceeds the number of experts 8"),
        (RouterConfig(type="AnnealedTopK", start_k=9), 8, 2, "start_k must lie between"),
        (RouterConfig(type="Heuristic", heuristic="Class", num_classes=5), 8, 2, "num_classes 5 leaves a class"),
        (RouterConfig(type="Hierarchical", num_groups=4, group_topk=2), 8, 3, "group_topk must divide"),
    ],
)
def test_a_router_that_does_not_fit_the_model_says_why(
    config: RouterConfig, num_experts: int, top_k: int, text: str
) -> None:
    assert any(text in problem for problem in why_misfit(config, num_experts=num_experts, top_k=top_k))
