"""A checkpoint whose experts are packed: its files, read expert by expert and written layer by layer.

    config.json                      the family's, with how experts are packed under `quantization_config`
    packed.safetensors.index.json    weight_map: tensor -> file; metadata.digests: experts module -> digest per expert
    packed-dense-*.safetensors       everything but routed experts, named as in the checkpoint it was packed from
    packed-experts-*.safetensors     one per MoE layer: `moerator.<experts module>.<stack>` [E, ...], see packing.py

No file has a name that transformers looks for: it says that there are no weights instead of filling experts at random.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from moe_core.contract.base import WireModel
from moe_core.outcome import InvalidInput
from moe_runtime.experts.digest import slot_digests
from moe_runtime.experts.families import ExpertsModule
from moe_runtime.experts.packing import LayerPacking, Stacks
from moe_runtime.experts.weights import CheckpointWeights

INDEX = "packed.safetensors.index.json"
PREFIX = "moerator."
DENSE_FILE_BYTES = 4 << 30


class Metadata(WireModel):
    digests: dict[str, tuple[int, ...]]


class Index(WireModel):
    metadata: Metadata
    weight_map: dict[str, str]


class PackedExperts(CheckpointWeights):
    """Dense tensors as any checkpoint's, experts as the stacks that lie in slots. Each is held against its digest."""

    def __init__(self, folder: Path, model: torch.nn.Module) -> None:
        index = Index.parse((folder / INDEX).read_text())
        super().__init__(folder, model, file_of_key=index.weight_map, beside=PREFIX)
        self._digests = index.metadata.digests

    def read_experts(self, entry: ExpertsModule, parameter_name: str, logical_ids: Sequence[int]) -> torch.Tensor:
        raise InvalidInput(f"{self.folder}: {entry.name}.{parameter_name} of {list(logical_ids)} is packed")

    def read_stacks(self, entry: ExpertsModule, packing: LayerPacking, logical_ids: Sequence[int]) -> Stacks:
        """[len(logical_ids), ...]. Raises InvalidInput for what is missing, of another shape, or damaged."""
        stacks: Stacks = {}
        for name, blank in packing.blank(0).items():
            key = f"{PREFIX}{entry.name}.{name}"
            if key not in self.file_of_key:
                raise InvalidInput(f"{self.folder} lacks {key}")
            rows = self._slice(key)
            shape = [entry.num_experts, *blank.shape[1:]]
            if rows.get_shape() != shape:
                raise InvalidInput(f"{self.folder}: {key} has shape {rows.get_shape()}, the model wants {shape}")
            stacks[name] = torch.stack([rows[logical_id] for logical_id in logical_ids])
            if stacks[name].dtype != blank.dtype:
                raise InvalidInput(f"{self.folder}: {key} is {stacks[name].dtype}, {packing.packing} is {blank.dtype}")
        written = self._digests.get(entry.name, ())
        for logical_id, digest in zip(logical_ids, slot_digests(stacks, logical_ids), strict=True):
            if logical_id >= len(written) or written[logical_id] != digest:
                file = self.file_of_key[f"{PREFIX}{entry.name}.{next(iter(stacks))}"]
                raise InvalidInput(
                    f"{self.folder / file}: expert {logical_id} of {entry.name} is not what was written: "
                    "the file is damaged or of another checkpoint"
                )
        return stacks


class PackedWriter:
    """Writes the files one after the other; `close` writes the index, which makes a checkpoint of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of_key: dict[str, str] = {}
        self._digests: dict[str, tuple[int, ...]] = {}

    def write_dense(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Cut into files of a bounded size."""
        part: dict[str, torch.Tensor] = {}
        number = num_bytes = 0
        for key, tensor in tensors:
            if part and num_bytes + tensor.nbytes > DENSE_FILE_BYTES:
                self._save(f"packed-dense-{number:05}.safetensors", part)
                part, number, num_bytes = {}, number + 1, 0
            part[key] = tensor
            num_bytes += tensor.nbytes
        self._save(f"packed-dense-{number:05}.safetensors", part)

    def write_experts(self, entry: ExpertsModule, stacks: Stacks) -> None:
        """All experts of a layer, [E, ...]."""
        number = len(self._digests)
        self._save(
            f"packed-experts-{number:05}.safetensors",
            {f"{PREFIX}{entry.name}.{name}": stack.contiguous() for name, stack in stacks.items()},
        )
        self._digests[entry.name] = slot_digests(stacks, range(entry.num_experts))

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file(tensors, str(self._folder / name))
        (self._folder / name).chmod(0o644)  # safetensors writes for its owner only, and a pod is somebody else
        self._file_of_key |= dict.fromkeys(tensors, name)

    def close(self) -> None:
        index = Index(metadata=Metadata(digests=self._digests), weight_map=self._file_of_key)
        (self._folder / INDEX).write_text(index.canonical())
