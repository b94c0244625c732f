"""Every type of router: it is built, it answers with a routing at any shape, and a user's own is held to the same."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import moe_runtime.router as router_package
from moe_core.contract.router import RouterConfig
from moe_core.contract.router_rules import RouterType
from moe_core.outcome import InvalidInput
from moe_runtime.errors import GroupFault
from moe_runtime.router.check import checked
from moe_runtime.router.face import Routing, Tokens
from moe_runtime.router.registry import KINDS, build_router
from router_cases import CASE_NAMES, CASES, DIM, SERVING, WHOLE_TEXTS, Mine, make_router, make_tokens, route, training


def test_every_type_can_be_built_and_is_tried_here() -> None:
    assert {*KINDS, "Custom"} == set(get_args(RouterType))
    assert {case["type"] for case in CASES} == set(KINDS)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_it_answers_with_a_routing_and_passes_a_gradient_on(options: dict[str, Any], num_tokens: int) -> None:
    router, tokens = make_router(8, 2, **options), make_tokens(num_tokens, 8, skew=0.5)
    assert tokens.logits_TE is not None
    logits_TE = tokens.logits_TE.requires_grad_()
    learns = options["type"] not in {"Hash", "Frozen"} and options.get("heuristic") != "Position"
    for moment in (training(progress=0.05), training(progress=0.9), WHOLE_TEXTS, SERVING):
        routing = route(router, tokens, moment)
        total = sum(routing.losses.values(), (routing.weight_TK**2).sum())
        if routing.soft is not None:
            total = total + (routing.soft.mix_TP**2).sum() + (routing.soft.share_TP**2).sum()
        assert total.requires_grad == learns
        if learns:
            asked = [logits_TE, *router.parameters()]
            grads = [grad for grad in torch.autograd.grad(total, asked, allow_unused=True) if grad is not None]
            assert all(bool(grad.isfinite().all()) for grad in grads)
            assert num_tokens == 0 or any(bool(grad.any()) for grad in grads)
        router.after_step(torch.bincount(routing.expert_TK[routing.expert_TK >= 0], minlength=8))


@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_a_step_that_is_run_again_takes_the_same_way(options: dict[str, Any]) -> None:
    router, tokens = make_router(8, 2, **options), make_tokens(20, 8)
    first, again = (route(router, tokens, training(seed=3, progress=0.05)) for _ in range(2))
    assert torch.equal(first.expert_TK, again.expert_TK)
    assert torch.equal(first.weight_TK, again.weight_TK)


@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_two_ranks_build_the_same_router_and_can_save_it(options: dict[str, Any]) -> None:
    mine, theirs = (make_router(8, 2, layer_idx=3, **options).state_dict() for _ in range(2))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_another_seed_moves_what_is_learned_and_nothing_that_is_drawn_for_good(options: dict[str, Any]) -> None:
    config, sizes = RouterConfig(**options), {"num_experts": 8, "top_k": 2, "dim": DIM, "vocab_size": 64}
    counts_V = torch.ones(64)
    one, other = (build_router(config, layer_idx=0, seed=seed, token_counts_V=counts_V, **sizes) for seed in (0, 1))
    moved = {name for name, tensor in one.state_dict().items() if not torch.equal(tensor, other.state_dict()[name])}
    learned = {name for name, parameter in one.named_parameters() if parameter.numel() > 1 and bool(parameter.any())}
    assert moved == learned


@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_who_does_not_look_ahead_routes_the_start_of_a_text_without_the_rest(options: dict[str, Any]) -> None:
    router, tokens = make_router(8, 2, **options), make_tokens(30, 8, rows=1)
    start = Tokens(**{name: getattr(tokens, name)[:12] for name in Tokens.__dataclass_fields__})
    whole, part = (route(router, given, WHOLE_TEXTS) for given in (tokens, start))
    if not router.looks_ahead:
        assert torch.equal(whole.expert_TK[:12], part.expert_TK)
        torch.testing.assert_close(whole.weight_TK[:12], part.weight_TK)


@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_a_server_routes_every_token_as_if_it_were_alone(options: dict[str, Any]) -> None:
    router, tokens = make_router(8, 2, **options), make_tokens(6, 8)
    together = route(router, tokens, SERVING)
    for token in range(6):
        one = {name: getattr(tokens, name)[token, None] for name in Tokens.__dataclass_fields__}
        alone = route(router, Tokens(**one), SERVING)
        assert torch.equal(alone.expert_TK[0], together.expert_TK[token])
        torch.testing.assert_close(alone.weight_TK[0], together.weight_TK[token])


def custom(class_path: str = "router_cases:Mine", **options: str) -> Any:
    config = RouterConfig(type="Custom", class_path=class_path, options={"expert": "5", **options})
    return build_router(config, num_experts=8, top_k=2, dim=DIM, layer_idx=0)


def test_a_users_own_router_routes_and_is_told_of_steps() -> None:
    router, tokens = custom(), make_tokens(4, 8)
    assert (router(tokens, SERVING).expert_TK == 5).all()
    assert router.before_gate(tokens.x_TD, SERVING) is tokens.x_TD
    router.after_step(torch.arange(8))
    assert torch.equal(Mine.seen.pop(), torch.arange(8))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("type", r"answers with a Routing \(got tuple\)"),
        ("shape", r"weight_TK must be torch.float32 of shape \[4, 1\] \(got torch.float32 of \[3, 1\]\)"),
        ("dtype", r"expert_TK must be torch.int64 of shape \[4, 'any'\] \(got torch.int32 of \[4, 1\]\)"),
        ("nan", "weight_TK holds 4 values that are not finite"),
        ("twice", r"names an expert twice for token 0: \[5, 5\]"),
        ("nobody", "weight_TK is 0 where expert_TK is -1"),
        ("loss", r"losses\['mine'\] must be torch.float32 of shape \[\]"),
        ("soft", "without picks beside them"),
        ("count", r"counts\['mine'\] must be an int \(got float\)"),
        ("mistake", "router router_cases:Mine of layer 0: KeyError: 'an expert'"),
        ("passes", r"passes must be at least 1 \(got 0\)"),
    ],
)
def test_an_answer_that_is_none_is_refused(wrong: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        custom(wrong=wrong)(make_tokens(4, 8), SERVING)


def test_a_peer_that_is_gone_is_no_mistake_of_the_routers() -> None:
    with pytest.raises(GroupFault):
        custom(wrong="gone")(make_tokens(4, 8), SERVING)


def test_an_expert_that_is_not_there_is_refused() -> None:
    named = "router router_cases:Mine of layer 0: expert_TK"
    with pytest.raises(InvalidInput, match=named + r" holds ids from 0 to 7, or -1 \(got 8\)"):
        custom(expert="8")(make_tokens(4, 8), SERVING)


@pytest.mark.parametrize(
    ("class_path", "text"),
    [
        ("no_such_module:Mine", "no_such_module:Mine: cannot be imported: No module named"),
        ("router_cases:NoSuchClass", "NoSuchClass: cannot be imported"),
        ("router_cases:make_router", "is no class but a function"),
        ("router_cases:NoRouter", r"is a torch\.nn\.Module with looks_ahead"),
        ("torch.nn:Linear", r"classPath torch\.nn:Linear: cannot be built with options \{'expert': '5'\}: TypeError"),
    ],
)
def test_a_class_that_is_no_router_is_refused_by_name(class_path: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        custom(class_path)


def test_passes_beyond_the_last_are_no_routing() -> None:
    tokens = make_tokens(2, 4)
    expert_TK, weight_TK = torch.tensor([[0], [1]]), torch.ones(2, 1)
    with pytest.raises(InvalidInput, match="passes from 0 to 1"):
        checked(Routing(expert_TK, weight_TK, pass_TK=expert_TK + 1, passes=2), tokens, num_experts=4)


def test_the_guide_to_the_routers_names_every_module() -> None:
    assert router_package.__doc__ is not None
    folder = Path(router_package.__file__ or "").parent
    guide = set(re.findall(r"`(\w+)`", router_package.__doc__))
    assert guide == {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_routers_import_without_ray_and_transformers() -> None:
    wanted = "import sys, moe_runtime.router.registry; print(*{'ray', 'transformers', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", wanted], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
