"""The fitted answers for lost experts, and their files beside a checkpoint's weights.

    generalist.safetensors    layer.{i}.down [E, r, D], layer.{i}.up [E, r, D], layer.{i}.bias [E, D],
                              layer.{i}.shared_scale [E]
    generalist.json           version, per layer and expert the chosen kind and stand-in, and what calibration measured

kind: constant | low_rank | shared (a map, see experts.ladder), stand_in (another expert answers better than any map
while it lives; the map is still there for when it does not), drop (nothing beats giving the weight to the token's
other picks).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TENSOR_FILE = "generalist.safetensors"
JSON_FILE = "generalist.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class LayerGeneralists:
    """One layer. has_map[e]: whether the map answers for e (else: drop); stand_in[e]: the better expert, or -1."""

    down_ERD: torch.Tensor
    up_ERD: torch.Tensor
    bias_ED: torch.Tensor
    shared_scale_E: torch.Tensor
    has_map: tuple[bool, ...]
    stand_in: tuple[int, ...]
    kind: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Generalists:
    layers: tuple[LayerGeneralists, ...]
    report: dict[str, Any] = field(default_factory=dict)
    """What calibration measured; kept for people."""


def write_generalists(generalists: Generalists, folder: Path) -> None:
    """Raises OSError."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for layer_idx, layer in enumerate(generalists.layers):
        tensors[f"layer.{layer_idx}.down"] = layer.down_ERD.contiguous()
        tensors[f"layer.{layer_idx}.up"] = layer.up_ERD.contiguous()
        tensors[f"layer.{layer_idx}.bias"] = layer.bias_ED.contiguous()
        tensors[f"layer.{layer_idx}.shared_scale"] = layer.shared_scale_E.contiguous()
    save_file(tensors, str(folder / TENSOR_FILE))
    document = {
        "version": VERSION,
        "kind": [list(layer.kind) for layer in generalists.layers],
        "has_map": [list(layer.has_map) for layer in generalists.layers],
        "stand_in": [list(layer.stand_in) for layer in generalists.layers],
        "report": generalists.report,
    }
    (folder / JSON_FILE).write_text(json.dumps(document))


def read_generalists(folder: Path) -> Generalists | None:
    """None when the folder holds none. Raises OSError, ValueError for a file that is not ours."""
    from safetensors.torch import load_file

    if not (folder / JSON_FILE).is_file():
        return None
    document = json.loads((folder / JSON_FILE).read_text())
    if document.get("version") != VERSION:
        raise ValueError(f"{folder / JSON_FILE} has version {document.get('version')}, this runtime reads {VERSION}")
    tensors = load_file(str(folder / TENSOR_FILE))
    layers = tuple(
        LayerGeneralists(
            down_ERD=tensors[f"layer.{i}.down"],
            up_ERD=tensors[f"layer.{i}.up"],
            bias_ED=tensors[f"layer.{i}.bias"],
            shared_scale_E=tensors[f"layer.{i}.shared_scale"],
            has_map=tuple(document["has_map"][i]),
            stand_in=tuple(document["stand_in"][i]),
            kind=tuple(kind),
        )
        for i, kind in enumerate(document["kind"])
    )
    return Generalists(layers, document["report"])
