"""One process trains, stops, goes on and publishes: what needs no second rank."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import train_tasks
from gloo_ranks import run_ranks
from moe_runtime.errors import GroupFault
from moe_runtime.train import checkpoint, loop
from moe_runtime.train.checkpoint import SUMMARY, read_summary
from moe_runtime.train.evaluate import evaluate_checkpoint, parse_lost
from moe_runtime.train.loop import MAX_SKIPPED, Diverged, Trainer
from moe_runtime.train.snapshot import DENSE_FILE, SnapshotDamaged, complete_steps, step_folder

pytestmark = pytest.mark.integration


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Trainer]:
    text = train_tasks.write_text(tmp_path / "text")

    def fresh(
        *, output: str = "output", run_id: str = "test", model: dict[str, Any] | None = None, **changes: object
    ) -> Trainer:
        config = train_tasks.config_for(tmp_path / output, text, num_ranks=1, **changes)
        epm = train_tasks.trainer_for(config, train_tasks.even_map(1), 0, **(model or {})).epm
        trainer = Trainer(config, epm, run_id=run_id)
        trainer.bind(None)
        return trainer

    return fresh


def _steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.step().loss_bits for _ in range(count)]


def test_a_new_process_goes_on_where_the_snapshot_was(begin: Callable[..., Trainer]) -> None:
    first = begin()
    first.restore()
    losses = _steps(first, 8)
    second = begin()
    assert second.restore() == 6
    assert _steps(second, 2) == losses[6:]


class OtherRank:
    """A group of two of which only this rank runs: the other one answers what a test says, or as this one."""

    size, position, ranks, domains, tells = 2, 0, (0, 1), None, False

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)

    def all_gather_ints(self, row: Sequence[int], *, timeout_ms: int | None = None) -> list[list[int]]:
        return [list(row), self.answers.pop(0) if self.answers else list(row)]

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError

    def swap(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError

    def post_all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Any:
        raise NotImplementedError

    def post_telling(self, rows: torch.Tensor, send_counts: Sequence[int], told_GC: torch.Tensor) -> Any:
        raise NotImplementedError


def told_by(trainer: Trainer) -> list[int]:
    """What a rank of the same run tells that has just come: step, whether it is stale, the run."""
    return [0, 1, loop._as_int(trainer._identity)]


def test_a_rank_replaced_during_the_first_snapshot_does_not_end_the_run(begin: Callable[..., Trainer]) -> None:
    survivor = begin()
    survivor._stale = False  # it was in the run's first snapshot when the other one died
    survivor.bind(OtherRank(told_by(survivor)))
    assert survivor.restore() == 0
    assert complete_steps(survivor.output, survivor._identity) == [0]


def test_a_fault_in_the_first_snapshot_leaves_the_rank_to_begin_again(begin: Callable[..., Trainer]) -> None:
    class Dies(OtherRank):
        def all_gather_ints(self, row: Sequence[int], *, timeout_ms: int | None = None) -> list[list[int]]:
            if len(row) == 8:  # the snapshot's digests
                raise GroupFault("all_gather: connection reset")
            return super().all_gather_ints(row)

    survivor = begin()
    survivor.bind(Dies())
    with pytest.raises(GroupFault):
        survivor.restore()
    survivor.bind(OtherRank(told_by(survivor)))
    assert survivor.restore() == 0


def test_a_checkpoint_that_one_rank_sees_first_ends_the_run_for_all(
    begin: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(max_steps=1)
    first.restore()
    _steps(first, 1)
    first.finish()
    late = begin(max_steps=1)
    late.bind(OtherRank(told_by(late), [1]))
    found, looks = read_summary(late.output), iter((None, None))
    monkeypatch.setattr(checkpoint, "read_summary", lambda _: next(looks, found))  # a cached directory
    assert late.restore() == 1
    assert late.finished


def test_a_damaged_snapshot_is_passed_over(begin: Callable[..., Trainer]) -> None:
    first = begin()
    first.restore()
    losses = _steps(first, 7)
    path = step_folder(first.output, 6) / DENSE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    second = begin()
    assert second.restore() == 3
    assert _steps(second, 4) == losses[3:]


def test_with_every_snapshot_damaged_the_run_stops_and_says_so(begin: Callable[..., Trainer]) -> None:
    first = begin()
    first.restore()
    _steps(first, 4)
    for step in complete_steps(first.output, first._identity):
        (step_folder(first.output, step) / DENSE_FILE).unlink()
    # alone and fresh it would begin anew; beside a rank that has trained, it must not
    first._stale = True
    with pytest.raises(SnapshotDamaged, match="no snapshot that all ranks can read"):
        first.restore()


def test_two_snapshots_are_kept(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.restore()
    _steps(trainer, 8)
    trainer.snapshot()
    assert complete_steps(trainer.output, trainer._identity) == [8, 6]
    assert len(list((trainer.output / ".snapshots").iterdir())) == 2


def test_another_job_with_the_same_folder_begins_anew(begin: Callable[..., Trainer]) -> None:
    first = begin()
    first.restore()
    _steps(first, 4)
    second = begin(run_id="another")
    assert second.restore() == 0


def test_one_rank_goes_on_from_a_snapshot_of_two(tmp_path: Path, begin: Callable[..., Trainer]) -> None:
    whole = begin(output="whole")
    whole.restore()
    losses = _steps(whole, 8)
    output = tmp_path / "output"
    run_ranks(
        train_tasks.train,
        num_ranks=2,
        size=2,
        store_path=str(tmp_path / "store"),
        output=str(output),
        text=str(tmp_path / "text"),
        redundant=1,
        steps=4,
    )
    alone = begin()
    assert alone.restore() == 4
    assert _steps(alone, 4) == pytest.approx(losses[4:], rel=1e-4)


def test_the_checkpoint_gives_transformers_the_same_logits(begin: Callable[..., Trainer]) -> None:
    from transformers import AutoModelForCausalLM

    trainer = begin()
    trainer.restore()
    _steps(trainer, 8)
    summary = trainer.finish()
    assert summary is not None and summary == read_summary(trainer.output)
    model = AutoModelForCausalLM.from_pretrained(trainer.output, local_files_only=True)
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        ours, theirs = trainer.epm.module(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "router", "is_the_same"),
    [
        ("glm4_moe", {"score_function": "Sigmoid", "enable_expert_bias": True, "bias_update_rate": 0.05}, True),
        ("mixtral", {"aux_loss_coeff": 0.01}, True),
        ("mixtral", {"score_function": "Sigmoid"}, False),
    ],
)
def test_a_checkpoint_says_whether_transformers_alone_routes_as_it_was_trained(
    begin: Callable[..., Trainer], family: str, router: dict[str, Any], is_the_same: bool
) -> None:
    """A family with a bias of its own is given the trained one."""
    from transformers import AutoModelForCausalLM

    trainer = begin(max_steps=4, model={"family": family, "router": {"type": "TopK", **router}})
    trainer.restore()
    _steps(trainer, 4)
    trainer.finish()
    assert json.loads((trainer.output / "router.json").read_text())["as_family"] == is_the_same
    model = AutoModelForCausalLM.from_pretrained(trainer.output, local_files_only=True)
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        ours, theirs = trainer.epm.module(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5) == is_the_same


def test_a_checkpoint_is_scored_whole_and_without_experts(begin: Callable[..., Trainer]) -> None:
    trainer = begin(max_steps=30)
    trainer.restore()
    _steps(trainer, 30)
    summary = trainer.finish()
    assert summary is not None
    lost = parse_lost("0,1,2,3", num_layers=train_tasks.NUM_LAYERS)
    held = evaluate_checkpoint(trainer.output, data=trainer.config.data, lost=lost)
    assert held.full == pytest.approx(summary.bits_per_byte, abs=1e-3)
    assert held.order2 == summary.order2_bits_per_byte
    assert held.generalist is not None and held.drop is not None
    assert held.num_lost == 4 * train_tasks.NUM_LAYERS
    assert min(held.generalist, held.drop) > held.full
    dealt_out = evaluate_checkpoint(trainer.output, data=trainer.config.data, lost=lost, workers=3)
    figures = [(one.full, one.generalist, one.drop) for one in (dealt_out, held)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-9)
    assert (dealt_out.num_bytes, dealt_out.order2) == (held.num_bytes, held.order2)


def test_a_failed_publication_leaves_no_mixture(begin: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = begin()
    trainer.restore()
    _steps(trainer, 8)
    before = trainer.finish()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    again = begin(run_id="another")
    again.restore()
    _steps(again, 8)
    monkeypatch.setattr("moe_runtime.train.checkpoint.write_generalists", fail)
    with pytest.raises(OSError, match="disk full"):
        again.finish()
    assert read_summary(trainer.output) == before
    assert not list(trainer.output.glob(".checkpoint*"))
    assert complete_steps(again.output, again._identity)[0] == 8, "the run can finish from its snapshot"


def test_a_run_without_a_router_leaves_no_earlier_runs_router_behind(begin: Callable[..., Trainer]) -> None:
    with_one = begin(max_steps=2, model={"router": {"type": "Hash"}})
    with_one.restore()
    _steps(with_one, 2)
    with_one.finish()
    assert (with_one.output / "router.json").is_file()
    without = begin(max_steps=2, run_id="another")
    without.restore()
    _steps(without, 2)
    without.finish()
    assert not list(without.output.glob("router.*"))
    assert evaluate_checkpoint(without.output, data=without.config.data).whole_text is None


def test_a_summary_that_is_not_ours_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text('{"tokenizer": "bytes"}')
    assert read_summary(tmp_path) is None


def test_a_step_whose_gradient_is_no_number_changes_no_weight(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.restore()
    trainer._commit({"model.norm.weight": torch.full((32,), math.nan)}, norm=math.nan, share=1.0)
    assert torch.isfinite(trainer.epm.module.model.norm.weight).all()


def test_a_run_of_such_steps_ends_the_run_with_its_lever(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    for _ in range(MAX_SKIPPED):
        trainer._commit({}, norm=math.inf, share=1.0)
    with pytest.raises(Diverged, match=r"training\.learningRate"):
        trainer._commit({}, norm=math.inf, share=1.0)


def test_a_good_step_between_them_begins_the_count_anew(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    still = {name: torch.zeros_like(p) for name, p in trainer.epm.module.named_parameters()}
    for norm in (math.inf, 1.0) * (MAX_SKIPPED + 1):
        trainer._commit(still, norm=norm, share=1.0)
    assert trainer._skipped == 0


def test_time_bounds_the_run_when_it_is_nearer(begin: Callable[..., Trainer]) -> None:
    trainer = begin(max_steps=1000, max_seconds=3)
    ticks = iter(range(10_000))
    trainer._clock = lambda: next(ticks) * 0.25
    trainer.bind(None)
    trainer.restore()
    rates = []
    while not trainer.finished:
        rates.append(trainer.step().learning_rate)
    assert 2 < len(rates) < 20
    assert rates[-1] < max(rates)
