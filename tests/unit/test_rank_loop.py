"""The step loop of one rank alone, over a keeper and a work that do as a test says."""

import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.membership import Member, Membership
from moe_core.contract.packing import FULL
from moe_core.contract.runtime_config import RuntimeConfig, TraceConfig
from moe_runtime.engine.model import StagedSlots
from moe_runtime.membership.keeper import MembershipKeeper
from moe_runtime.rank.loop import StepLoop
from moe_runtime.rank.work import WorkReport
from moe_runtime.registration import Directive
from serving_config import serving_config

MAP = ExpertMap(generation=1, num_logical_experts=1, slots_of_rank=(1,), logical_of_slot=((0,),))
ME = Member(rank=0, pod_uid="p0", address="127.0.0.1:1")
CONFIG = serving_config()


class Model:
    expert_map, num_layers, num_experts = MAP, 1, 1

    def bind(self, group: object) -> None:
        """Whatever group it is."""

    def lost_experts(self) -> list[tuple[int, ...]]:
        return [()]

    def slot_digests(self, *, fresh: bool = False) -> tuple[tuple[int, ...], ...]:
        return ((70,),)

    packing = FULL
    slot_digest, holds, expert_bytes = (lambda *_: 70), (lambda *_: True), (lambda _: 12)
    pick_bytes = expert_bytes


class Work:
    def __init__(self) -> None:
        self.report, self.epm, self.tokens = WorkReport(), Model(), 0

    def prepare(self) -> int:
        return self.tokens

    def enter(self, *_: object) -> None:
        """Nothing to do here or in the others."""

    run = idle = rollback = leave = load = enter


class Keeper:
    me = ME

    def __init__(self) -> None:
        self.current = self.known = Membership(epoch=3, members=(ME,), map_digest=MAP.digest)

    def check(self) -> None:
        """Nobody has fenced this rank."""


class Lab:
    def __init__(self, config: RuntimeConfig = CONFIG) -> None:
        self.directive = Directive(ranks=(0,))
        self.steps = 0
        self.work = Work()
        self.loop = StepLoop(
            config,
            rank=0,
            token="t",
            keeper=cast("MembershipKeeper", Keeper()),
            work=cast("Any", self.work),
            directive=lambda: self.directive,
            settled=self._count,
        )
        self.loop._enter(Keeper().current)

    def _count(self) -> None:
        self.steps += 1

    def step(self, **directive: Any) -> str:
        self.directive = Directive(**directive)
        assert self.loop._step()
        return self.loop.report().phase


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_a_rank_that_is_wished_again_before_it_has_left_drains_no_more(lab: Lab) -> None:
    assert lab.step(ranks=(0,)) == "Active"
    assert lab.step(ranks=(1,)) == "Draining"
    assert lab.step(ranks=(0, 1)) == "Active"


def test_a_map_whose_slots_were_damaged_on_the_way_stays_out_of_force_and_says_so(lab: Lab) -> None:
    wanted = ExpertMap(generation=2, num_logical_experts=1, slots_of_rank=(2,), logical_of_slot=((0, -1),))
    lab.loop._staging._staged = StagedSlots(wanted, (), digests=((71, 0),))
    plan = Membership(epoch=4, members=(ME,), map_digest=wanted.digest)
    assert lab.step(ranks=(0,), plan=plan) == "Active"
    report = lab.loop.report()
    assert (report.staged_digest, report.digest_mismatches) == (MAP.digest, 1)
    assert report.message == "staged slots are not what they should be: expert 0 of layer 0"
    assert lab.step(ranks=(0,), plan=plan) == "Active", "steps go on with the map that is in force"


def test_a_coordinator_that_names_nobody_drains_nobody(lab: Lab) -> None:
    assert lab.step(ranks=()) == "Active"


def test_a_rank_is_settled_by_its_first_step_and_not_by_entering(lab: Lab) -> None:
    assert lab.steps == 0
    lab.step(ranks=(0,))
    assert lab.steps == 1


def test_where_the_time_of_steps_went_is_told_one_boundary_later(lab: Lab) -> None:
    lab.work.tokens = 5
    lab.step(ranks=(0,))
    assert lab.loop.report().step_time.steps == 0
    lab.work.tokens = 0
    lab.step(ranks=(0,))
    lab.step(ranks=(0,))  # nobody had tokens: no step
    told = lab.loop.report().step_time
    assert (told.steps, told.wait_us) == (1, 0)
    assert told.compute_us > 0


def test_only_steps_with_tokens_are_numbered_and_an_epoch_takes_no_number_of_the_last(tmp_path: Path) -> None:
    lab = Lab(serving_config(trace=TraceConfig(folder=str(tmp_path), every_steps=1, max_bytes=1)))
    recorder = lab.loop._recorder
    assert recorder is not None
    numbers = []
    for tokens in (0, 5, 0, 3):
        lab.work.tokens = tokens
        lab.step(ranks=(0,))
        numbers.append(recorder.step)
    lab.loop._enter(Keeper().current)
    lab.step(ranks=(0,))
    assert [*numbers, recorder.step] == [1, 1, 2, 2, 4]


def test_a_trace_that_cannot_be_written_is_told_and_holds_up_no_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lab = Lab(serving_config(trace=TraceConfig(folder=str(tmp_path / "file"), every_steps=1, max_bytes=1)))
    recorder = lab.loop._recorder
    assert recorder is not None
    recorder.take([(0, torch.zeros(1, 1, dtype=torch.long))])
    deadline = time.monotonic() + 10
    while not recorder.problem and time.monotonic() < deadline:
        time.sleep(0.005)
    assert lab.step(ranks=(0,)) == "Active"
    assert lab.loop.report().message == f"routing is not recorded: {recorder.path}: File exists"
