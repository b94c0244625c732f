"""Snapshots: what a run needs to go on after a lost rank, written by all ranks into one shared folder.

    <output>/.snapshots/step-00000050/dense.safetensors       dense tensors and their optimizer state, by position 0
                                      experts-<rank>.safetensors   the experts that this rank is first to hold
                                      manifest.json           who wrote what, digests; its presence means complete

Experts are stored by logical id, so that any rank can pick up any expert, whatever the layout it was written under.
Every file is written under another name and renamed; a folder without manifest is an attempt that failed. The folder
must be seen by all ranks: a volume that many pods may mount.

SnapshotDamaged   a file is missing, cut or altered: the digest names it
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap

FOLDER = ".snapshots"
MANIFEST = "manifest.json"
DENSE_FILE = "dense.safetensors"
KEPT = 2
VERSION = 1


class SnapshotDamaged(ValueError):
    """The snapshot cannot be trusted; the message names the file."""


@dataclass(frozen=True, slots=True)
class RunState:
    """The counters of a run; tensors lie beside it. `cursor` counts windows of text, `seconds` time in steps."""

    step: int = 0
    cursor: int = 0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """`identity` names the run; `digests` file -> SHA-256; `experts` file -> per MoE layer the logical ids of its
    rows.
    """

    version: int
    identity: str
    state: RunState
    digests: dict[str, str]
    experts: dict[str, tuple[tuple[int, ...], ...]]


def experts_file(rank: int) -> str:
    return f"experts-{rank}.safetensors"


def step_folder(output: Path, step: int) -> Path:
    return output / FOLDER / f"step-{step:08d}"


def slots_to_write(expert_map: ExpertMap, ranks: Sequence[int]) -> dict[int, tuple[tuple[tuple[int, int], ...], ...]]:
    """Per living rank and MoE layer the (local slot, logical id) it writes: every expert once, by the first that has
    it.
    """
    plan: dict[int, list[tuple[tuple[int, int], ...]]] = {rank: [] for rank in ranks}
    for row in expert_map.logical_of_slot:
        written: set[int] = set()
        for rank in ranks:
            mine = []
            for local, slot_id in enumerate(expert_map.slot_range(rank)):
                logical_id = row[slot_id]
                if logical_id != EMPTY_SLOT and logical_id not in written:
                    written.add(logical_id)
                    mine.append((local, logical_id))
            plan[rank].append(tuple(mine))
    return {rank: tuple(layers) for rank, layers in plan.items()}


def write_tensors(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write one file atomically; returns its SHA-256 in hex."""
    from safetensors.torch import save

    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    write_file(folder / name, data)
    return hashlib.sha256(data).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """The whole content or nothing for whoever reads while we live.

    Not forced to disk: that can take longer than a collective may, and what a stopped machine cuts short the digests
    find.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def complete_steps(output: Path, identity: str) -> list[int]:
    """Steps with a readable manifest of this run, newest first."""
    steps = []
    for path in (output / FOLDER).glob(f"step-*/{MANIFEST}"):
        try:
            manifest = read_manifest(path.parent)
        except SnapshotDamaged:
            continue
        if manifest.identity == identity:
            steps.append(manifest.state.step)
    return sorted(steps, reverse=True)


def prune(output: Path, *, keep: Iterable[int]) -> None:
    """Remove every snapshot folder but those of `keep`; only one rank may do that."""
    kept = {step_folder(output, step) for step in keep}
    for path in (output / FOLDER).glob("step-*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """Raises SnapshotDamaged."""
    try:
        raw: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if raw["version"] != VERSION:
            raise SnapshotDamaged(f"{folder} has version {raw['version']}, this runtime reads {VERSION}")
        return Manifest(
            version=raw["version"],
            identity=raw["identity"],
            state=RunState(**raw["state"]),
            digests=dict(raw["digests"]),
            experts={file: tuple(map(tuple, layers)) for file, layers in raw["experts"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, SnapshotDamaged):
            raise
        raise SnapshotDamaged(f"{folder / MANIFEST}: {error}") from error


class SnapshotReader:
    """One complete snapshot. Files are verified against their digests when first read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.manifest = read_manifest(folder)
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._file_of = {
            (layer_idx, logical_id): (file, row)
            for file, layers in self.manifest.experts.items()
            for layer_idx, logical_ids in enumerate(layers)
            for row, logical_id in enumerate(logical_ids)
        }

    def dense(self) -> dict[str, torch.Tensor]:
        """Dense tensors and optimizer state by key. Raises SnapshotDamaged."""
        return self._load(DENSE_FILE)

    def expert(self, key: str, *, layer_idx: int, logical_id: int) -> torch.Tensor:
        """One expert's row of the stacked tensor `key`. Raises SnapshotDamaged."""
        try:
            file, row = self._file_of[layer_idx, logical_id]
        except KeyError as error:
            raise SnapshotDamaged(f"{self._folder} lacks expert {logical_id} of layer {layer_idx}") from error
        return self._load(file)[key][row]

    def verify(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Read the dense file and those with the (layer, logical expert) in `wanted`. Raises SnapshotDamaged."""
        self._load(DENSE_FILE)
        for layer_idx, logical_id in wanted:
            place = self._file_of.get((layer_idx, logical_id))
            if place is None:
                raise SnapshotDamaged(f"{self._folder} lacks expert {logical_id} of layer {layer_idx}")
            self._load(place[0])

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._tensors:
            from safetensors.torch import load

            try:
                data = (self._folder / file).read_bytes()
            except OSError as error:
                raise SnapshotDamaged(f"{self._folder / file}: {error}") from error
            digest = hashlib.sha256(data).hexdigest()
            if digest != self.manifest.digests.get(file):
                raise SnapshotDamaged(
                    f"{self._folder / file} has digest {digest[:16]}, its manifest says "
                    f"{self.manifest.digests.get(file, 'nothing')[:16]}"
                )
            self._tensors[file] = load(data)
        return self._tensors[file]
