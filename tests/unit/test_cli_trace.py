"""`moerator trace`: a trace played through ways of assigning."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_core.experts.replay import replay
from moe_core.outcome import InvalidInput
from moe_operator.cli import app


def skewed(windows: int, *, turn: int = 0) -> np.ndarray:
    """[windows, 2, 16]: expert 0 the hottest, popularity turned by `turn` experts each window."""
    popularity = 8000 / np.arange(1, 17)
    return np.stack(
        [np.stack([np.roll(popularity, turn * w), np.roll(popularity, turn * w + 5)]) for w in range(windows)]
    )


def test_a_load_that_stays_is_planned_for_once() -> None:
    load = skewed(5)
    plain, planned = replay(load, (5,) * 4, "linear"), replay(load, (5,) * 4, "replan")
    assert planned.mean > plain.mean + 0.1
    assert planned.moves[0] > 0
    assert planned.moves[1:] == (0, 0, 0)


def test_a_plan_for_the_last_window_is_judged_by_the_next() -> None:
    still, turning = replay(skewed(4), (5,) * 4, "fresh"), replay(skewed(4, turn=3), (5,) * 4, "fresh")
    assert turning.mean < still.mean - 0.1


def test_one_window_or_an_unknown_way_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least two windows, got 1"):
        replay(skewed(1), (5,) * 4, "fresh")
    with pytest.raises(InvalidInput, match="way must be one of linear, deepseek, fresh, replan, got 'best'"):
        replay(skewed(2), (5,) * 4, "best")


def test_the_command_plays_every_way_that_the_slots_allow(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    picks = [[0, 1], [0, 2], [0, 3], [4, 5]]
    record = {"stage": "pre_dispatch", "block": "decoder", "layer": 0, "rank": 0, "num_tokens": 4, "topk": 2}
    file.write_text("\n".join(json.dumps({"step": step, **record, "top_indices": picks}) for step in range(4)))
    result = CliRunner().invoke(app, ["trace", str(file), "--ranks", "2", "--json"])
    assert result.exit_code == 0
    played = json.loads(result.output)
    assert (played["layers"], played["experts"], played["windows"]) == (1, 6, 4)
    assert [one["way"] for one in played["replayed"]] == ["linear", "deepseek", "fresh", "replan"]
    uneven = CliRunner().invoke(app, ["trace", str(file), "--ranks", "4", "--window", "2", "--json"])
    assert "deepseek" not in uneven.output
    assert json.loads(uneven.output)["windows"] == 2


def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n{}\n")
    result = CliRunner().invoke(app, ["trace", str(file)])
    assert result.exit_code == 2
    assert "line 2: step: Field required" in result.output


def recorded(folder: Path, pod: str, *steps: int, rank: int = 0) -> Path:
    """What a pod has recorded of some steps, one layer each."""
    record = {"stage": "pre_dispatch", "block": "decoder", "layer": 0, "rank": rank, "num_tokens": 1, "topk": 2}
    file = folder / f"tiny-rank-{rank}-{pod}.jsonl"
    file.write_text("".join(json.dumps({"step": step, **record, "top_indices": [[0, 3]]}) + "\n" for step in steps))
    return file


def test_a_folder_is_the_trace_of_all_pods_in_it(tmp_path: Path) -> None:
    recorded(tmp_path, "a", 0, 1)
    recorded(tmp_path, "b", 2, 3)  # it came after a
    recorded(tmp_path, "c", 0, 1, 2, 3, rank=1)
    result = CliRunner().invoke(app, ["trace", str(tmp_path), "--ranks", "2", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["windows"] == 4


def test_a_line_that_a_killed_pod_left_unfinished_is_passed_over(tmp_path: Path) -> None:
    file = recorded(tmp_path, "a", 0, 1, 2)
    file.write_text(file.read_text()[:-20])
    result = CliRunner().invoke(app, ["trace", str(file), "--ranks", "2", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["windows"] == 2


def test_two_traces_in_one_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["trace", str(tmp_path)])
    assert (result.exit_code, "no *.jsonl lies in this folder" in result.output) == (2, True)
    recorded(tmp_path, "a", 0, 1)
    recorded(tmp_path, "b", 1, 2)
    result = CliRunner().invoke(app, ["trace", str(tmp_path)])
    assert result.exit_code == 2
    assert "step 1 of rank 0 is in tiny-rank-0-a.jsonl too: these are two traces" in result.output.replace("\n", " ")
