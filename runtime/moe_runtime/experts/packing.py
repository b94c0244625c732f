"""One layer's experts as packed stacks: which tensors a slot consists of, and the way there and back.

Matrices are packed as [rows out, columns in], whichever way round the family keeps them; what is no matrix (a bias, a
norm) stays float32. Every stack has slots in front, so slots are copied, digested and moved without being unpacked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_core.contract.packing import Packing
from moe_runtime.experts.families import ExpertsModule, UnsupportedModel
from moe_runtime.kernels.quantise import CODE_DTYPES, CODES, SCALE_DTYPES, SCALES, Packed, codes_per_row, pack, unpack

Stacks = dict[str, torch.Tensor]
"""Name of a stack -> [slots, ...]: a parameter's own, or `parameter.codes` and `parameter.scales`."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One expert's matrix: N rows out, M columns in; `is_turned`: the family keeps it as [M, N]."""

    num_rows: int
    num_columns: int
    is_turned: bool

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """[.., N, M] of the family's own, and the family's own of [.., N, M]."""
        return weight.transpose(-1, -2).contiguous() if self.is_turned else weight


class LayerPacking:
    """matrices: those of the layer's parameters that are packed."""

    def __init__(self, entry: ExpertsModule, packing: Packing, *, family: str) -> None:
        """Raises UnsupportedModel where there is nothing to pack."""
        self.packing = packing
        is_turned = bool(getattr(entry.module, "is_transposed", False))
        shapes = {name: entry.module.get_parameter(name).shape[1:] for name in entry.parameter_names}
        self.matrices = {
            name: Matrix(shape[is_turned], shape[not is_turned], is_turned)
            for name, shape in shapes.items()
            if len(shape) == 2
        }
        if not self.matrices:
            raise UnsupportedModel(family, f"{entry.name} has no matrices that could be packed")
        self._plain = {name: shape for name, shape in shapes.items() if name not in self.matrices}

    def blank(self, num_slots: int) -> Stacks:
        """Empty slots."""
        stacks = {name: torch.zeros(num_slots, *shape) for name, shape in self._plain.items()}
        for name, matrix in self.matrices.items():
            codes = codes_per_row(self.packing, matrix.num_columns)
            dtype = CODE_DTYPES[self.packing.precision]
            stacks[f"{name}.{CODES}"] = torch.zeros(num_slots, matrix.num_rows, codes, dtype=dtype)
            if self.packing.is_scaled:
                groups = self.packing.num_groups(matrix.num_columns)
                scale_dtype = SCALE_DTYPES[self.packing.precision]
                stacks[f"{name}.{SCALES}"] = torch.zeros(num_slots, matrix.num_rows, groups, dtype=scale_dtype)
        return stacks

    def pack_experts(self, parameters: Mapping[str, torch.Tensor]) -> Stacks:
        """[n, ...] of the family's own parameters, each expert for itself: who lies beside it must not matter."""
        stacks = {name: parameters[name].float() for name in self._plain}
        for name, matrix in self.matrices.items():
            packed = [pack(matrix.turned(weight), self.packing) for weight in parameters[name]]
            stacks |= self.stacks_of(name, packed)
        return stacks

    def stacks_of(self, name: str, packed: Sequence[Packed]) -> Stacks:
        """Of one parameter's experts."""
        stacks = {f"{name}.{CODES}": torch.stack([one.codes for one in packed])}
        if self.packing.is_scaled:
            stacks[f"{name}.{SCALES}"] = torch.stack([one.scales for one in packed if one.scales is not None])
        return stacks

    def packed(self, name: str, stacks: Mapping[str, torch.Tensor]) -> Packed:
        """Codes and scales of one parameter, slots in front: what a kernel reads."""
        return Packed(stacks[f"{name}.{CODES}"], stacks.get(f"{name}.{SCALES}"))

    def unpack_slots(self, stacks: Mapping[str, torch.Tensor], slots: Sequence[int]) -> dict[str, torch.Tensor]:
        """The family's own parameters [len(slots), ...] of these slots, float32."""
        chosen = list(slots)
        parameters = {name: stacks[name][chosen] for name in self._plain}
        for name, matrix in self.matrices.items():
            whole = self.packed(name, stacks)
            part = Packed(whole.codes[chosen], None if whole.scales is None else whole.scales[chosen])
            parameters[name] = matrix.turned(unpack(part, self.packing, num_columns=matrix.num_columns))
        return parameters

    @property
    def unpacked_bytes(self) -> int:
        """Of one expert in float32."""
        plain = sum(math.prod(shape) for shape in self._plain.values())
        return 4 * (plain + sum(matrix.num_rows * matrix.num_columns for matrix in self.matrices.values()))
