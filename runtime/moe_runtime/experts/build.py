"""From a source and a map to a model in memory: dense weights whole, experts as this rank's slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.packing import FULL, Packing
from moe_core.contract.router import LocalityConfig
from moe_core.contract.runtime_config import DispatchConfig, ModelSource
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.plan import logical_of_local_slot, make_plan
from moe_runtime.dispatch.step import StepContext
from moe_runtime.dispatch.stopwatch import Stopwatch
from moe_runtime.dispatch.wire import Legs
from moe_runtime.experts.families import (
    ExpertsModule,
    ModelFacts,
    UnsupportedModel,
    check_map,
    describe,
    shared_expert_of,
)
from moe_runtime.experts.gates import check_gates
from moe_runtime.experts.imitate import imitated
from moe_runtime.experts.packed_config import packing_of, read_packed
from moe_runtime.experts.packed_files import PackedExperts
from moe_runtime.experts.packing import LayerPacking
from moe_runtime.experts.routed import Routed, RouterRequest, make_routed, restored, with_locality
from moe_runtime.experts.router_files import read_router
from moe_runtime.experts.slots import SlottedExperts
from moe_runtime.experts.weights import CheckpointWeights, SeedWeights, WeightSource


@dataclass(frozen=True, slots=True)
class BuiltModel:
    module: torch.nn.Module
    facts: ModelFacts
    expert_map: ExpertMap
    layers: tuple[SlottedExperts, ...]
    context: StepContext
    device: str
    routed: Routed | None
    """Routers of ours; None: the family's own."""
    packing: Packing
    """How this rank keeps its experts."""


def open_weights(source: ModelSource, model: torch.nn.Module, *, seed: int) -> WeightSource:
    """Raises OSError for a folder that cannot be read, InvalidInput."""
    if source.path is None:
        return SeedWeights(seed, model)
    folder = Path(source.path)
    return CheckpointWeights(folder, model) if read_packed(folder) is None else PackedExperts(folder, model)


def build(
    source: ModelSource,
    *,
    expert_map: ExpertMap,
    rank: int,
    device: str,
    seed: int,
    dispatch: DispatchConfig,
    router: RouterRequest | None = None,
    locality: LocalityConfig | None = None,
) -> BuiltModel:
    """A checkpoint's own routers come with it; `router` is for a model that has none. With `locality` a model whose
    family routes gets routers of ours, too, which are its equals but for that.

    Raises UnsupportedModel, InvalidInput (map, router and model disagree), OSError.
    """
    model, entries, facts = describe(source)
    check_map(expert_map, facts)
    expert_names = frozenset(f"{entry.name}.{name}" for entry in entries for name in entry.parameter_names)
    _materialise_dense(model, expert_names)
    weights = open_weights(source, model, seed=seed)
    _fill_buffers(model)
    weights.fill_dense(model, expert_names)
    plan = make_plan(expert_map, range(expert_map.num_ranks), rank=rank, device=device)
    pending_LE = torch.zeros(facts.num_layers, facts.num_experts, dtype=torch.int64, device=device)
    context = StepContext(
        plan=plan,
        group=None,
        num_experts=facts.num_experts,
        pending_LE=pending_LE,
        stopwatch=Stopwatch(device),
        legs=Legs.of(dispatch=dispatch.wire, combine=dispatch.combine_wire),
        hierarchy=dispatch.hierarchy,
        overlap=dispatch.overlap,
    )
    packing = packing_of(source)
    layers = tuple(
        SlottedExperts(
            entry,
            layer_idx,
            context,
            shared_expert_of(model, entry),
            packing=None if packing == FULL else LayerPacking(entry, packing, family=facts.family),
        )
        for layer_idx, entry in enumerate(entries)
    )
    for layer in layers:
        logical_of_slot = logical_of_local_slot(expert_map, rank, layer.layer_idx)
        layer.install(layer.read(weights, logical_of_slot), logical_of_slot, device)
    model.to(device)
    model.eval()
    _check_mixture(facts, layers)
    with context.without_experts():
        routed = _routers(source, model, entries, router, facts=facts, seed=seed)
        if locality is not None:
            routed = with_locality(
                model, entries, routed or imitated(model, entries, facts=facts), locality, facts=facts
            )
        if routed is not None:
            routed.to(device)
            check_gates(model, entries, [layer.gate for layer in routed.layers])
    if routed is not None:
        routed.watch(model)
        for layer, layer_router in zip(layers, routed.layers, strict=True):
            layer.router = layer_router
    return BuiltModel(model, facts, expert_map, layers, context, device, routed, packing)


def _routers(
    source: ModelSource,
    model: torch.nn.Module,
    entries: Sequence[ExpertsModule],
    asked: RouterRequest | None,
    *,
    facts: ModelFacts,
    seed: int,
) -> Routed | None:
    saved = None if source.path is None else read_router(Path(source.path), router_class=source.router_class)
    if saved is None:
        if asked is None:
            return None
        return make_routed(model, entries, asked, facts=facts, seed=seed)
    if asked is not None and asked.config != saved.config:
        raise InvalidInput(f"{source.path} was trained with another router: {saved.config.canonical()}")
    return restored(model, entries, saved, facts=facts)


def _materialise_dense(model: torch.nn.Module, expert_names: frozenset[str]) -> None:
    """Zeros in place of everything on the meta device but the experts; tied parameters stay one."""
    made: dict[int, torch.nn.Parameter] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if prefix + name not in expert_names:
                real = made.setdefault(id(parameter), torch.nn.Parameter(torch.zeros_like(parameter, device="cpu")))
                module.register_parameter(name, real)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")


def _fill_buffers(model: torch.nn.Module) -> None:
    """Buffers that checkpoints do not hold (rotary frequencies) are computed by the family's own initialisation."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[operator]


def _check_mixture(facts: ModelFacts, layers: tuple[SlottedExperts, ...]) -> None:
    """The mixture must be a weighted sum of what single experts give: dispatch computes it so.

    A family that normalises over a token's experts inside the module is found here, whatever it is called.
    """
    layer = next((entry for entry in layers if entry.logical_of_slot), None)
    if layer is None:
        return
    module: Any = layer.entry.module
    # [S, D, F] or [S, F, D]; D is not always hidden_size
    dim = module.down_proj.shape[2 if getattr(module, "is_transposed", False) else 1]
    device = module.down_proj.device
    x_TD = torch.linspace(-1, 1, 2 * dim, device=device).view(2, dim)
    slot_TK = torch.zeros(2, 2, dtype=torch.long, device=device)
    weight_TK = torch.tensor([[0.2, 0.5], [0.1, 0.3]], device=device)
    with torch.no_grad():
        single_TD = layer.run_slots(x_TD, slot_TK[:, 0])
        mixed_TD = layer.store.run(layer.compute.family_forward, x_TD, slot_TK, weight_TK)
    if not torch.allclose(mixed_TD, single_TD * weight_TK.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5):
        raise UnsupportedModel(facts.family, "its experts module does more than a weighted sum over a token's experts")
