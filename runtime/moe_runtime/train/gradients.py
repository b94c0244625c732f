"""Gradients of one step, complete on every rank that applies them.

Dense tensors: every rank has the gradient of its own tokens; one flattened all-reduce sums them. Experts: dispatch's
backward has already brought the gradients of all ranks' tokens to the owner; those of an expert with several copies are
exchanged among its holders alone. Numbers that all ranks want summed (losses, squared norms) come last.

G ranks of the group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_runtime.dispatch.group_face import Group
from moe_runtime.engine.model import ExpertParallelModel, ExpertParameter


@dataclass(frozen=True, slots=True)
class Complete:
    """`of`: gradient per parameter name, not yet clipped by the whole's norm; `norm` over all logical experts and dense
    tensors; `sums` of the numbers that rode along.
    """

    of: dict[str, torch.Tensor]
    norm: float
    sums: tuple[float, ...]


Holders = tuple[Mapping[int, tuple[int, ...]], ...]
"""Per MoE layer the positions of the living ranks that hold each expert, ascending."""


def holders_of(expert_map: ExpertMap, ranks: Sequence[int]) -> Holders:
    layers = []
    for row in expert_map.logical_of_slot:
        found: dict[int, list[int]] = {}
        for position, rank in enumerate(ranks):
            for expert in sorted({row[slot] for slot in expert_map.slot_range(rank)} - {EMPTY_SLOT}):
                found.setdefault(expert, []).append(position)
        layers.append({expert: tuple(positions) for expert, positions in found.items()})
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
    of = {name: _gradient(parameter) for name, parameter in dense}
    of.update({item.name: _gradient(item.parameter) for item in experts})
    ranks, position = ((epm.rank,), 0) if group is None else (group.ranks, group.position)
    holders = holders_of(epm.expert_map, ranks)
    owns = [_Slots.of(item, holders[item.layer_idx], position) for item in experts]
    for item, own in zip(experts, owns, strict=True):
        own.sum_at_home(of[item.name])
    if group is not None and group.size > 1:
        flat = torch.cat([of[name].reshape(-1) for name, _ in dense])
        group.all_reduce_sum(flat)
        for (name, _), summed in zip(dense, torch.split(flat, [of[name].numel() for name, _ in dense]), strict=True):
            of[name].copy_(summed.view_as(of[name]))
        if any(len(positions) > 1 for layer in holders for positions in layer.values()):
            _sum_over_holders([of[item.name] for item in experts], owns, group)
    for item, own in zip(experts, owns, strict=True):
        own.tell_at_home(of[item.name])
    if max_expert_norm is not None:
        for layer_idx in range(len(holders)):
            _clip_rows([of[item.name] for item in experts if item.layer_idx == layer_idx], max_expert_norm)

    device = next(iter(of.values())).device
    own_square = torch.zeros((), dtype=torch.float64, device=device)
    for item, own in zip(experts, owns, strict=True):
        own_square += of[item.name][own.counted].double().square().sum()
    numbers = torch.cat([own_square.view(1), torch.tensor(sums, dtype=torch.float64, device=device)])
    if group is not None and group.size > 1:
        group.all_reduce_sum(numbers)
    numbers[0] += torch.stack([of[name].double().square().sum() for name, _ in dense]).sum()
    square, *told = numbers.tolist()  # device sync: the norm decides on the host
    return Complete(of, square**0.5, tuple(told))


@dataclass(frozen=True, slots=True)
class _Slots:
    """Of one parameter on this rank. shared_G: slots whose expert each position holds too, in the order of the experts,
    this rank's own with all of them that anybody shares; twice: (slot, first slot of the same expert here); counted:
    a slot for each expert whose norm this rank tells.
    """

    shared_G: Mapping[int, list[int]]
    twice: tuple[tuple[int, int], ...]
    counted: list[int]

    @classmethod
    def of(cls, item: ExpertParameter, holders: Mapping[int, tuple[int, ...]], position: int) -> Self:
        first: dict[int, int] = {}
        twice = []
        for slot, expert in enumerate(item.logical_of_slot):
            if expert == EMPTY_SLOT:
                continue
            if expert in first:
                twice.append((slot, first[expert]))
            first.setdefault(expert, slot)
        shared: dict[int, list[int]] = {}
        for expert, slot in sorted(first.items()):
            for holder in holders[expert] if len(holders[expert]) > 1 else ():
                shared.setdefault(holder, []).append(slot)
        counted = [slot for expert, slot in sorted(first.items()) if holders[expert][0] == position]
        return cls(shared, tuple(twice), counted)

    def sum_at_home(self, grad_S: torch.Tensor) -> None:
        for slot, first in self.twice:
            grad_S[first] += grad_S[slot]

    def tell_at_home(self, grad_S: torch.Tensor) -> None:
        for slot, first in self.twice:
            grad_S[slot] = grad_S[first]


def _sum_over_holders(grads: Sequence[torch.Tensor], owns: Sequence[_Slots], group: Group) -> None:
    """In place, and in the order of positions on every holder, so that copies stay equal bit by bit."""
    given = [
        [grad[own.shared_G.get(p, [])].reshape(-1) for grad, own in zip(grads, owns, strict=True)]
        if p != group.position
        else []
        for p in range(group.size)
    ]
    counts = [sum(part.numel() for part in parts) for parts in given]  # what two ranks share is as much for both
    flat = torch.cat([grads[0].new_zeros(0), *(part for parts in given for part in parts)])
    received = iter(torch.split(group.swap(flat, counts), [p.numel() for parts in given for p in parts]))
    summed = [torch.zeros_like(grad) for grad in grads]
    for p in range(group.size):
        for grad, own, total in zip(grads, owns, summed, strict=True):
            slots = own.shared_G.get(p, [])
            part = grad[slots] if p == group.position else next(received).view(len(slots), *grad.shape[1:])
            total[slots] += part
    for grad, own, total in zip(grads, owns, summed, strict=True):
        slots = own.shared_G.get(group.position, [])
        grad[slots] = total[slots]


def _clip_rows(stacks: Sequence[torch.Tensor], max_norm: float) -> None:
    """Row n of all stacks is one expert: scale it, in place, to a norm of `max_norm` at most; no number stays none."""
    square_n = torch.stack([stack.flatten(1).double().square().sum(dim=1) for stack in stacks]).sum(dim=0)
    scale_n = (max_norm / square_n.sqrt()).clamp_max(1.0)
    for stack in stacks:
        stack.mul_(scale_n.to(stack.dtype).view(-1, *[1] * (stack.ndim - 1)))


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's own, which is changed in place here; zeros where no token came, and so none was made."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
