"""Which families' experts are SwiGLU and nothing else, and a model whose experts run in Triton (its interpreter)."""

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.packing import Packing
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.compute import TRITON, is_swiglu
from moe_runtime.experts.families import describe


def shape_of(family: str) -> ModelShape:
    return ModelShape(
        family=family,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        vocab_size=64,
        max_position_embeddings=64,
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen3_moe", True), ("mixtral", True), ("olmoe", True), ("gpt_oss", False)],
)
def test_is_swiglu(family: str, expected: bool) -> None:
    _, (entry,), _ = describe(ModelSource(shape=shape_of(family)))

    assert is_swiglu(entry) is expected


def logits_and_rows(packing: Packing | None) -> tuple[torch.Tensor, int, str]:
    """Of one step of ten tokens: logits, rows that the stopwatch counted, which code ran them."""
    expert_map = ExpertMap(generation=1, num_logical_experts=4, slots_of_rank=(5,), logical_of_slot=((0, 1, 2, 3, 0),))
    source = ModelSource(shape=shape_of("qwen3_moe"), packing=packing)
    epm = ExpertParallelModel.load(source, expert_map=expert_map, rank=0)
    cache = epm.new_cache(num_rows=1, max_length=16)
    before = epm.expert_work()[1]
    logits = epm.forward_tokens(torch.arange(10).view(1, 10), torch.arange(10).view(1, 10), (0,), cache)
    return logits, epm.expert_work()[1] - before, epm.experts_way


@pytest.mark.parametrize("packing", [None, Packing.of("Int8"), Packing.of("Int4", 32)], ids=str)
def test_a_models_steps_are_the_same_in_triton(packing: Packing | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_rows, _ = logits_and_rows(packing)
    monkeypatch.setattr("moe_runtime.kernels.mixture.runs_here", lambda *_: True)
    monkeypatch.setattr("moe_runtime.kernels.mixture.packed_runs_here", lambda *_: True)
    actual, rows, way = logits_and_rows(packing)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert way == TRITON
    assert rows == expected_rows == 20
