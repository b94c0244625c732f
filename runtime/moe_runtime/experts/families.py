"""Which transformers families this data plane can carry, read from their own parallelism plans, and a clear no for the
rest.

A family qualifies when its expert-parallel plan marks exactly one kind of experts module that text reaches with
`ep_dispatch_experts`: such a module takes (hidden_states, top_k_index, top_k_weights) with global expert ids, and its
parameters are stacked by expert. Nothing here knows a family by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.packing import CONFIG_KEY
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.outcome import InvalidInput, MoeratorError
from moe_runtime.experts.lean_transformers import load_losses_without_scipy
from moe_runtime.experts.packed_config import read_packed

DISPATCH_STYLES = ("ep_dispatch_experts", "moe_tp_experts")
"""What an expert-parallel plan calls such a module; the second name is that of transformers 5.17."""
TOP_K_NAMES = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "top_k")
OTHER_NAMES = {
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": TOP_K_NAMES,
    "moe_intermediate_size": ("intermediate_size",),
    "head_dim": (),
}
"""What a shape's numbers are called where a config does not know the name."""
DENSE_LAYERS_NAMES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
PLAIN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
IRREPLAYABLE_LAYER_TYPES = frozenset({"reference_sliding_attention"})
OTHER_MODALITY = re.compile(r"vision|visual|image|video|audio|talker")
"""Experts that only tokens of pictures or sound reach stay whole on every rank."""


class UnsupportedModel(MoeratorError):
    """A model that cannot run here; the text names the family and the cause.

    >>> str(UnsupportedModel("llama", "its expert-parallel plan marks no module"))
    'model family llama is not supported: its expert-parallel plan marks no module'
    """

    def __init__(self, family: str, why: str) -> None:
        self.family, self.why = family, why
        super().__init__(f"model family {family} is not supported: {why}")


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One MoE layer's experts: the module, its name in the model, the names of its stacked parameters, and how many
    logical experts a full model has there.
    """

    name: str
    module: torch.nn.Module
    parameter_names: tuple[str, ...]
    num_experts: int


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
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModel(f"in {folder}", str(error).split("\n", 1)[0]) from error
    if read_packed(folder) is not None:
        delattr(config, CONFIG_KEY)  # dense weights are plain, and experts are no business of transformers' here
    return config


def _config_of_shape(shape: ModelShape) -> Any:
    """A shape's numbers under the names that the family's config has for them; every layer has experts."""
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(shape.family)
    except ValueError as error:
        raise UnsupportedModel(shape.family, "transformers knows no such model type") from error
    known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    if text_config(default) is not default:
        raise UnsupportedModel(
            shape.family, "it is composite and needs more numbers than a shape has; give a checkpoint"
        )
    if "kv_lora_rank" in known:
        raise UnsupportedModel(shape.family, "latent attention needs more numbers than a shape has; give a checkpoint")
    values = shape.model_dump(exclude={"family"})
    for name, others in OTHER_NAMES.items():
        if name not in known:
            value = values.pop(name)
            values.update({other: value for other in others if other in known})
    if "head_dim" not in known and shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        raise UnsupportedModel(
            shape.family,
            f"its heads are hidden_size / num_attention_heads wide, {shape.head_dim} x {shape.num_attention_heads} "
            f"is not {shape.hidden_size}",
        )
    values.update({name: 0 for name in DENSE_LAYERS_NAMES if name in known})
    values.update({name: 1 for name in ("n_group", "topk_group") if name in known})
    if "sparse" in (getattr(default, "mlp_layer_types", None) or ()):
        values["mlp_layer_types"] = ["sparse"] * shape.num_hidden_layers
    # Ids of special tokens default to a large vocabulary's; a byte-level model has none.
    values.update(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    try:
        return AutoConfig.for_model(shape.family, **values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UnsupportedModel(shape.family, f"a shape is not enough for it: {error}") from error


def build_meta_model(config: Any) -> torch.nn.Module:
    """The language model of `config` without memory (meta device). Raises UnsupportedModel.

    Of a composite (multimodal) model the whole is built, and text is all that it will be given.
    """
    family = str(config.model_type)
    architecture = _architecture_of(config)
    if getattr(config, CONFIG_KEY, None) is not None:
        raise UnsupportedModel(
            family,
            "the checkpoint is quantised by another program; give it in bfloat16 or float32 (`moerator convert "
            "quantise` packs experts)",
        )
    if architecture.config_class is getattr(type(config), "sub_configs", {}).get("text_config"):
        config = config.get_text_config()
    _refuse_irreplayable(config, family)
    # transformers takes sdpa and grouped_mm where the family can, else its eager code (gpt-oss has sinks, for one)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = architecture._from_config(config, dtype=torch.float32)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(family, f"transformers cannot build it from this config: {error}") from error
    return model


def _refuse_irreplayable(config: Any, family: str) -> None:
    types = IRREPLAYABLE_LAYER_TYPES.intersection(getattr(text_config(config), "layer_types", None) or ())
    if types:
        raise UnsupportedModel(
            family,
            f"its {', '.join(sorted(types))} layers treat a prompt otherwise than the tokens generated after it, so a "
            "request could neither be read in parts nor replayed on another rank",
        )


def _architecture_of(config: Any) -> Any:
    """The model class: the one that the checkpoint names, else the family's causal or image-and-text language model."""
    load_losses_without_scipy()
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    known: list[Any] = []
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            known += found if isinstance(found, (tuple, list)) else [found]
    # what reads one sequence and writes another (encoder and decoder, block diffusion) predicts no next token
    known = [one for one in known if "decoder_input_ids" not in signature(one.forward).parameters]
    if not known:
        raise UnsupportedModel(str(config.model_type), "transformers has no causal language model for it")
    named = getattr(config, "architectures", None) or ()
    return next((architecture for architecture in known if architecture.__name__ in named), known[0])


