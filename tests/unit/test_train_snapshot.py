"""Snapshots: round trip by logical expert, completeness, refusal of damage."""

import json
from pathlib import Path

import pytest
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_runtime.train.snapshot import (
    DENSE_FILE,
    MANIFEST,
    VERSION,
    Manifest,
    RunState,
    SnapshotDamaged,
    SnapshotReader,
    complete_steps,
    experts_file,
    prune,
    slots_to_write,
    step_folder,
    write_manifest,
    write_tensors,
)

TWO_RANKS_WITH_COPIES = ExpertMap(
    generation=1, num_logical_experts=4, slots_of_rank=(3, 3), logical_of_slot=((0, 1, 2, 3, 0, -1), (2, 0, 2, 1, 3, 2))
)


def _write(output: Path, step: int = 5, identity: str = "run") -> Path:
    """A snapshot of TWO_RANKS_WITH_COPIES; row of expert e in layer l is 10 * l + e."""
    folder = step_folder(output, step)
    plan = slots_to_write(TWO_RANKS_WITH_COPIES, (0, 1))
    digests = {DENSE_FILE: write_tensors(folder, DENSE_FILE, {"norm": torch.ones(3)})}
    for rank, layers in plan.items():
        stacks = {
            f"layer{idx}.w": torch.tensor([[10.0 * idx + e] for _, e in pairs]) for idx, pairs in enumerate(layers)
        }
        digests[experts_file(rank)] = write_tensors(folder, experts_file(rank), stacks)
    experts = {experts_file(r): tuple(tuple(e for _, e in pairs) for pairs in layers) for r, layers in plan.items()}
    write_manifest(folder, Manifest(VERSION, identity, RunState(step=step, cursor=7 * step), digests, experts))
    return folder


def test_every_expert_is_written_exactly_once() -> None:
    plan = slots_to_write(TWO_RANKS_WITH_COPIES, (0, 1))
    for layer_idx in range(2):
        written = sorted(e for layers in plan.values() for _, e in layers[layer_idx])
        assert written == [0, 1, 2, 3]


def test_any_expert_is_read_back_by_its_logical_id(tmp_path: Path) -> None:
    reader = SnapshotReader(_write(tmp_path))
    for layer_idx in range(2):
        for e in range(4):
            row = reader.expert(f"layer{layer_idx}.w", layer_idx=layer_idx, logical_id=e)
            assert row.tolist() == [10.0 * layer_idx + e]
    assert reader.dense()["norm"].tolist() == [1.0, 1.0, 1.0]
    assert reader.manifest.state == RunState(step=5, cursor=35)


@pytest.mark.parametrize("name", [DENSE_FILE, experts_file(1)])
def test_an_altered_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotDamaged, match=name):
        SnapshotReader(path.parent).verify({(0, 3)})


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path) / DENSE_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SnapshotDamaged, match="digest"):
        SnapshotReader(path.parent).dense()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    (folder / experts_file(0)).unlink()
    with pytest.raises(SnapshotDamaged, match="experts-0"):
        SnapshotReader(folder).verify({(0, 0)})


def test_files_that_a_rank_does_not_need_are_not_read(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    (folder / experts_file(1)).unlink()
    reader = SnapshotReader(folder)
    reader.verify({(0, 0), (0, 1)})
    assert reader.expert("layer0.w", layer_idx=0, logical_id=1).tolist() == [1.0]


def test_a_folder_without_manifest_is_an_attempt_that_failed(tmp_path: Path) -> None:
    _write(tmp_path, step=5)
    (_write(tmp_path, step=9) / MANIFEST).unlink()
    assert complete_steps(tmp_path, "run") == [5]


def test_a_broken_manifest_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path, step=5)
    (_write(tmp_path, step=9) / MANIFEST).write_text("{")
    assert complete_steps(tmp_path, "run") == [5]


def test_another_runs_snapshots_do_not_count(tmp_path: Path) -> None:
    _write(tmp_path, step=5, identity="earlier")
    assert complete_steps(tmp_path, "run") == []


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(SnapshotDamaged, match="version 99"):
        SnapshotReader(path.parent)


def test_pruning_keeps_what_it_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _write(tmp_path, step=step)
    prune(tmp_path, keep=(2, 3))
    assert complete_steps(tmp_path, "run") == [3, 2]
