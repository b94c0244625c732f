"""What lies in one layer's slots: the module's own parameters, or packed codes that are unpacked where they are used.

A store knows tensors by name with slots in front, and not who is in the slots.

Suffixes: R rows, D model, S slots.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.experts.families import ExpertsModule
from moe_runtime.experts.packed_files import PackedExperts
from moe_runtime.experts.packing import LayerPacking, Stacks
from moe_runtime.experts.weights import WeightSource

UNPACKED_BYTES = 64 << 20
"""Of experts that are unpacked at a time; one expert always is."""

FamilyForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SlotStore(Protocol):
    def stacks(self) -> Stacks:
        """The tensors that lie in the slots, not copies; empty before the first `install`."""

    def blank(self, num_slots: int) -> Stacks:
        """Empty slots, on the CPU."""

    def fetch(self, weights: WeightSource, logical_ids: Sequence[int]) -> Stacks:
        """These experts as stacks [len(logical_ids), ...], on the CPU. Raises InvalidInput, OSError."""

    def install(self, stacks: Stacks, device: str) -> None:
        """Put these into the slots."""

    def run(
        self, forward: FamilyForward, rows_RD: torch.Tensor, slot_RK: torch.Tensor, weight_RK: torch.Tensor
    ) -> torch.Tensor:
        """[R, D] the weighted sum of each row through its K slots. R >= 1."""


def make_store(entry: ExpertsModule, packing: LayerPacking | None) -> SlotStore:
    return WholeStore(entry) if packing is None else PackedStore(entry, packing)


@contextlib.contextmanager
def parameters_of(entry: ExpertsModule, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The module's forward computes with these, [slots, ...] each, instead of its own."""
    module: Any = entry.module
    kept, num_slots = {name: module.get_parameter(name) for name in parameters}, module.num_experts
    try:
        for name, value in parameters.items():
            module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
            module.num_experts = len(value)
        yield
    finally:
        module.num_experts = num_slots
        for name, parameter in kept.items():
            module.register_parameter(name, parameter)


class WholeStore:
    """float32, as the module's parameters: they can be trained."""

    def __init__(self, entry: ExpertsModule) -> None:
        self._entry, self._is_filled = entry, False

    def stacks(self) -> Stacks:
        module = self._entry.module
        names = self._entry.parameter_names if self._is_filled else ()
        return {name: module.get_parameter(name).detach() for name in names}

    def blank(self, num_slots: int) -> Stacks:
        module = self._entry.module
        return {
            name: torch.zeros(num_slots, *module.get_parameter(name).shape[1:]) for name in self._entry.parameter_names
        }

    def fetch(self, weights: WeightSource, logical_ids: Sequence[int]) -> Stacks:
        if isinstance(weights, PackedExperts):
            raise InvalidInput(f"{weights.folder} holds packed experts, and this model keeps them in full")
        names = self._entry.parameter_names
        return {name: weights.read_experts(self._entry, name, logical_ids).float() for name in names}

    def install(self, stacks: Stacks, device: str) -> None:
        module: Any = self._entry.module
        for name in self._entry.parameter_names:
            module.register_parameter(name, torch.nn.Parameter(stacks[name].to(device)))
            module.num_experts = len(stacks[name])
        self._is_filled = True

    def run(
        self, forward: FamilyForward, rows_RD: torch.Tensor, slot_RK: torch.Tensor, weight_RK: torch.Tensor
    ) -> torch.Tensor:
        return forward(rows_RD, slot_RK, weight_RK)  # by position: families name them apart


class PackedStore:
    """Codes and scales. The module's parameters are one zero seen as many: they have a shape and no memory."""

    def __init__(self, entry: ExpertsModule, packing: LayerPacking) -> None:
        self._entry, self.packing = entry, packing
        self._stacks: Stacks = {}

    def stacks(self) -> Stacks:
        return dict(self._stacks)

    def blank(self, num_slots: int) -> Stacks:
        return self.packing.blank(num_slots)

    def fetch(self, weights: WeightSource, logical_ids: Sequence[int]) -> Stacks:
        if isinstance(weights, PackedExperts):
            return weights.read_stacks(self._entry, self.packing, logical_ids)
        # in parts, so that never all of a rank's experts lie in memory in full
        size = max(1, UNPACKED_BYTES // self.packing.unpacked_bytes)
        parts = [self._pack(weights, logical_ids[i : i + size]) for i in range(0, len(logical_ids), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pack(self, weights: WeightSource, logical_ids: Sequence[int]) -> Stacks:
        names = self._entry.parameter_names
        return self.packing.pack_experts(
            {name: weights.read_experts(self._entry, name, logical_ids).float() for name in names}
        )

    def install(self, stacks: Stacks, device: str) -> None:
        self._stacks = {name: stack.to(device) for name, stack in stacks.items()}
        module: Any = self._entry.module
        module.num_experts = num_slots = len(next(iter(stacks.values())))
        for name in self._entry.parameter_names:
            shape = (num_slots, *module.get_parameter(name).shape[1:])
            value = torch.zeros((), device=device).expand(shape)
            module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    def run(
        self, forward: FamilyForward, rows_RD: torch.Tensor, slot_RK: torch.Tensor, weight_RK: torch.Tensor
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and rows_RD.requires_grad:
            raise InvalidInput(f"experts are packed as {self.packing.packing}: they answer, they cannot be trained")
        used_U, index_RK = torch.unique(slot_RK, return_inverse=True)
        slots = used_U.tolist()  # device sync: names the slots that are unpacked
        size = max(1, UNPACKED_BYTES // self.packing.unpacked_bytes)
        if len(slots) <= size:
            return self._run_unpacked(forward, rows_RD, index_RK, weight_RK, slots)
        out_RD = torch.zeros_like(rows_RD)
        for first in range(0, len(slots), size):
            row_P, pick_P = torch.nonzero((index_RK >= first) & (index_RK < first + size), as_tuple=True)
            index_P1, weight_P1 = index_RK[row_P, pick_P, None] - first, weight_RK[row_P, pick_P, None]
            part = slots[first : first + size]
            out_RD.index_add_(0, row_P, self._run_unpacked(forward, rows_RD[row_P], index_P1, weight_P1, part))
        return out_RD

    def _run_unpacked(
        self,
        forward: FamilyForward,
        rows_RD: torch.Tensor,
        index_RK: torch.Tensor,
        weight_RK: torch.Tensor,
        slots: Sequence[int],
    ) -> torch.Tensor:
        """Through these slots alone, index_RK counting in them."""
        with parameters_of(self._entry, self.packing.unpack_slots(self._stacks, slots)):
            return forward(rows_RD, index_RK, weight_RK)
