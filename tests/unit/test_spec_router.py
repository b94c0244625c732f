"""spec.model.router says what RouterConfig says, in the words of a custom resource."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from cases.documents import JOB
from moe_core.contract.router import LocalityConfig, RouterConfig
from moe_core.contract.router_rules import DEFAULTS, OPTIONS_OF, RouterType
from moe_core.decide.accept import Accepted, Refusal, accept
from moe_core.facts import Facts, Wish
from moe_core.outcome import InvalidSpec
from moe_core.spec.load import parse_spec
from moe_core.spec.router import DECIMALS, RouterSpec
from simcluster import service_spec

VALUES: dict[str, Any] = {
    **DEFAULTS,
    **dict.fromkeys(DECIMALS, 0.5),
    "norm_topk_prob": True,
    "class_path": "mine:Router",
    "options": {"a": "b"},
    "heuristic": "Class",
    "class_capacity_percents": (30, 70),
    "class_first_ids": (128,),
}
OTHERS: dict[str, Any] = {
    "score_function": "Sigmoid",
    "pre_softmax": True,
    "group_by": "Device",
    "enable_expert_bias": True,
    "heuristic": "Position",
    "frozen_gate": "Model",
    "overflow": "Queue",
    "class_capacity_percents": (30, 30),
    "class_first_ids": (200, 100),
    "num_classes": 3,
}
NAMES = sorted(set(RouterConfig.model_fields) - {"type"})


def options() -> st.SearchStrategy[dict[str, Any]]:
    def drawn(names: list[str], others: set[str]) -> dict[str, Any]:
        given = {name: VALUES.get(name, 4) for name in names}
        return given | {name: OTHERS[name] for name in names if name in others and name in OTHERS}

    return st.builds(drawn, st.lists(st.sampled_from(NAMES), unique=True, max_size=6), st.sets(st.sampled_from(NAMES)))


def wire(given: dict[str, Any]) -> dict[str, Any]:
    return {to_camel(name): _plain(name, value) for name, value in given.items()}


def _plain(name: str, value: Any) -> Any:
    return f"{value:g}" if name in DECIMALS else list(value) if isinstance(value, tuple) else value


def test_the_spec_has_every_option_and_no_other() -> None:
    assert list(RouterSpec.model_fields) == list(RouterConfig.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_is(name: str) -> None:
    assert RouterSpec.model_fields[name].description


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(get_args(RouterType)), options())
def test_the_spec_takes_what_the_runtime_takes_and_nothing_else(kind: RouterType, given: dict[str, Any]) -> None:
    needs_classes = given.get("heuristic") == "Class" or "class_capacity_percents" in given
    try:
        expected = RouterConfig(type=kind, **given)
        if needs_classes and "class_first_ids" not in given:
            raise InvalidSpec([])  # the spec's own: nobody else says there what class a token is of
    except (ValidationError, InvalidSpec):
        with pytest.raises(InvalidSpec):
            parse_spec(RouterSpec, {"type": kind, **wire(given)})
    else:
        assert parse_spec(RouterSpec, {"type": kind, **wire(given)}).config() == expected


@pytest.mark.parametrize("kind", get_args(RouterType))
def test_an_option_of_another_type_is_refused_with_the_types_that_use_it(kind: RouterType) -> None:
    for name in set(NAMES) - OPTIONS_OF[kind]:
        with pytest.raises(InvalidSpec, match=f"{to_camel(name)} is used by type "):
            parse_spec(RouterSpec, {"type": kind, **wire({name: VALUES.get(name, 4)})})


def _accept(router: dict[str, Any]) -> Accepted | Refusal:
    spec = {**JOB["spec"], "model": {**JOB["spec"]["model"], "router": router}}
    return accept(Wish("MoEJob", "d", "tiny", "u", 1, spec), Facts())


def test_the_ranks_are_told_the_router() -> None:
    accepted = _accept({"type": "TopK", "scoreFunction": "Sigmoid", "enableExpertBias": True, "biasUpdateRate": "1e-2"})
    assert isinstance(accepted, Accepted)
    assert accepted.plan.config.router == RouterConfig(
        type="TopK", score_function="Sigmoid", enable_expert_bias=True, bias_update_rate=0.01
    )


def test_a_router_that_does_not_fit_the_model_is_refused_before_any_pod_in_the_words_of_the_spec() -> None:
    refused = _accept({"type": "TopK", "numGroups": 3, "groupTopk": 1})
    assert isinstance(refused, Refusal)
    assert "spec.model.router: numGroups must divide the number of experts (got 3 and 16)" in refused.message


def test_a_services_ranks_are_told_how_near_experts_are_preferred() -> None:
    spec = service_spec()
    near = {**spec, "experts": {**spec["experts"], "locality": {"bias": "0.5", "budgetPercent": 10}}}
    for told, expected in ((spec, None), (near, LocalityConfig(bias=0.5, budget_percent=10))):
        accepted = accept(Wish("MoEService", "d", "tiny", "u", 1, told), Facts())
        assert isinstance(accepted, Accepted) and accepted.plan.config.serving is not None
        assert accepted.plan.config.serving.locality == expected
