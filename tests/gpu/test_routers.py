"""Routers on a GPU: what they answer there is what they answer on a CPU, the fused gate included."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from moe_runtime.router.face import Layout, Tokens
from moe_runtime.router.layer import LayerRouter
from router_cases import CASE_NAMES, CASES, SERVING, WHOLE_TEXTS, dense, make_router, make_tokens, route, training


def moved(tokens: Tokens) -> Tokens:
    return Tokens(**{part.name: getattr(tokens, part.name).cuda() for part in fields(Tokens)})


def pair(options: dict[str, Any]) -> tuple[LayerRouter, LayerRouter]:
    """On the CPU and on the GPU."""
    here, there = make_router(8, 2, **options), make_router(8, 2, **options).cuda()
    distance_E = torch.tensor([0.0, 1, 0, 2, 1, 0, 2, 2])
    for router, device in ((here, "cpu"), (there, "cuda")):
        router.use_layout(
            Layout(
                distance_E.to(device), torch.eye(4, device=device).bool().repeat_interleave(2, dim=1), torch.arange(4)
            )
        )
    return here, there


@pytest.mark.parametrize("when", ["training", "whole", "serving"])
@pytest.mark.parametrize("options", CASES, ids=CASE_NAMES)
def test_a_gpu_answers_as_a_cpu(options: dict[str, Any], when: str) -> None:
    tokens = make_tokens(133, 8, skew=0.3)
    answers = []
    for router, given in zip(pair(options), (tokens, moved(tokens)), strict=True):
        moment = {"training": training(progress=0.05), "whole": WHOLE_TEXTS, "serving": SERVING}[when]
        answers.append(route(router, given, moment))
        router.after_step(torch.ones(8, dtype=torch.int64, device=given.x_TD.device))
    here, there = answers
    torch.testing.assert_close(
        dense(there, 8).cpu() if there.soft is None else there.soft.mix_TP.cpu(),
        dense(here, 8) if here.soft is None else here.soft.mix_TP,
        rtol=1e-4,
        atol=1e-5,
    )
    assert there.counts == here.counts
    for name, loss in here.losses.items():
        torch.testing.assert_close(there.losses[name].cpu(), loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"type": "TopK", "pre_softmax": True},
        {
            "type": "TopK",
            "score_function": "Sigmoid",
            "norm_topk_prob": False,
            "num_groups": 8,
            "group_topk": 4,
            "enable_expert_bias": True,
        },
    ],
)
def test_the_fused_gate_answers_as_plain_torch_for_many_experts(options: dict[str, Any], top_k: int) -> None:
    tokens = make_tokens(1000, 256)
    here, there = make_router(256, top_k, **options), make_router(256, top_k, **options).cuda()
    torch.testing.assert_close(
        dense(route(there, moved(tokens)), 256).cpu(), dense(route(here, tokens), 256), rtol=1e-5, atol=1e-7
    )
