"""A rank that is alone gives its mixture in one go where a kernel does that (interpreted here), as it does by rows."""

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts import compute
from moe_runtime.kernels import mixture

SHAPE = ModelShape(
    family="qwen3_moe",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    vocab_size=64,
    max_position_embeddings=32,
)
COPIES = ExpertMap(generation=1, num_logical_experts=4, slots_of_rank=(6,), logical_of_slot=((2, 0, -1, 1, 3, 0),) * 2)


def run() -> tuple[list[torch.Tensor], int, set[str]]:
    """Logits and gradients of experts; rows that the stopwatch has seen; which code ran."""
    epm = ExpertParallelModel.load(ModelSource(shape=SHAPE), expert_map=COPIES, rank=0)
    before = epm.expert_work()[1]
    logits = epm.module(input_ids=torch.arange(9).view(1, 9)).logits
    logits.square().sum().backward()
    gradients = [item.parameter.grad for item in epm.expert_parameters()]
    ways = {layer.compute.way for layer in epm._layers}
    return [logits.detach(), *(g for g in gradients if g is not None)], epm.expert_work()[1] - before, ways


def test_a_mixture_in_one_go_equals_rows_and_is_counted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, rows, _ = run()
    monkeypatch.setattr(mixture, "runs_here", lambda *_: True)
    got, rows_in_one_go, ways = run()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert ways == {compute.TRITON}
    assert rows_in_one_go == rows == 2 * 9 * 2
