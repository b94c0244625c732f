"""Training over real ranks and real Gloo: equal to one process, and equal again after a rank was lost."""

from pathlib import Path

import pytest

import train_tasks
from gloo_ranks import run_ranks
from moe_runtime.train.checkpoint import read_summary
from train_checks import assert_a_lost_rank_leaves_no_trace, assert_parameters_agree, trained

pytestmark = pytest.mark.integration

STEPS = 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return train_tasks.write_text(tmp_path / "text")


@pytest.mark.parametrize(("num_ranks", "redundant"), [(2, 0), (4, 0), (4, 1)])
def test_ranks_train_like_one_process(tmp_path: Path, text: Path, num_ranks: int, redundant: int) -> None:
    alone_losses, alone_norms = trained(tmp_path, text, "alone", num_ranks=1, steps=STEPS)
    losses, norms = trained(tmp_path, text, "ranks", num_ranks=num_ranks, steps=STEPS, redundant=redundant)
    assert losses == pytest.approx(alone_losses, rel=2e-5)
    assert norms == pytest.approx(alone_norms, rel=1e-3)
    assert_parameters_agree(tmp_path / "alone", tmp_path / "ranks", step=STEPS)


@pytest.mark.parametrize(("where", "at_step"), [("forward", 4), ("backward", 1), ("gradients", 4)])
def test_a_lost_rank_changes_nothing_but_the_time(tmp_path: Path, text: Path, where: str, at_step: int) -> None:
    assert_a_lost_rank_leaves_no_trace(tmp_path, text, where=where, at_step=at_step)


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
