"""Gradients of one step, complete on every rank that applies them, after one flattened all-reduce.

Dense tensors: every rank has the gradient of its own tokens; the sum is wanted. Experts: dispatch's backward has
already brought the gradients of all ranks' tokens to the owner; only experts with several copies must be summed over
the copies. Numbers that all ranks want summed (losses, squared norms) ride along.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_runtime.dispatch.group_face import Group
from moe_runtime.engine.model import ExpertParallelModel


@dataclass(frozen=True, slots=True)
class Complete:
    """`of`: gradient per parameter name, not yet clipped by the whole's norm; `norm` over all logical experts and dense
    tensors; `sums` of the numbers that rode along.
    """

    of: dict[str, torch.Tensor]
    norm: float
    sums: tuple[float, ...]


def copied_experts(expert_map: ExpertMap, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Per MoE layer the experts with more than one copy on the living ranks, ascending."""
    living = [slot_id for rank in ranks for slot_id in expert_map.slot_range(rank)]
    layers = []
    for row in expert_map.logical_of_slot:
        held = Counter(row[slot_id] for slot_id in living if row[slot_id] != EMPTY_SLOT)
        layers.append(tuple(sorted(e for e, count in held.items() if count > 1)))
    return tuple(layers)


def complete_gradients(
    epm: ExpertParallelModel, group: Group | None, *, sums: Sequence[float], max_expert_norm: float | None = None
) -> Complete:
    """All ranks get bit-identical values for what they share. Raises GroupFault.

    max_expert_norm: the gradient of each logical expert of a layer, over all its parameters, is scaled down to this
    norm, on every copy alike, before the norm of the whole is taken: one expert's outlier then slows no other.
    """
    dense = list(epm.dense_parameters())
    experts = epm.expert_parameters()
    copied = copied_experts(epm.expert_map, group.ranks if group is not None else (epm.rank,))
    of = {name: _gradient(parameter) for name, parameter in dense}
    of.update({item.name: _gradient(item.parameter) for item in experts})
    layers = [[item for item in experts if item.layer_idx == layer_idx] for layer_idx in range(len(copied))]
    if max_expert_norm is not None:
        for layer_idx, items in enumerate(layers):
            is_single = [logical_id not in copied[layer_idx] for logical_id in items[0].logical_of_slot]
            _clip_rows([of[item.name] for item in items], max_expert_norm, only=is_single)

    # what every rank contributes to, in one order on all ranks: dense, copied experts, numbers
    shared = [of[name] for name, _ in dense]
    stacks: list[tuple[str, list[tuple[int, int]], torch.Tensor]] = []
    device = next(iter(of.values())).device
    own_square = torch.zeros((), dtype=torch.float64, device=device)
    for item in experts:
        ids = copied[item.layer_idx]
        stack = torch.zeros((len(ids), *item.parameter.shape[1:]), device=device)
        pairs = [(slot, ids.index(e)) for slot, e in enumerate(item.logical_of_slot) if e in ids]
        for slot, row in pairs:
            stack[row] += of[item.name][slot]
        single = [slot for slot, e in enumerate(item.logical_of_slot) if e != EMPTY_SLOT and e not in ids]
        own_square += of[item.name][single].double().square().sum()
        shared.append(stack)
        stacks.append((item.name, pairs, stack))
    numbers = torch.cat([own_square.view(1), torch.tensor(sums, dtype=torch.float64, device=device)])

    if group is not None and group.size > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in shared])
        group.all_reduce_sum(flat)
        group.all_reduce_sum(numbers)
        for tensor, summed in zip(shared, torch.split(flat, [tensor.numel() for tensor in shared]), strict=True):
            tensor.copy_(summed.view_as(tensor))
    if max_expert_norm is not None:
        stack_of = {name: stack for name, _, stack in stacks}
        for items in layers:
            _clip_rows([stack_of[item.name] for item in items], max_expert_norm)
    for name, pairs, stack in stacks:
        for slot, row in pairs:
            of[name][slot] = stack[row]
    shared_square = torch.stack([tensor.double().square().sum() for tensor in shared]).sum()
    numbers[0] += shared_square
    square, *sums = numbers.tolist()  # device sync: the norm decides on the host
    return Complete(of, square**0.5, tuple(sums))


def _clip_rows(stacks: Sequence[torch.Tensor], max_norm: float, *, only: Sequence[bool] | None = None) -> None:
    """Row n of all stacks is one expert: scale it, in place, to a norm of `max_norm` at most; no number stays none."""
    square_n = torch.stack([stack.flatten(1).double().square().sum(dim=1) for stack in stacks]).sum(dim=0)
    scale_n = (max_norm / square_n.sqrt()).clamp_max(1.0)
    if only is not None:
        scale_n[~torch.tensor(only, dtype=torch.bool, device=scale_n.device)] = 1.0
    for stack in stacks:
        stack.mul_(scale_n.to(stack.dtype).view(-1, *[1] * (stack.ndim - 1)))


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's own, which is changed in place here; zeros where no token came, and so none was made."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
