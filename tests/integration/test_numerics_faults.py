"""A rank dies or hangs in the middle of a model's step: the step is a transaction, the repeated one gives the same
logits.
"""

import signal
from pathlib import Path

import numpy as np
import pytest

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import ExpertMap
from numerics_reference import Reference
from numerics_tasks import Fault

pytestmark = pytest.mark.integration

TOLERANCE = 1e-4
EVERY_EXPERT_TWICE = (0, 1, 2, 6, 3, 4, 5, 7, 6, 7, 0, 1, 2, 3, 4, 5)
VICTIM = 3


def covered_map(family: str) -> ExpertMap:
    return ExpertMap(
        generation=1,
        num_logical_experts=tasks.NUM_EXPERTS,
        slots_of_rank=(4, 4, 4, 4),
        logical_of_slot=(EVERY_EXPERT_TWICE,) * tasks.num_moe_layers(family),
    )


def exchange_of(family: str, *, step: int, layer_idx: int, combine: bool) -> int:
    """Number of the exchange (2 per layer, by token) at which a fault strikes, counted from 1."""
    return step * 2 * tasks.num_moe_layers(family) + 2 * layer_idx + int(combine) + 1


MOMENTS = {
    "prefill_first_layer_before_sending": {"step": 0, "layer_idx": 0, "combine": False, "after": False},
    "decode_middle_layer_after_dispatch": {"step": 2, "layer_idx": 1, "combine": False, "after": True},
    "decode_last_layer_before_combine": {"step": 5, "layer_idx": -1, "combine": True, "after": False},
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_a_rank_killed_mid_step_leaves_no_trace_in_the_logits(
    family: str, moment: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    where = dict(MOMENTS[moment])
    after = bool(where.pop("after"))
    layer_idx = int(where["layer_idx"]) % tasks.num_moe_layers(family)
    exchange = exchange_of(family, step=int(where["step"]), layer_idx=layer_idx, combine=bool(where["combine"]))
    reference = references[family]
    results = run_ranks(
        tasks.serve,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=covered_map(family),
        world=4,
        forced=reference.forced(),
        fault=Fault(VICTIM, exchange, after),
    )

    assert_survivors_equal(results, reference)


def test_a_hung_rank_is_left_at_the_deadline_and_the_step_repeated(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references["qwen3_moe"]
    results = run_ranks(
        tasks.serve,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=covered_map("qwen3_moe"),
        world=4,
        forced=reference.forced(),
        fault=Fault(VICTIM, exchange=9, after=False, signal=signal.SIGSTOP),
        timeout_ms=1500,
        expected_ranks={0, 1, 2},
    )

    assert_survivors_equal(results, reference)
    assert max(results[rank]["fault_seconds"] for rank in range(3)) < 4


def assert_survivors_equal(results: dict[int, dict[str, object]], reference: Reference) -> None:
    assert sorted(results) == [0, 1, 2]
    expected = reference.generated()
    for rank in range(3):
        result = results[rank]
        assert result["faults"] == 1
        assert result["degraded"] == {"generalist": 0, "drop": 0}
        steps: list[np.ndarray] = result["steps"]  # type: ignore[assignment]
        for step in range(tasks.NEW_TOKENS):
            for row, prompt in enumerate(expected[rank]):
                assert np.abs(steps[step][row] - prompt.logits[step]).max() <= TOLERANCE
        tokens = sum(len(prompt) + tasks.NEW_TOKENS - 1 for prompt in tasks.prompts_of_rank(rank))
        assert result["picks"] == tokens * 2 * tasks.num_moe_layers(reference.family)


@pytest.mark.parametrize("exchange", [5, 11], ids=["in_forward", "in_backward"])
def test_a_rank_killed_mid_training_step_faults_its_peers_and_the_repeat_is_exact(
    exchange: int, references: dict[str, Reference], tmp_path: Path
) -> None:
    """Two exchanges per layer forward, two backward; three layers."""
    reference = references["qwen3_moe"]
    results = run_ranks(
        tasks.train_through_fault,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=covered_map("qwen3_moe"),
        world=4,
        fault=Fault(VICTIM, exchange, after=False),
    )

    assert sorted(results) == [0, 1, 2]
    for rank in range(3):
        logits = reference.model(input_ids=tasks.batch_of_rank(rank, 4)).logits.detach().numpy()
        assert results[rank]["outcome"] == "fault"
        assert np.abs(results[rank]["logits"] - logits).max() <= TOLERANCE
        assert results[rank]["picks"] == logits.shape[0] * logits.shape[1] * 2 * 3
