"""The model of one rank, and of ranks over NCCL, on a GPU: logits, gradients and decoding of transformers on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import ExpertMap
from moe_runtime.dispatch.stopwatch import Stopwatch
from numerics_reference import Reference

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
LAYOUTS = {1: ((8,), tuple(range(8))), 2: ((6, 4), (0, 1, 2, 3, 4, 5, 6, 7, 0, -1))}
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.make(request.param, tmp_path_factory.mktemp(request.param))


def expert_map(family: str, world: int) -> ExpertMap:
    slots_of_rank, row = LAYOUTS[world]
    return ExpertMap(
        generation=1,
        num_logical_experts=tasks.NUM_EXPERTS,
        slots_of_rank=slots_of_rank,
        logical_of_slot=(row,) * tasks.num_moe_layers(family),
    )


def over_ranks(name: str, world: int, reference: Reference, tmp_path: Path, **arguments: Any) -> dict[int, Any]:
    """One rank runs here; several are processes over NCCL."""
    given = {
        "folder": str(reference.folder),
        "expert_map": expert_map(reference.family, world),
        "world": world,
        **arguments,
    }
    store_path = str(tmp_path / "store")
    if world == 1:
        return {0: getattr(tasks, name)(0, store_path, device="cuda", **given)}
    if torch.cuda.device_count() < world:
        pytest.skip(f"NCCL takes one rank per GPU, and this machine has {torch.cuda.device_count()}")
    return run_ranks(tasks.on_a_gpu, num_ranks=world, store_path=store_path, name=name, **given)


@pytest.mark.parametrize("world", LAYOUTS)
def test_logits_and_gradients_are_those_of_transformers(reference: Reference, world: int, tmp_path: Path) -> None:
    results = over_ranks("forward_and_gradients", world, reference, tmp_path)
    logits, gradients = reference.logits_and_gradients(world)
    for rank in range(world):
        assert np.abs(results[rank]["logits"] - logits[rank]).max() <= TOLERANCE
    for name in results[0]["dense"]:
        assert_close(sum(results[rank]["dense"][name] for rank in range(world)), gradients[name])
    for name in results[0]["experts"]:
        for logical_id in range(tasks.NUM_EXPERTS):
            parts = [results[rank]["experts"][name].get(logical_id) for rank in range(world)]
            assert_close(sum(part for part in parts if part is not None), gradients[name][logical_id])
    tokens = sum(tasks.batch_of_rank(rank, world).numel() for rank in range(world))
    picks = sum(sum(map(sum, results[rank]["load"])) for rank in range(world))
    assert picks == tokens * 2 * tasks.num_moe_layers(reference.family)


def assert_close(ours: Any, theirs: torch.Tensor) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= TOLERANCE * scale


@pytest.mark.parametrize(
    ("world", "by_pick"), [(1, False), (2, False), (2, True)], ids=["alone", "by_token", "by_pick"]
)
def test_decoding_with_a_cache_gives_the_logits_of_transformers(
    reference: Reference, world: int, by_pick: bool, tmp_path: Path
) -> None:
    expected = reference.generated()
    results = over_ranks("serve", world, reference, tmp_path, forced=reference.forced(), by_pick=by_pick)
    for rank in range(world):
        for step in range(tasks.NEW_TOKENS):
            for row, prompt in enumerate(expected[rank]):
                assert np.abs(results[rank]["steps"][step][row] - prompt.logits[step]).max() <= TOLERANCE


def test_the_stopwatch_counts_what_the_device_did() -> None:
    watch = Stopwatch("cuda")
    a = torch.randn(4096, 4096, device="cuda")
    with watch.running(7):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    seconds, rows = watch.read()
    assert seconds > 20 * 2 * 4096**3 / 1e15  # no GPU of these days does float32 at a petaflop
    assert rows == 7
    assert watch.read() == (seconds, rows)


def test_a_group_of_one_exchanges_over_nccl_itself(tmp_path: Path) -> None:
    results = run_ranks(tasks.alone_over_nccl, num_ranks=1, store_path=str(tmp_path / "store"), timeout_s=60)
    assert results == {0: {"rows": [3.0, 4.0], "ints": [[5, -6]], "sum": [7.0], "after": "destroyed"}}
