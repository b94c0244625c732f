"""What the local shell can read of a checkpoint: its config.json, without importing transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_core.facts import ModelFact

MAX_COUNT = 65536
EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_model(folder: Path) -> ModelFact | None:
    """The checkpoint's shape, None when there is no checkpoint (yet); `problem` says why it cannot be served."""
    file = folder / "config.json"
    if not has_checkpoint(folder):
        return None
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        return ModelFact(0, 0, "", problem=f"{file}: {error}")
    if not isinstance(config, dict):
        return ModelFact(0, 0, "", problem=f"{file} holds no JSON object")
    family = str(config.get("model_type", ""))
    try:
        return _shape(config.get("text_config", config), family)
    except (TypeError, ValueError, AttributeError) as error:
        return ModelFact(0, 0, family, problem=f"{file}: {error}")


def _shape(config: Mapping[str, Any], family: str) -> ModelFact:
    counts = [_count(config, name) for name in EXPERT_COUNT_FIELDS if config.get(name)]
    if not counts:
        raise ValueError(f"none of {', '.join(EXPERT_COUNT_FIELDS)}: not an MoE model")
    return ModelFact(counts[0], num_moe_layers(config), family)


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name, 0)
    if not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{name} must be a whole number up to {MAX_COUNT} (got {value!r:.80})")
    return value


def has_checkpoint(folder: Path) -> bool:
    """Whether config and weights are there; a trainer puts one after the other."""
    weights = (path for path in folder.glob("*.safetensors") if path.name != "generalist.safetensors")
    return (folder / "config.json").is_file() and any(weights)


def num_moe_layers(config: Mapping[str, Any]) -> int:
    """Layers with routed experts, by the names transformers' families give to their dense ones.

    >>> num_moe_layers({"num_hidden_layers": 4}), num_moe_layers({"num_hidden_layers": 4, "first_k_dense_replace": 1})
    (4, 3)
    """
    layers = range(_count(config, "num_hidden_layers"))
    if config.get("mlp_layer_types"):
        return sum(1 for kind in config["mlp_layer_types"] if kind == "sparse")
    dense = set(config.get("mlp_only_layers") or ())
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
    return sum(1 for layer in layers if layer >= first and layer not in dense and (layer + 1) % step == 0)
