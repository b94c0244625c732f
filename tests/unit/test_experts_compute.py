"""Which families' experts are SwiGLU and nothing else."""

import pytest

from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_runtime.experts.compute import is_swiglu
from moe_runtime.experts.families import describe


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen3_moe", True), ("mixtral", True), ("olmoe", True), ("gpt_oss", False)],
)
def test_is_swiglu(family: str, expected: bool) -> None:
    shape = ModelShape(
        family=family,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        vocab_size=64,
        max_position_embeddings=64,
    )

    _, (entry,), _ = describe(ModelSource(shape=shape))

    assert is_swiglu(entry) is expected
