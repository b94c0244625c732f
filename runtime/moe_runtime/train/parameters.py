"""The tensors of a run on this rank: what is trained, by which rule, and under which key a snapshot holds it.

A parameter's key is its name in the transformers model; the optimizer's state lies beside it as `name#moment`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.contract.runtime_config import TrainingConfig
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.routed import PREFIX
from moe_runtime.train.optim import Optimizer, Trained, rule_for
from moe_runtime.train.snapshot import SnapshotReader


def optimizer_for(epm: ExpertParallelModel, config: TrainingConfig) -> Optimizer:
    """A fresh one over this rank's dense parameters and slots."""
    module: Any = epm.module
    faces = (module.get_input_embeddings(), module.get_output_embeddings())
    embeddings = {id(face.weight) for face in faces if face is not None}
    experts = {item.name: item.parameter for item in epm.expert_parameters()}
    trained = []
    for name, parameter in [*epm.dense_parameters(), *experts.items()]:
        if not parameter.requires_grad:
            continue  # a gate that is frozen: nothing moves it, weight decay neither
        rule = rule_for(
            parameter,
            optimizer="AdamW" if name.startswith(PREFIX) else config.optimizer,
            per_expert=name in experts,
            is_embedding=id(parameter) in embeddings,
            num_experts=epm.num_experts,
        )
        trained.append(Trained(name, parameter, rule, name in experts))
    return Optimizer(trained, learning_rate=config.learning_rate, weight_decay=config.weight_decay)


def dense_tensors(epm: ExpertParallelModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Dense parameters, their optimizer state and the model's saved buffers, the live ones, by key."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in epm.dense_parameters():
        found.update(keyed(name, parameter, optimizer))
    found.update(epm.dense_buffers())
    return found


def keyed(name: str, parameter: torch.Tensor, optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter and its optimizer state, the live ones, by key."""
    yield name, parameter.detach()
    for moment, tensor in optimizer.state.get(name, {}).items():
        yield f"{name}#{moment}", tensor


def slot_tensors(
    epm: ExpertParallelModel, optimizer: Optimizer, slots_of_layer: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Copies of these local slots by MoE layer, with their optimizer state, by key: [slots, ...]."""
    return {
        key: stack[list(slots_of_layer[item.layer_idx])]
        for item in epm.expert_parameters()
        for key, stack in keyed(item.name, item.parameter, optimizer)
    }


@torch.no_grad()
def restore_tensors(reader: SnapshotReader, epm: ExpertParallelModel, optimizer: Optimizer) -> None:
    """Everything of this rank becomes what the snapshot holds. Raises SnapshotDamaged."""
    dense = reader.dense()
    for key, tensor in dense_tensors(epm, optimizer).items():
        tensor.copy_(dense[key])
    for item in epm.expert_parameters():
        for key, stack in keyed(item.name, item.parameter, optimizer):
            for slot, logical_id in enumerate(item.logical_of_slot):
                if logical_id != EMPTY_SLOT:
                    stack[slot].copy_(reader.expert(key, layer_idx=item.layer_idx, logical_id=logical_id))
