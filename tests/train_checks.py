"""What holds of training over real ranks whatever routes: it equals one process, and it equals itself after a loss."""

from pathlib import Path
from typing import Any

import torch

import train_tasks
from gloo_ranks import run_ranks

MAX_STEPS, SNAPSHOT_EVERY = 8, 3


def trained(
    tmp_path: Path, text: Path, name: str, *, num_ranks: int, steps: int, redundant: int = 0, **options: Any
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of `steps` steps, whose snapshot then lies in tmp_path / name."""
    output = tmp_path / name
    output.mkdir()
    results = run_ranks(
        train_tasks.train,
        num_ranks=num_ranks,
        size=num_ranks,
        store_path=str(tmp_path / f"{name}.store"),
        output=str(output),
        text=str(text),
        redundant=redundant,
        steps=steps,
        **options,
    )
    losses, norms = results[0]
    assert all(results[rank] == results[0] for rank in range(num_ranks)), "ranks report different numbers"
    return losses, norms


def assert_parameters_agree(one: Path, other: Path, *, step: int) -> None:
    expected = train_tasks.everything(one, step)
    for name, tensor in train_tasks.everything(other, step).items():
        if "#" not in name:
            assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=5e-4), name


def assert_a_lost_rank_leaves_no_trace(tmp_path: Path, text: Path, *, where: str, at_step: int, **options: Any) -> None:
    """Bit for bit: the same operations in the same order, one thread each."""
    num_ranks, last_snapshot = 2, SNAPSHOT_EVERY * (at_step // SNAPSHOT_EVERY)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    expected = run_ranks(
        train_tasks.train_undisturbed,
        num_ranks=num_ranks,
        size=num_ranks,
        store_path=str(tmp_path / "store1"),
        output=str(undisturbed),
        text=str(text),
        **options,
    )[0]
    results = run_ranks(
        train_tasks.lose_a_rank,
        num_ranks=num_ranks + 1,
        store_path=str(tmp_path / "store2"),
        expected_ranks=(0, num_ranks),
        output=str(disturbed),
        text=str(text),
        at_step=at_step,
        where=where,
        **options,
    )
    untouched, restored, losses = results[0]
    assert untouched, "the failed step left traces"
    assert restored == results[num_ranks][1] == last_snapshot
    assert losses == expected[last_snapshot:]
    whole = train_tasks.everything(undisturbed, MAX_STEPS)
    for name, tensor in train_tasks.everything(disturbed, MAX_STEPS).items():
        assert torch.equal(tensor, whole[name]), name
