"""What the local shell can read of a checkpoint: its config.json, without importing transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_core.contract.families import why_refused
from moe_core.contract.packing import CONFIG_KEY, METHOD, PackedConfig, Packing
from moe_core.facts import ModelFact
from moe_core.outcome import InvalidInput

MAX_COUNT = 65536
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`config` is the text model's part of config.json; empty where the fact has a problem."""

    fact: ModelFact
    config: Mapping[str, Any] = field(default_factory=dict)


def read_model(folder: Path) -> ModelFact | None:
    """The checkpoint's shape, None when there is no checkpoint (yet); `problem` says why it cannot be served."""
    found = read_checkpoint(folder)
    return None if found is None else found.fact


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The same with the config that it was read from."""
    file = folder / "config.json"
    if not has_checkpoint(folder):
        pickled = sorted(path.name for kind in PICKLED for path in folder.glob(kind))
        told = f"{folder}: weights are read from safetensors only, and there is {', '.join(pickled[:3])}"
        return Checkpoint(ModelFact(0, 0, "", problem=told)) if pickled and file.is_file() else None
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        return Checkpoint(ModelFact(0, 0, "", problem=f"{file}: {error}"))
    if not isinstance(config, dict):
        return Checkpoint(ModelFact(0, 0, "", problem=f"{file} holds no JSON object"))
    family = str(config.get("model_type", ""))
    text_config = config.get("text_config", config)
    try:
        shape = _shape(text_config, family)
    except (TypeError, ValueError, AttributeError) as error:
        return Checkpoint(ModelFact(0, 0, family, problem=f"{file}: model type {family or 'unknown'}: {error}"))
    refused, packed = why_refused(family), None
    if refused is None and config.get(CONFIG_KEY):
        packed, refused = _packed(config[CONFIG_KEY], family)
    if refused is not None:
        return Checkpoint(ModelFact(0, 0, family, problem=f"{file}: {refused}"))
    return Checkpoint(replace(shape, packing=packed), text_config)


def _packed(found: Any, family: str) -> tuple[Packing | None, str | None]:
    """How experts are packed, or why nobody here can read them."""
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        told = "the checkpoint is quantised by another program; give it in bfloat16 or float32"
        return None, f"model family {family} is not supported: {told} (`moerator convert quantise` packs experts)"
    try:
        return PackedConfig.parse(json.dumps(found)).experts, None
    except InvalidInput as error:
        return None, str(error)


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
    for name in ("mlp_layer_types", "layers_block_type"):
        if config.get(name):
            return sum(1 for kind in config[name] if kind == "sparse" or str(kind).endswith("moe"))
    dense = set(config.get("mlp_only_layers") or ())
    first = max(_whole(config, name) for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"))
    num_layers = _count(config, "num_hidden_layers")
    last = _whole(config, "moe_layer_end_index", num_layers - 1)
    step = max(1, *(_whole(config, name) for name in ("decoder_sparse_step", "moe_layer_interval")))
    period, offset = max(1, _whole(config, "expert_layer_period")), _whole(config, "expert_layer_offset")
    return sum(
        1
        for layer in range(first, min(last, num_layers - 1) + 1)
        if layer not in dense and (layer + 1) % step == 0 and layer % period == offset
    )


def _whole(config: Mapping[str, Any], name: str, default: int = 0) -> int:
    value = config.get(name)
    return default if value is None or value == -1 else _count(config, name)
