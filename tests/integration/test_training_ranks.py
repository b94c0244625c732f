"""Training over real ranks and real Gloo: equal to one process, and equal again after a rank was lost."""

from pathlib import Path

import pytest
import torch

import train_tasks
from gloo_ranks import run_ranks
from moe_runtime.train.checkpoint import read_summary

pytestmark = pytest.mark.integration

STEPS = 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return train_tasks.write_text(tmp_path / "text")


def _run(
    tmp_path: Path, text: Path, name: str, *, num_ranks: int, redundant: int = 0
) -> tuple[list[float], list[float]]:
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
        steps=STEPS,
    )
    losses, norms = results[0]
    assert all(results[rank] == results[0] for rank in range(num_ranks)), "ranks report different numbers"
    return losses, norms


@pytest.mark.parametrize(("num_ranks", "redundant"), [(2, 0), (4, 0), (4, 1)])
def test_ranks_train_like_one_process(tmp_path: Path, text: Path, num_ranks: int, redundant: int) -> None:
    alone_losses, alone_norms = _run(tmp_path, text, "alone", num_ranks=1)
    losses, norms = _run(tmp_path, text, "ranks", num_ranks=num_ranks, redundant=redundant)
    assert losses == pytest.approx(alone_losses, rel=2e-5)
    assert norms == pytest.approx(alone_norms, rel=1e-3)
    expected = train_tasks.everything(tmp_path / "alone", STEPS)
    for name, tensor in train_tasks.everything(tmp_path / "ranks", STEPS).items():
        if "#" not in name:
            assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=5e-4), name


@pytest.mark.parametrize(("where", "at_step"), [("forward", 4), ("backward", 1), ("gradients", 4)])
def test_a_lost_rank_changes_nothing_but_the_time(tmp_path: Path, text: Path, where: str, at_step: int) -> None:
    """Bit for bit: the same operations in the same order, one thread each."""
    num_ranks, max_steps, last_snapshot = 2, 8, 3 * (at_step // 3)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    expected = run_ranks(
        train_tasks.train_undisturbed,
        num_ranks=num_ranks,
        size=num_ranks,
        store_path=str(tmp_path / "store1"),
        output=str(undisturbed),
        text=str(text),
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
    )
    untouched, restored, losses = results[0]
    assert untouched, "the failed step left traces"
    assert restored == results[num_ranks][1] == last_snapshot
    assert losses == expected[last_snapshot:]
    whole = train_tasks.everything(undisturbed, max_steps)
    for name, tensor in train_tasks.everything(disturbed, max_steps).items():
        assert torch.equal(tensor, whole[name]), name


def test_four_ranks_publish_a_checkpoint_that_transformers_loads(tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "output"
    results = run_ranks(
        train_tasks.train_to_the_end,
        num_ranks=4,
        size=4,
        store_path=str(tmp_path / "store"),
        output=str(output),
        text=str(text),
    )
    figures = {bits for bits, _, _ in results.values()}
    assert len(figures) == 1, "all ranks see the same held-out figure"
    summaries = [results[rank][1] for rank in range(4)]
    assert summaries[0] == read_summary(output)
    assert summaries[1:] == [None] * 3
    assert all(again == (8, True) for _, _, again in results.values()), "a finished run is known as such"
    assert not list(output.glob(".*")), "nothing is left beside the checkpoint"
    model = AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert model.config.num_experts == train_tasks.NUM_EXPERTS
    assert (output / "generalist.json").is_file()