def text_config(config: Any) -> Any:
    """The config of the part that reads and writes text: of a plain model its own."""
    return config.get_text_config(decoder=True)


def shared_windows(config: Any) -> dict[str, int | None] | None:
    """Sliding window (None: full attention) of each type of attention layer, None for a family whose layers keep
    anything beside one key and value per token and head: those get a cache of their own making for every row.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    text = text_config(config)
    types, arguments = get_layer_types_and_kwargs(text)
    # layers that use another layer's keys are left out of the types by transformers 5.17
    if not PLAIN_LAYER_TYPES.issuperset(types) or len(types) != text.num_hidden_layers:
        return None
    if isinstance(arguments, dict):  # and it tells the window once for all layers
        arguments = [{} if layer_type == "full_attention" else arguments for layer_type in types]
    windows: dict[str, int | None] = {}
    for layer_type, argument in zip(types, arguments, strict=True):
        window = argument.get("sliding_window")
        if windows.setdefault(layer_type, window) != window:
            return None
    return windows


def find_experts(model: Any) -> list[ExpertsModule]:
    """The experts modules that text reaches, in layer order. Raises UnsupportedModel."""
    family = str(model.config.model_type)
    # transformers 5.17 keeps it under the second name
    plan: dict[str, str] = getattr(model, "ep_plan", None) or getattr(model, "_ep_plan", None) or {}
    patterns = [name for name, style in plan.items() if style in DISPATCH_STYLES and not OTHER_MODALITY.search(name)]
    if not patterns:
        raise UnsupportedModel(family, f"its expert-parallel plan marks no module with {' or '.join(DISPATCH_STYLES)}")
    if len(patterns) > 1:
        raise UnsupportedModel(family, f"its layers have several experts modules: {', '.join(sorted(patterns))}")
    pattern = re.compile(re.escape(patterns[0]).replace(r"\*", r"\d+") + "$")
    sharded = [n.rsplit(".", 1)[1] for n in plan if n.startswith(patterns[0] + ".")]
    found = [_one(name, module, sharded, family) for name, module in model.named_modules() if pattern.match(name)]
    if not found:
        raise UnsupportedModel(family, f"no module matches {patterns[0]}: every layer of this config is dense")
    if len({entry.num_experts for entry in found}) != 1:
        raise UnsupportedModel(family, "its layers have different numbers of experts")
    return found


def _one(name: str, module: torch.nn.Module, sharded: list[str], family: str) -> ExpertsModule:
    num_experts = getattr(module, "num_experts", None)
    if not isinstance(num_experts, int):
        raise UnsupportedModel(family, f"{name} does not tell its number of experts")
    stacked: list[str] = []
    for own, parameter in module.named_parameters():
        if own not in sharded and ("." in own or parameter.shape[0] != num_experts):
            continue  # all experts share it (a norm): it stays whole on every rank
        if own not in sharded or parameter.shape[0] != num_experts:
            shape = list(parameter.shape)
            raise UnsupportedModel(
                family, f"{name}.{own} {shape}: its plan does not say whether it is stacked by expert"
            )
        stacked.append(own)
    return ExpertsModule(name, module, tuple(stacked), num_experts)


def shared_expert_of(model: torch.nn.Module, entry: ExpertsModule) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The always-on expert beside these experts, [T, D] -> [T, D], if the layer has one under a usual name."""
    block = model.get_submodule(entry.name.rpartition(".")[0])
    for name in ("shared_experts", "shared_expert"):
        shared = getattr(block, name, None)
        if isinstance(shared, torch.nn.Module) and _takes_rows_alone(shared):
            return shared
    return None


