"""The model over 1, 2 and 4 ranks is the single-process transformers model: logits, gradients, cached decoding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import ExpertMap
from numerics_reference import Reference

pytestmark = pytest.mark.integration

LAYOUTS = {
    "one_rank": ((8,), tuple(range(8)), ()),
    "two_even": ((4, 4), tuple(range(8)), ()),
    "four_even": ((2, 2, 2, 2), tuple(range(8)), ()),
    "four_with_uneven_copies_and_a_rank_without_slots": (
        (5, 3, 0, 4),
        (0, 1, 2, 3, 4, 5, 6, 7, 0, 5, -1, 6),
        (1, 1, 1, 1, 1, 2, 0, 1, 3, 1, 0, 1),
    ),
}
TOLERANCE = 1e-4


def expert_map(family: str, layout: str) -> ExpertMap:
    slots_of_rank, row, shares = LAYOUTS[layout]
    num_layers = tasks.num_moe_layers(family)
    return ExpertMap(
        generation=1,
        num_logical_experts=tasks.NUM_EXPERTS,
        slots_of_rank=slots_of_rank,
        logical_of_slot=(row,) * num_layers,
        share_of_slot=(shares,) * num_layers if shares else (),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_logits_and_gradients_equal_one_process(
    family: str, layout: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[family]
    emap = expert_map(family, layout)
    world = emap.num_ranks
    results = run_ranks(
        tasks.forward_and_gradients,
        num_ranks=world,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=emap,
        world=world,
    )

    assert sorted(results) == list(range(world))
    logits, gradients = reference.logits_and_gradients(world)
    for rank in range(world):
        assert np.abs(results[rank]["logits"] - logits[rank]).max() <= TOLERANCE
    for name in results[0]["dense"]:
        summed = sum(results[rank]["dense"][name] for rank in range(world))
        assert_close_gradient(summed, gradients[name])
    for name in results[0]["experts"]:
        for logical_id in range(tasks.NUM_EXPERTS):
            parts = [results[rank]["experts"][name].get(logical_id) for rank in range(world)]
            summed = sum(part for part in parts if part is not None)
            assert_close_gradient(summed, gradients[name][logical_id])
    tokens = sum(tasks.batch_of_rank(rank, world).numel() for rank in range(world))
    picks = sum(sum(map(sum, results[rank]["load"])) for rank in range(world))
    assert picks == tokens * 2 * emap.num_layers


def assert_close_gradient(ours: Any, theirs: torch.Tensor) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= TOLERANCE * scale


@pytest.mark.parametrize("by_pick", [False, True], ids=["by_token", "by_pick"])
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_cached_decoding_of_uneven_ranks_equals_generate(
    family: str, by_pick: bool, references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references[family]
    expected = reference.generated()
    results = run_ranks(
        tasks.serve,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        folder=str(reference.folder),
        expert_map=expert_map(family, "four_with_uneven_copies_and_a_rank_without_slots"),
        world=4,
        forced=reference.forced(),
        by_pick=by_pick,
    )

    for rank in range(4):
        for step in range(tasks.NEW_TOKENS):
            assert results[rank]["steps"][step].shape == (len(expected[rank]), 64)
            for row, prompt in enumerate(expected[rank]):
                assert np.abs(results[rank]["steps"][step][row] - prompt.logits[step]).max() <= TOLERANCE
        prompts = tasks.prompts_of_rank(rank)
        assert results[rank]["lengths"] == [len(prompt) + tasks.NEW_TOKENS - 1 for prompt in prompts]
        tokens = sum(len(prompt) + tasks.NEW_TOKENS - 1 for prompt in prompts)
        assert results[rank]["picks"] == tokens * 2 * tasks.num_moe_layers(family)
