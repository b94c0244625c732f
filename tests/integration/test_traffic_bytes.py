"""The communication model beside the bytes that real ranks over real Gloo have counted, and the trace it was fed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_tasks
from gloo_ranks import run_ranks
from integration.serving_pods import spread_map
from moe_core.contract.expert_map import ExpertMap
from moe_operator.cli_plan import read_trace
from numerics_tasks import Fault
from tiny_checkpoint import write_checkpoint
from trace_tasks import NUM_STEPS, serve, serve_through_fault, train
from traffic_model import modelled_bytes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
HIDDEN_SIZE, TOP_K = 32, 2
WITHIN = 0.1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


def counted_bytes(results: dict[int, Any]) -> dict[str, int]:
    sent_RR = np.asarray([results[rank]["sent"] for rank in sorted(results)])
    stayed = int(np.trace(sent_RR))
    return {"rank": stayed, "across": int(sent_RR.sum()) - stayed}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(  # up to 64 tokens go by token; in a single long text the ranks' loads are far apart
    ("rows", "length"), [(3, 1), (8, 8), (13, 5), (20, 10), (1, 65)]
)
def test_serving_sends_what_the_model_says_by_token_and_by_pick(
    rows: int, length: int, copies: int, model: str, tmp_path: Path
) -> None:
    expert_map = spread_map(3, copies=copies)
    results = run_ranks(
        serve,
        num_ranks=3,
        store_path=str(tmp_path / "store"),
        model=model,
        folder=str(tmp_path / "traces"),
        expert_map=expert_map,
        world=3,
        rows=rows,
        length=length,
    )
    trace = read_trace(tmp_path / "traces")
    assert len(trace.steps) == NUM_STEPS
    expected = modelled_bytes(expert_map, trace, hidden_size=HIDDEN_SIZE, top_k=TOP_K)
    assert counted_bytes(results) == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("redundant", [0, 2])
def test_training_sends_what_the_model_says_gradients_included(redundant: int, tmp_path: Path) -> None:
    expert_map = train_tasks.even_map(4, redundant=redundant)
    results = run_ranks(
        train,
        num_ranks=4,
        store_path=str(tmp_path / "store"),
        output=str(tmp_path / "out"),
        text=str(train_tasks.write_text(tmp_path / "text")),
        folder=str(tmp_path / "traces"),
        expert_map=expert_map,
        world=4,
    )
    trace = read_trace(tmp_path / "traces")
    expected = modelled_bytes(expert_map, trace, hidden_size=HIDDEN_SIZE, top_k=TOP_K, trains=True)
    assert counted_bytes(results) == pytest.approx(expected, rel=WITHIN)


def test_a_trace_holds_what_was_committed_and_no_step_that_was_rolled_back(model: str, tmp_path: Path) -> None:
    expert_map: ExpertMap = spread_map(3)
    results = run_ranks(
        serve_through_fault,
        num_ranks=3,
        store_path=str(tmp_path / "store"),
        expected_ranks={0, 1},
        model=model,
        folder=str(tmp_path / "traces"),
        expert_map=expert_map,
        world=3,
        fault=Fault(victim=2, exchange=3, after=False),  # of the first step: its second layer
    )
    assert [results[rank]["faults"] for rank in (0, 1)] == [1, 1]
    trace = read_trace(tmp_path / "traces")
    recorded = trace.load_of_sources(3)
    for rank in (0, 1):
        committed = np.asarray(results[rank]["load"])[:, : recorded.shape[2]]
        assert committed.sum() == 2 * 4 * TOP_K * expert_map.num_layers
        np.testing.assert_array_equal(recorded[rank], committed)
    assert not recorded[2].any()
