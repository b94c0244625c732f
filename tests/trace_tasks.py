"""What rank processes do in the tests of traces and traffic: steps over a real group, and what it sent meanwhile."""

from pathlib import Path
from typing import Any

import torch

from gloo_ranks import join_group
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource, TraceConfig
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.errors import GroupFault
from moe_runtime.rank.recorder import Recorder
from numerics_tasks import Fault, FaultyGroup
from train_tasks import config_for, trainer_for

NUM_STEPS = 6


def recorder_for(folder: str, rank: int) -> Recorder:
    config = TraceConfig(folder=folder, every_steps=1, max_bytes=100_000_000)
    return Recorder(config, name="tiny", rank=rank, pod_uid="p", say=print)


def written(recorder: Recorder) -> None:
    """Returns when everything taken is in the file."""
    with recorder._news:
        assert recorder._news.wait_for(lambda: not recorder._waiting, timeout=20)


def serve(
    rank: int, store_path: str, *, model: str, folder: str, expert_map: ExpertMap, world: int, rows: int, length: int
) -> dict[str, Any]:
    """Steps of `rows` sequences of `length` tokens on each rank, every step other texts; bytes sent by position."""
    epm = ExpertParallelModel.load(ModelSource(path=model), expert_map=expert_map, rank=rank)
    recorder = recorder_for(folder, rank)
    epm.record(recorder.take)
    generator = torch.Generator().manual_seed(rank)
    with join_group(store_path, ranks=range(world), rank=rank) as group:
        epm.bind(group)
        cache = epm.new_cache(num_rows=rows, max_length=length)
        positions = torch.arange(length).repeat(rows, 1)
        for step in range(NUM_STEPS):
            recorder.step = step
            ids = torch.randint(0, 256, (rows, length), generator=generator)
            epm.forward_tokens(ids, positions, range(rows), cache, tokens_of_rank=(rows * length,) * world)
            epm.commit()
            for row in range(rows):
                cache.free(row)
        sent = list(group.sent_bytes)
    written(recorder)
    return {"sent": sent, "load": epm.load_window()}


def train(
    rank: int, store_path: str, *, output: str, text: str, folder: str, expert_map: ExpertMap, world: int
) -> dict[str, Any]:
    """Optimizer steps; bytes sent by position in them, snapshots and restoring left out."""
    config = config_for(Path(output), Path(text), num_ranks=world, snapshot_every_steps=1000)
    trainer = trainer_for(config, expert_map, rank)
    recorder = recorder_for(folder, rank)
    trainer.epm.record(recorder.take)
    with join_group(store_path, ranks=range(world), rank=rank) as group:
        trainer.epm.bind(group)
        trainer.bind(group)
        trainer.restore()
        before = list(group.sent_bytes)
        for step in range(NUM_STEPS):
            recorder.step = step
            trainer.step()
        sent = [after - b for after, b in zip(group.sent_bytes, before, strict=True)]
    written(recorder)
    return {"sent": sent, "load": trainer.epm.load_window()}


def serve_through_fault(
    rank: int, store_path: str, *, model: str, folder: str, expert_map: ExpertMap, world: int, fault: Fault
) -> dict[str, Any]:
    """Two steps; in the second one `fault` takes a rank, the others roll back and run it again among themselves."""
    epm = ExpertParallelModel.load(ModelSource(path=model), expert_map=expert_map, rank=rank)
    recorder = recorder_for(folder, rank)
    epm.record(recorder.take)
    group: Any = join_group(store_path, ranks=range(world), rank=rank)
    if fault.victim == rank:
        group = FaultyGroup(group, fault)
    epm.bind(group)
    cache = epm.new_cache(num_rows=1, max_length=16)
    ids, positions = torch.arange(8).view(1, 8) + rank, torch.arange(8).view(1, 8)
    faults = 0
    for step in range(2):
        recorder.step = step
        part = slice(4 * step, 4 * step + 4)
        try:
            epm.forward_tokens(ids[:, part], positions[:, part], (0,), cache)
        except GroupFault:
            faults += 1
            epm.rollback()
            group.destroy()
            group = join_group(store_path, ranks=[r for r in range(world) if r != fault.victim], rank=rank, epoch=2)
            epm.bind(group)
            epm.forward_tokens(ids[:, part], positions[:, part], (0,), cache)
        epm.commit()
    written(recorder)
    return {"faults": faults, "load": epm.load_window()}
