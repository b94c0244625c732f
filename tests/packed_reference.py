"""What packed experts must answer like: transformers' own model with every expert put back from the files, by numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from moe_runtime.experts.families import find_experts

Floats = npt.NDArray[np.float32]


def put_back(model: Any, folder: Path) -> Any:
    """`model` with the experts that lie packed in `folder`, in place."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["experts"]
    files = json.loads((folder / "packed.safetensors.index.json").read_text())["weight_map"]
    for entry in find_experts(model):
        is_turned = getattr(entry.module, "is_transposed", False)
        for name in entry.parameter_names:
            parameter = entry.module.get_parameter(name)
            key = f"moerator.{entry.name}.{name}"
            if key in files:
                value = _read(folder, files, key)
            else:
                columns = parameter.shape[1 if is_turned else 2]
                codes = _read(folder, files, f"{key}.codes")
                scales = _read(folder, files, f"{key}.scales") if f"{key}.scales" in files else None
                size = config["group_size"] or columns
                value = _decoded(codes, scales, is_int4=config["precision"] == "Int4", size=size, columns=columns)
                value = value.transpose(0, 2, 1) if is_turned else value
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return model


def _decoded(codes: Floats, scales: Floats | None, *, is_int4: bool, size: int, columns: int) -> Floats:
    if scales is None:
        return codes
    if is_int4:
        whole = codes.astype(np.int64)
        codes = (np.stack([whole % 16, whole // 16], axis=-1).reshape(*codes.shape[:-1], -1) - 8).astype(np.float32)
    return codes[..., :columns] * np.repeat(scales, size, axis=-1)[..., :columns]


def _read(folder: Path, files: dict[str, str], key: str) -> Floats:
    with safe_open(str(folder / files[key]), framework="pt") as file:
        tensor: Floats = file.get_tensor(key).float().numpy()
    return tensor
