"""A rank's routing trace: what is written, and what happens when it cannot be."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_core.contract.runtime_config import TraceConfig
from moe_core.contract.trace import TraceRecord
from moe_core.experts.trace import read_lines
from moe_runtime.rank import recorder as module
from moe_runtime.rank.recorder import Recorder


class Lab:
    def __init__(self, folder: Path, *, every_steps: int = 1, max_bytes: int = 1_000_000) -> None:
        self.said: list[str] = []
        config = TraceConfig(folder=str(folder), every_steps=every_steps, max_bytes=max_bytes)
        self.recorder = Recorder(config, name="tiny", rank=2, pod_uid="u", say=self.said.append)

    def step(self, number: int, *parts: tuple[int, list[list[int]]]) -> None:
        self.recorder.step = number
        self.recorder.take([(layer, torch.tensor(picks, dtype=torch.long).view(-1, 2)) for layer, picks in parts])

    @property
    def records(self) -> list[TraceRecord]:
        path = self.recorder.path
        return list(read_lines(path.read_text().splitlines())) if path.is_file() else []

    def until_there_are(self, count: int) -> None:
        self.until(lambda: len(self.records) == count)

    def until(self, look: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not look():
            assert time.monotonic() < deadline, (self.said, self.records)
            time.sleep(0.005)


def test_what_a_step_routed_is_read_back_layer_by_layer(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "made" / "here")
    lab.step(7, (0, [[3, 1]]), (1, [[0, 2]]), (0, [[2, 3], [1, 0]]), (2, []))
    lab.until_there_are(2)
    assert [(r.step, r.rank, r.layer, r.top_indices) for r in lab.records] == [
        (7, 2, 0, [[3, 1], [2, 3], [1, 0]]),
        (7, 2, 1, [[0, 2]]),
    ]
    assert lab.recorder.path.name == "tiny-rank-2-u.jsonl"


def test_one_step_of_so_many_is_recorded(tmp_path: Path) -> None:
    lab = Lab(tmp_path, every_steps=3)
    for number in range(1, 8):
        lab.step(number, (0, [[0, 1]]))
    lab.until_there_are(2)
    assert [record.step for record in lab.records] == [3, 6]


def test_a_file_that_has_its_size_gets_no_more_lines_and_that_is_said_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path, max_bytes=500)
    for number in range(20):
        lab.step(number, (0, [[0, 1]]), (1, [[0, 1]]))
    lab.until(lambda: bool(lab.said))
    lab.step(20, (0, [[0, 1]]))
    assert 250 < lab.recorder.path.stat().st_size <= 500
    assert {record.layer for record in lab.records if record.step == lab.records[-1].step} == {0, 1}
    assert [words.split(":")[0] for words in lab.said] == ["records no more routing"]
    assert lab.recorder.problem == ""


def test_a_pod_that_starts_again_goes_on_behind_what_it_has_written(tmp_path: Path) -> None:
    for number in (0, 1):
        lab = Lab(tmp_path)
        lab.step(number, (0, [[0, 1]]))
        lab.until_there_are(number + 1)
    assert [record.step for record in lab.records] == [0, 1]


def test_a_folder_that_cannot_be_written_costs_records_and_says_so_until_it_can(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    lab = Lab(tmp_path / "traces")
    lab.step(0, (0, [[0, 1]]))
    lab.until(lambda: bool(lab.recorder.problem))
    assert lab.recorder.problem == f"routing is not recorded: {lab.recorder.path}: File exists"
    (tmp_path / "traces").unlink()
    lab.step(1, (0, [[0, 1]]))
    lab.until(lambda: not lab.recorder.problem)
    assert [record.step for record in lab.records] == [1]
    assert lab.said[1:] == ["records routing again, 1 steps were left out"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.recorder.path.symlink_to("/dev/full")
    lab.step(0, (0, [[0, 1]]))
    lab.until(lambda: bool(lab.recorder.problem))
    assert lab.recorder.problem.endswith("No space left on device")


def test_a_folder_that_does_not_answer_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING_BYTES", 20)
    lab = Lab(tmp_path)
    with lab.recorder._news:  # the writer waits here, as it would for its folder
        for number in range(5):
            lab.step(number, (0, [[0, 1]]))
        assert lab.recorder.problem.endswith("is written more slowly than steps are made")
    lab.until(lambda: not lab.recorder.problem)
    assert [record.step for record in lab.records] == [0, 1]
    assert lab.said[-1] == "records routing again, 3 steps were left out"
