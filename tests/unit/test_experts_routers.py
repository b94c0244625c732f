"""Routers of ours before a family's experts: where the gate is, what the family does itself, where experts lie."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.router import LocalityConfig, RouterConfig
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.plan import make_plan
from moe_runtime.experts.families import ExpertsModule, ModelFacts, UnsupportedModel, facts_of, find_experts
from moe_runtime.experts.gates import check_gates, find_gate
from moe_runtime.experts.imitate import answers_alike, imitated
from moe_runtime.experts.layout import ACROSS, WITHIN_DOMAIN, layouts
from moe_runtime.experts.routed import RouterRequest, make_routed, with_locality
from moe_runtime.experts.router_files import SavedRouter, read_router, write_router
from moe_runtime.router.face import Layout
from numerics_families import tiny_model


def parts(family: str) -> tuple[Any, list[ExpertsModule], ModelFacts]:
    model = tiny_model(family)
    entries = find_experts(model)
    return model, entries, facts_of(model.config, entries)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_next", {}),
        ("olmoe", {"pre_softmax": True}),
        ("gpt_oss", {}),
        ("laguna", {"score_function": "Sigmoid", "enable_expert_bias": True}),
        (
            "deepseek_v3",
            {
                "score_function": "Sigmoid",
                "enable_expert_bias": True,
                "num_groups": 2,
                "group_topk": 1,
                "group_score": "Top2Sum",
                "topk_scaling_factor": 2.5,
            },
        ),
    ],
)
def test_a_familys_own_routing_is_found_by_its_answers(family: str, options: dict[str, Any]) -> None:
    model, entries, facts = parts(family)
    assert imitated(model, entries, facts=facts).config.given() == options


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma4_text", "is given something else than"),  # its router has a norm of its own
        ("muse_spark", "is given something else than"),  # its experts work in fewer dimensions
        ("inkling_text", "found none"),
        ("phimoe", "no router of ours gives the picks"),
    ],
)
def test_a_family_whose_routing_is_none_of_ours_is_refused_with_the_cause(family: str, words: str) -> None:
    model, entries, facts = parts(family)
    with pytest.raises(UnsupportedModel, match=words):
        imitated(model, entries, facts=facts)


def test_a_gate_scores_in_float32_whatever_the_model_computes_in() -> None:
    model, entries, _ = parts("gpt_oss")
    gate = find_gate(model, entries[0])
    x_TD = torch.randn(3, gate.dim)
    exact_TE = gate.logits(x_TD)
    model.to(torch.bfloat16)
    assert gate.logits(x_TD.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(gate.logits(x_TD), exact_TE, atol=0.02, rtol=0.02)
    assert not torch.allclose(exact_TE, x_TD @ model.model.layers[0].mlp.router.weight.T.float()), "the bias counts"


def test_gates_that_see_what_the_experts_see_pass() -> None:
    model, entries, _ = parts("mixtral")
    check_gates(model, entries, [find_gate(model, entry) for entry in entries])


def test_a_trained_bias_is_lent_to_a_family_that_has_one_and_routes_so_itself() -> None:
    model, entries, facts = parts("deepseek_v3")
    own = imitated(model, entries, facts=facts)
    routed = make_routed(model, entries, RouterRequest(own.config), facts=facts, seed=0)
    for name, bias_E in routed.tensors().items():
        bias_E.copy_(torch.linspace(-1, 1, len(bias_E)) * (1 + int(name.split(".")[1])))
    assert answers_alike(model, entries, routed)
    last = model.model.layers[-1].mlp.gate.e_score_correction_bias
    torch.testing.assert_close(last, torch.linspace(-1, 1, len(last)) * len(entries))


def test_a_router_that_is_not_the_familys_leaves_its_bias_alone() -> None:
    model, entries, facts = parts("deepseek_v3")
    asked = RouterRequest(RouterConfig(type="TopK", enable_expert_bias=True))
    assert not answers_alike(model, entries, make_routed(model, entries, asked, facts=facts, seed=0))


def test_near_experts_are_preferred_within_the_budget() -> None:
    model, entries, facts = parts("olmoe")
    own = imitated(model, entries, facts=facts)
    near_E = torch.arange(facts.num_experts) < facts.num_experts // 2
    layout = Layout(torch.where(near_E, 0.0, 1.0), torch.stack([near_E, ~near_E]))
    x_TD = torch.randn(200, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    shares = []
    for budget in (0, 10, 100):
        routed = with_locality(model, entries, own, LocalityConfig(bias=10.0, budget_percent=budget), facts=facts)
        routed.use_layouts([layout] * len(entries))
        shares.append(float(near_E[routed.layers[0].route(x_TD).expert_TK].float().mean()))
    plain = float(near_E[own.layers[0].route(x_TD).expert_TK].float().mean())
    assert shares[0] == plain < shares[1] < shares[2] == 1.0


def test_a_router_of_another_type_takes_no_locality() -> None:
    model, entries, facts = parts("olmoe")
    routed = make_routed(model, entries, RouterRequest(RouterConfig(type="Hash")), facts=facts, seed=0)
    with pytest.raises(InvalidInput, match="locality_bias is not used by Hash"):
        with_locality(model, entries, routed, LocalityConfig(bias=1.0, budget_percent=5), facts=facts)


def test_tensors_of_other_routers_are_refused_by_name() -> None:
    model, entries, facts = parts("olmoe")
    asked = RouterRequest(RouterConfig(type="TopK", score_function="Sigmoid", enable_expert_bias=True))
    routed = make_routed(model, entries, asked, facts=facts, seed=0)
    with pytest.raises(InvalidInput, match=r"moerator_router\.0\.kind\.bias_E must be \[8\], is None"):
        routed.fill({})


def test_distances_are_to_the_copies_that_a_ranks_tokens_take() -> None:
    """Ranks 0 and 1 share a node; expert 4 is lost with rank 3, expert 0 has a copy on rank 1 too."""
    expert_map = ExpertMap(
        generation=0, num_logical_experts=5, slots_of_rank=(1, 2, 1, 1), logical_of_slot=((0, 1, 0, 3, 4),)
    )
    domains = ["a", "a", "b"]
    [layout] = layouts(expert_map, make_plan(expert_map, [0, 1, 2], rank=1, domains=domains), domains)
    assert layout.distance_E.tolist() == [0.0, 0.0, 0.0, ACROSS, 0.0], "a lost one is answered for at home"
    assert layout.holds_GE.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0]]
    [other] = layouts(expert_map, make_plan(expert_map, [0, 1, 2], rank=0, domains=domains), domains)
    assert other.distance_E.tolist() == [0.0, WITHIN_DOMAIN, 0.0, ACROSS, 0.0]
    [unknown] = layouts(expert_map, make_plan(expert_map, [0, 1, 2], rank=0), None)
    assert unknown.distance_E[1] == ACROSS


def test_no_class_is_imported_because_a_checkpoint_names_it(tmp_path: Path) -> None:
    saved = SavedRouter(RouterConfig(type="Custom", class_path="mine:Router"), {"a": torch.zeros(1)})
    write_router(tmp_path, saved)
    for named in (None, "other:Router"):
        with pytest.raises(InvalidInput, match=r"name it in model\.routerClassPath"):
            read_router(tmp_path, router_class=named)
    read = read_router(tmp_path, router_class="mine:Router")
    assert read is not None and read.config == saved.config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "none of this runtime's"),
        ("[]", "none of this runtime's"),
        ('{"version": 9}', "has version 9, this runtime reads 1"),
        ('{"version": 1, "router": {"type": "Best"}}', "RouterConfig.type"),
        ('{"version": 1, "router": {"type": "Hash"}}', "router.safetensors"),
    ],
)
def test_a_router_file_that_is_none_is_refused_with_its_fault(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "router.json").write_text(text)
    (tmp_path / "router.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=words):
        read_router(tmp_path)
