"""Parts of a rank around its steps: what a checkpoint can be wrong in, a map that cannot be staged, losses in a row."""

from pathlib import Path
from typing import cast

import pytest
from safetensors import SafetensorError

from moe_core.contract.expert_map import ExpertMap
from moe_core.outcome import InvalidInput
from moe_runtime.engine.model import ExpertParallelModel, StagedSlots
from moe_runtime.rank.recovery import Recovering
from moe_runtime.rank.staging import FIRST_RETRY_S, Staging
from moe_runtime.rank.train import TrainWork
from moe_runtime.rank.work import ModelUnusable, loading
from serving_config import serving_config
from train_tasks import config_for


def map_of(*logical_of_slot: int) -> ExpertMap:
    return ExpertMap(generation=1, num_logical_experts=2, slots_of_rank=(2,), logical_of_slot=(logical_of_slot,))


class Model:
    """What staging asks of a model; fails with `error` while there is one."""

    def __init__(self) -> None:
        self.expert_map = map_of(0, 1)
        self.error: Exception | None = None
        self.asked = 0

    def stage(self, new_map: ExpertMap) -> StagedSlots:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return StagedSlots(new_map, ())


class Lab:
    def __init__(self) -> None:
        self.now = 100.0
        self.model = Model()
        self.staging = Staging(clock=lambda: self.now)

    def want(self, wanted: ExpertMap) -> bool:
        return self.staging.want(wanted, cast("ExpertParallelModel", self.model), wait=True)


@pytest.mark.parametrize("error", [InvalidInput("no such layer"), OSError(5, "Input/output error"), KeyError("down")])
def test_a_map_that_cannot_be_staged_says_why_and_is_tried_again_later(error: Exception) -> None:
    lab, wanted = Lab(), map_of(1, 0)
    lab.model.error = error
    assert lab.want(wanted)
    assert str(error.args[-1]) in lab.staging.problem
    assert not lab.want(wanted), "not at every step"
    lab.now += FIRST_RETRY_S
    lab.model.error = None
    assert lab.want(wanted)
    assert (lab.staging.digest, lab.staging.problem, lab.model.asked) == (wanted.digest, "", 2)


def test_a_map_that_goes_on_failing_is_tried_ever_more_rarely() -> None:
    lab = Lab()
    lab.model.error = OSError("stale file handle")
    tries = []
    for _ in range(40):
        if lab.want(map_of(1, 0)):
            tries.append(lab.now)
        lab.now += 0.5
    assert tries == [100.0, 101.0, 103.0, 107.0, 115.0]


def test_another_map_is_staged_at_once_after_one_that_failed() -> None:
    lab = Lab()
    lab.model.error = OSError("stale file handle")
    lab.want(map_of(1, 0))
    lab.model.error = None
    assert lab.want(map_of(1, 1))
    assert lab.staging.problem == ""


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError()])
def test_what_another_try_may_mend_is_not_held_against_the_model(error: Exception) -> None:
    with pytest.raises(type(error)), loading("/models/m"):
        raise error


@pytest.mark.parametrize(
    "error", [InvalidInput("lacks 3 tensors"), KeyError("stand_in"), SafetensorError("header"), RuntimeError("stack")]
)
def test_whatever_is_wrong_in_a_checkpoint_names_it(error: Exception) -> None:
    with pytest.raises(ModelUnusable, match=r"^/models/m: .*" + str(error.args[0])), loading("/models/m"):
        raise error


def test_a_folder_that_cannot_be_made_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    training = config_for(tmp_path / "taken" / "model", tmp_path / "no text", num_ranks=1)
    config = serving_config(mode="train", serving=None, training=training)
    with pytest.raises(NotADirectoryError, match=rf"Not a directory: output\.path {tmp_path}/taken/model"):
        TrainWork(config, rank=0).load(map_of(0, 1))


def test_a_second_loss_on_the_way_is_part_of_the_same_recovery() -> None:
    recovering = Recovering(detected_at=1.0)
    recovering.agreed(frozenset({2}), at=2.0)
    recovering.rebuilt(at=3.0)
    recovering.agreed(frozenset({0}), at=4.0)
    assert recovering.resumed(7, at=4.5) is None, "its new group is not there yet"
    recovering.rebuilt(at=5.0)
    recovery = recovering.resumed(8, at=6.0)
    assert recovery is not None
    assert (recovery.lost_ranks, recovery.detected_at, recovery.rebuilt_at) == ((0, 2), 1.0, 5.0)


def test_a_fault_that_cost_nobody_is_no_recovery() -> None:
    recovering = Recovering(detected_at=1.0)
    recovering.agreed(frozenset(), at=2.0)
    recovering.rebuilt(at=3.0)
    assert recovering.resumed(7, at=4.0) is None
