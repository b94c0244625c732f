"""A training job in pods: it loses a rank in the middle, goes on from a snapshot, and writes a checkpoint."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.serving_pods import Pods, spread_map
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.runtime_config import ModelShape, ModelSource, TraceConfig, TrainingConfig
from moe_operator.cli_plan import read_trace

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
SHAPE = ModelShape(
    family="qwen3_moe",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=12,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    vocab_size=256,
    max_position_embeddings=128,
)


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    for i in range(80):
        (folder / f"{i}.txt").write_text(f"line {i} of the text that is learned by heart. " * 60)
    return folder


def steps_of(state: RuntimeState) -> int:
    return state.training.step if state.training is not None else 0


@dataclass(frozen=True)
class Ended:
    state: RuntimeState
    output: Path
    traces: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two ranks, of which one was killed in the middle and replaced."""
    folder = tmp_path_factory.mktemp("job")
    output, traces = folder / "out", folder / "traces"
    training = TrainingConfig(
        data=str(text_folder(folder / "text")),
        sequence_length=32,
        sequences_per_rank=2,
        max_steps=400,
        max_seconds=None,
        learning_rate=3e-3,
        warmup_steps=5,
        weight_decay=0.0,
        aux_loss_coefficient=0.01,
        seed=1,
        snapshot_every_steps=10,
        output_path=str(output),
    )
    wish = RuntimeWish(generation=1, ranks=(0, 1), expert_map=spread_map(2, copies=1))
    trace = TraceConfig(folder=str(traces), every_steps=1, max_bytes=50_000_000)
    source = ModelSource(shape=SHAPE)
    with Pods(folder / "run", num_ranks=2, source=source, training=training, trace=trace) as pods:
        pods.start_all(gateways=0)
        pods.put_wish(wish)
        pods.wait_state("steps are made", lambda s: steps_of(s) > 20, within_s=120)
        victim = pods.pods["rank-1"]
        os.kill(victim.rank_pid, signal.SIGKILL)
        pods.wait_state("the loss is noticed", lambda s: bool(s.recoveries), within_s=20)
        pods.start("rank", "rank-1-1", rank=1)
        state = pods.wait_state("the run ends", lambda s: bool(s.training and s.training.done), within_s=150)
        return Ended(state, output, traces)


def test_job_survives_a_killed_rank_and_ends_with_a_checkpoint(job: Ended) -> None:
    assert job.state.training is not None
    assert job.state.training.restored_from_step is not None
    assert job.state.training.step == 400
    assert job.state.failure == ""
    assert job.state.training.heldout_bits_per_byte is not None
    assert job.state.training.heldout_bits_per_byte < 3.0
    assert (job.output / "config.json").is_file()
    assert list(job.output.glob("*.safetensors"))


def test_what_all_three_pods_recorded_is_one_trace_of_every_step(job: Ended) -> None:
    assert len(list(job.traces.glob("*.jsonl"))) == 3
    trace = read_trace(job.traces)  # refuses a step that a rank and its successor both have
    assert len(trace.layers) == SHAPE.num_hidden_layers
    assert len(trace.steps) >= 400, "those that were made again after the snapshot come on top"
