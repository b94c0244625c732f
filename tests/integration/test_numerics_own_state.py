"""Families that nothing names, over several ranks: recurrent state, compressed keys, composite models. Rows with caches
of their own keep in step, an idle rank among them, and a step that fails leaves no trace in any of that state.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.experts.families import read_facts
from numerics_reference import Reference

pytestmark = pytest.mark.integration

TOLERANCE = 1e-4
COPIES_AND_NO_SLOTS = ((5, 3, 0, 4), (0, 1, 2, 3, 4, 5, 6, 7, 0, 5, -1, 6))
EVERY_EXPERT_TWICE = ((4, 4, 4, 4), (0, 1, 2, 6, 3, 4, 5, 7, 6, 7, 0, 1, 2, 3, 4, 5))


def expert_map(reference: Reference, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> ExpertMap:
    facts = read_facts(ModelSource(path=str(reference.folder)))
    return ExpertMap(
        generation=1,
        num_logical_experts=facts.num_experts,
        slots_of_rank=layout[0],
        logical_of_slot=(layout[1],) * facts.num_layers,
    )


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v4", "ernie4_5_vl_moe", "muse_spark", "gemma4"])
def test_two_ranks_equal_one_process_in_logits_and_gradients(
    family: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[family]
    results = run_ranks(
        tasks.forward_and_gradients,
        num_ranks=2,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=expert_map(reference, ((5, 5), (0, 2, 4, 6, 1, 1, 3, 5, 7, 0))),
        world=2,
    )

    logits, gradients = reference.logits_and_gradients(2)
    for rank in range(2):
        assert np.abs(results[rank]["logits"] - logits[rank]).max() <= TOLERANCE
    for name in results[0]["dense"]:
        assert_close(results[0]["dense"][name] + results[1]["dense"][name], gradients[name].numpy())
    for name in results[0]["experts"]:
        for logical_id in range(8):
            parts = [results[rank]["experts"][name].get(logical_id) for rank in range(2)]
            assert_close(sum(part for part in parts if part is not None), gradients[name][logical_id].numpy())


def assert_close(ours: Any, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "deepseek_v4", "minimax", "gemma4"])
def test_cached_decoding_of_uneven_ranks_equals_generate(
    family: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[family]
    results = run_ranks(
        tasks.serve,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=expert_map(reference, COPIES_AND_NO_SLOTS),
        world=4,
        forced=reference.forced(),
    )

    assert sorted(results) == [0, 1, 2, 3]
    for rank in range(4):
        assert_steps_equal(results[rank], reference, rank)


@pytest.mark.parametrize("exchange", [3, 30, 57], ids=["in_prefill", "in_an_early_step", "in_a_later_step"])
@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v4"])
def test_a_rank_killed_mid_step_leaves_no_trace_in_state_that_cannot_be_cropped(
    family: str, exchange: int, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[family]
    results = run_ranks(
        tasks.serve,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=expert_map(reference, EVERY_EXPERT_TWICE),
        world=4,
        forced=reference.forced(),
        fault=tasks.Fault(victim=3, exchange=exchange, after=False),
    )

    assert sorted(results) == [0, 1, 2]
    for rank in range(3):
        assert results[rank]["faults"] == 1
        assert_steps_equal(results[rank], reference, rank)


def assert_steps_equal(result: dict[str, Any], reference: Reference, rank: int) -> None:
    expected = reference.generated()[rank]
    for step in range(tasks.NEW_TOKENS):
        assert len(result["steps"][step]) == len(expected)
        for row, prompt in enumerate(expected):
            assert np.abs(result["steps"][step][row] - prompt.logits[step]).max() <= TOLERANCE
    prompts = tasks.prompts_of_rank(rank)
    assert result["lengths"] == [len(prompt) + tasks.NEW_TOKENS - 1 for prompt in prompts]
    tokens = sum(len(prompt) + tasks.NEW_TOKENS - 1 for prompt in prompts)
    facts = read_facts(ModelSource(path=str(reference.folder)))
    assert result["picks"] == tokens * facts.top_k * facts.num_layers
    assert result["degraded"] == {"generalist": 0, "drop": 0}
