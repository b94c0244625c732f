"""A service records its routing: the trace says what the counters say, is planned with, and foretells the bytes."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from integration.serving_pods import Pods, spread_map, until
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.runtime_config import ModelSource, TraceConfig
from moe_core.experts.trace import Trace
from moe_operator.cli import app
from moe_operator.cli_plan import read_trace
from tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, write_checkpoint
from traffic_model import fullest_rank_of_step, modelled_bytes

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
MAP = spread_map(2, copies=1)
HIDDEN_SIZE, TOP_K = 32, 2


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """Two ranks that have answered short prompts one by one, then long ones side by side, and are at rest."""
    folder: Path = tmp_path_factory.mktemp("traced")
    source = ModelSource(path=str(write_checkpoint(folder / "checkpoint")))
    trace = TraceConfig(folder=str(folder / "traces"), every_steps=1, max_bytes=50_000_000)
    with Pods(folder / "run", num_ranks=2, source=source, trace=trace) as pods:
        pods.start_all(gateways=1)
        pods.put_wish(RuntimeWish(generation=1, ranks=(0, 1), expert_map=MAP))
        pods.wait_state("two ranks are active", _two_are_active, within_s=180)
        until("the gateway has ranks", pods.healthy, within_s=20)
        for number in range(4):
            pods.complete(f"a short prompt, number {number}", max_tokens=16)
        long = [f"{number} " + "a long prompt that fills a step " * 20 for number in range(8)]
        with ThreadPoolExecutor(len(long)) as pool:
            list(pool.map(lambda prompt: pods.complete(prompt, max_tokens=8), long))
        yield pods


def _two_are_active(state: RuntimeState) -> bool:
    return state.wish_generation == 1 and len(state.member_uids) == 2


def trace_of(pods: Pods) -> Trace:
    assert pods.trace is not None
    return read_trace(Path(pods.trace.folder))


def test_the_trace_counts_what_the_coordinator_counts(pods: Pods) -> None:
    picks = trace_of(pods).load_of_steps().sum(0)
    found = np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=int)
    found[:, : picks.shape[1]] = picks
    assert found.sum() > 8 * 600 * TOP_K * NUM_LAYERS, "the long prompts alone have as many picks"
    counted = tuple(map(tuple, found.tolist()))
    pods.wait_state("the load at rest is told", lambda state: state.load == counted, within_s=30)


def test_every_step_is_there_once_and_all_ranks_know_it_by_one_number(pods: Pods) -> None:
    trace = trace_of(pods)
    keys = [(record.step, record.layer, record.rank) for record in trace.records]
    assert len(keys) == len(set(keys))
    of_rank = [{step for step, _, rank in keys if rank == which} for which in (0, 1)]
    assert of_rank[0] & of_rank[1], "long prompts were read by both ranks in the same steps"


def test_bytes_are_as_the_model_foretells(pods: Pods) -> None:
    trace = trace_of(pods)
    fullest = sorted(fullest_rank_of_step(trace).values())
    assert fullest[0] <= 64 < fullest[-1], "both ways of exchange were taken"
    expected = modelled_bytes(MAP, trace, hidden_size=HIDDEN_SIZE, top_k=TOP_K)
    metrics = pods.call("GET", "/metrics")[1].decode()
    counted = {
        scope: float(count)
        for scope, count in re.findall(r'^moe_dispatch_bytes_total{scope="(\w+)"} (\S+)$', metrics, re.MULTILINE)
    }
    assert set(counted) == {"self", "host"}
    assert counted["self"] == pytest.approx(expected["rank"], rel=0.1)
    assert counted["host"] == pytest.approx(expected["across"], rel=0.1)


def test_the_trace_is_played_and_planned_with(pods: Pods, tmp_path: Path) -> None:
    assert pods.trace is not None and pods.source is not None
    trace = trace_of(pods)
    result = CliRunner().invoke(app, ["trace", pods.trace.folder, "--ranks", "2", "--window", "8", "--json"])
    assert result.exit_code == 0
    played = json.loads(result.output)
    assert (played["layers"], played["windows"]) == (NUM_LAYERS, len(trace.steps) // 8)
    assert {one["way"] for one in played["replayed"]} == {"linear", "deepseek", "fresh", "replan"}

    service = tmp_path / "service.yaml"
    spec = {"model": {"path": pods.source.path}, "parallelism": {"expert": 2}}
    head = {"apiVersion": "moerator.dev/v1alpha1", "kind": "MoEService", "metadata": {"name": "tiny"}}
    service.write_text(yaml.safe_dump({**head, "spec": spec}))
    result = CliRunner().invoke(app, ["plan", "-f", str(service), "--load", pods.trace.folder, "--json"])
    assert result.exit_code == 0
    [plan] = json.loads(result.output)[0]["plans"]
    assert plan["planned"]["balancedness"] >= plan["balancedness"]
    assert plan["step"]["dispatch"] == "ByToken"
