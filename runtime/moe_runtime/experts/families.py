"""Which transformers families this data plane can carry, read from their own parallelism plans, and a clear no for the
rest.

A family qualifies when its expert-parallel plan marks exactly one kind of experts module with `ep_dispatch_experts`:
such a module takes (hidden_states, top_k_index, top_k_weights) with global expert ids, and its parameters are stacked
by expert. Nothing here knows a family by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.outcome import InvalidInput, MoeratorError

DISPATCH_STYLE = "ep_dispatch_experts"
CACHEABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class UnsupportedModel(MoeratorError):
    """A model that cannot run here; the text names the family and the cause.

    >>> str(UnsupportedModel("jamba", "keeps recurrent state"))
    'model family jamba is not supported: keeps recurrent state'
    """

    def __init__(self, family: str, why: str) -> None:
        self.family, self.why = family, why
        super().__init__(f"model family {family} is not supported: {why}")


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One MoE layer's experts: the module, its name in the model and the names of its stacked parameters."""

    name: str
    module: torch.nn.Module
    parameter_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs to know of a model; read without any weights."""

    family: str
    num_layers: int
    """MoE layers; dense layers are not counted."""
    num_experts: int
    top_k: int
    vocab_size: int


def read_config(source: ModelSource) -> Any:
    """The transformers config of a checkpoint folder or a shape. Raises UnsupportedModel, OSError."""
    from transformers import AutoConfig

    if source.shape is not None:
        return _config_of_shape(source.shape)
    assert source.path is not None  # ModelSource holds exactly one of the two
    folder = Path(source.path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModel(f"in {folder}", str(error).split("\n", 1)[0]) from error


def _config_of_shape(shape: ModelShape) -> Any:
    from transformers import AutoConfig

    values = shape.model_dump(exclude={"family"})
    try:
        default = AutoConfig.for_model(shape.family)
    except ValueError as error:
        raise UnsupportedModel(shape.family, "transformers knows no such model type") from error
    if hasattr(default, "kv_lora_rank"):
        raise UnsupportedModel(shape.family, "latent attention needs more numbers than a shape has; give a checkpoint")
    if not hasattr(default, "moe_intermediate_size"):
        values["intermediate_size"] = values.pop("moe_intermediate_size")
    if not hasattr(default, "head_dim"):
        head_dim = values.pop("head_dim")
        if head_dim * shape.num_attention_heads != shape.hidden_size:
            raise UnsupportedModel(
                shape.family,
                f"its heads are hidden_size / num_attention_heads wide, {head_dim} x {shape.num_attention_heads} "
                f"is not {shape.hidden_size}",
            )
    # Ids of special tokens default to a large vocabulary's; a byte-level model has none.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoConfig.for_model(shape.family, **values, **special)


def build_meta_model(config: Any) -> torch.nn.Module:
    """The causal language model of `config` without memory (meta device). Raises UnsupportedModel."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family = str(config.model_type)
    if config.get_text_config() is not config:
        raise UnsupportedModel(family, "it is a composite (multimodal) model; only plain text models work today")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(family, "transformers has no causal language model for it")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(family, "the checkpoint is quantised; convert it to bfloat16 or float32 first")
    attention_windows(config)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # sdpa takes any 4D mask; where a family cannot use it (gpt-oss has sinks) its eager attention does.
    attention = "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=False, dtype=torch.float32
        )
    return model