def _takes_rows_alone(module: torch.nn.Module) -> bool:
    """Not so where the router weighs the shared experts too: without its weights they answer for nobody."""
    required = [p for p in signature(module.forward).parameters.values() if p.default is Parameter.empty]
    return sum(p.kind in {Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD} for p in required) == 1


def top_k_of(config: Any) -> int:
    """Routed experts per token. Raises UnsupportedModel."""
    for attribute in TOP_K_NAMES:
        value = getattr(config, attribute, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list) and value:
            return max(int(k) for k in value)  # one number per layer
    raise UnsupportedModel(str(config.model_type), "its config does not tell how many experts a token takes")


def facts_of(config: Any, experts: list[ExpertsModule]) -> ModelFacts:
    text = text_config(config)
    return ModelFacts(
        family=str(config.model_type),
        num_layers=len(experts),
        num_experts=experts[0].num_experts,
        top_k=top_k_of(text),
        vocab_size=int(text.vocab_size),
    )


def describe(source: ModelSource) -> tuple[torch.nn.Module, list[ExpertsModule], ModelFacts]:
    """The model without memory, its experts, and what planning needs. Raises UnsupportedModel, OSError."""
    model = build_meta_model(read_config(source))
    entries = find_experts(model)
    facts = facts_of(model.config, entries)
    shape = source.shape
    if shape is not None and (facts.num_layers, facts.num_experts) != (shape.num_hidden_layers, shape.num_experts):
        raise UnsupportedModel(
            facts.family,
            f"a shape of {shape.num_hidden_layers} layers of {shape.num_experts} experts has {facts.num_layers} layers "
            f"of {facts.num_experts}; give a checkpoint",
        )
    return model, entries, facts


def read_facts(source: ModelSource) -> ModelFacts:
    """What planning needs, from the config alone (about a second; no weights). Raises UnsupportedModel, OSError."""
    return describe(source)[2]


def check_map(expert_map: ExpertMap, facts: ModelFacts) -> None:
    """Raises InvalidInput unless the map is for this model."""
    if (expert_map.num_layers, expert_map.num_logical_experts) != (facts.num_layers, facts.num_experts):
        raise InvalidInput(
            f"the map has {expert_map.num_layers} layers of {expert_map.num_logical_experts} experts, "
            f"the {facts.family} model {facts.num_layers} of {facts.num_experts}"
        )