def attention_windows(config: Any) -> dict[str, int | None]:
    """Sliding window (None: full attention) of every type of attention layer that the model has.

    Raises UnsupportedModel for layers whose state a failed step could not roll back (recurrent, indexed, chunked).
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    family = str(config.model_type)
    types, arguments = get_layer_types_and_kwargs(config)
    unknown = sorted(set(types) - CACHEABLE_LAYER_TYPES)
    if unknown:
        raise UnsupportedModel(
            family, f"its layers of type {', '.join(unknown)} keep a state that a failed step could not roll back yet"
        )
    windows: dict[str, int | None] = {}
    for layer_type, argument in zip(types, arguments, strict=True):
        window = argument.get("sliding_window")
        if windows.setdefault(layer_type, window) != window:
            raise UnsupportedModel(
                family, f"its layers have different sliding windows: {windows[layer_type]}, {window}"
            )
    return windows


def find_experts(model: torch.nn.Module) -> list[ExpertsModule]:
    """The experts modules in layer order. Raises UnsupportedModel."""
    config: Any = model.config
    family = str(config.model_type)
    plan: dict[str, str] = getattr(config, "base_model_ep_plan", None) or {}
    patterns = [name for name, style in plan.items() if style == DISPATCH_STYLE]
    if not patterns:
        raise UnsupportedModel(family, f"its expert-parallel plan marks no module with {DISPATCH_STYLE}")
    if len(patterns) > 1:
        raise UnsupportedModel(family, f"its layers have several experts modules: {', '.join(sorted(patterns))}")
    pattern = re.compile(r"(^|\.)" + re.escape(patterns[0]).replace(r"\*", r"\d+") + "$")
    sharded = [n.rsplit(".", 1)[1] for n in plan if n.startswith(patterns[0] + ".")]
    found = [_one(name, module, sharded, family) for name, module in model.named_modules() if pattern.search(name)]
    if not found:
        raise UnsupportedModel(family, f"no module matches {patterns[0]}: every layer of this config is dense")
    if len({entry.module.num_experts for entry in found}) != 1:
        raise UnsupportedModel(family, "its layers have different numbers of experts")
    return found


def _one(name: str, module: torch.nn.Module, sharded: list[str], family: str) -> ExpertsModule:
    num_experts = getattr(module, "num_experts", None)
    if not isinstance(num_experts, int):
        raise UnsupportedModel(family, f"{name} does not tell its number of experts")
    own = [n for n, _ in module.named_parameters()]
    names = tuple(n for n in own if n in sharded)
    for parameter_name in own:
        shape = tuple(module.get_parameter(parameter_name).shape)
        if parameter_name not in sharded or shape[0] != num_experts:
            raise UnsupportedModel(family, f"{name}.{parameter_name} {list(shape)} is not stacked by expert")
    return ExpertsModule(name, module, names)


def shared_expert_of(model: torch.nn.Module, entry: ExpertsModule) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The always-on expert beside these experts, [T, D] -> [T, D], if the layer has one under a usual name."""
    block = model.get_submodule(entry.name.rpartition(".")[0])
    for name in ("shared_experts", "shared_expert"):
        shared = getattr(block, name, None)
        if isinstance(shared, torch.nn.Module):
            return shared
    return None


def top_k_of(config: Any) -> int:
    """Routed experts per token. Raises UnsupportedModel."""
    for attribute in ("num_experts_per_tok", "moe_top_k", "moe_topk", "num_experts_per_token", "top_k"):
        value = getattr(config, attribute, None)
        if isinstance(value, int):
            return value
    raise UnsupportedModel(str(config.model_type), "its config does not tell how many experts a token takes")


def facts_of(config: Any, experts: list[ExpertsModule]) -> ModelFacts:
    return ModelFacts(
        family=str(config.model_type),
        num_layers=len(experts),
        num_experts=len(experts[0].module.get_parameter(experts[0].parameter_names[0])),
        top_k=top_k_of(config),
        vocab_size=int(config.vocab_size),
    )


def read_facts(source: ModelSource) -> ModelFacts:
    """What planning needs, from the config alone (about a second; no weights). Raises UnsupportedModel, OSError."""
    config = read_config(source)
    return facts_of(config, find_experts(build_meta_model(config)))


def check_map(expert_map: ExpertMap, facts: ModelFacts) -> None:
    """Raises InvalidInput unless the map is for this model."""
    if (expert_map.num_layers, expert_map.num_logical_experts) != (facts.num_layers, facts.num_experts):
        raise InvalidInput(
            f"the map has {expert_map.num_layers} layers of {expert_map.num_logical_experts} experts, "
            f"the {facts.family} model {facts.num_layers} of {facts.num_experts}"
        )
