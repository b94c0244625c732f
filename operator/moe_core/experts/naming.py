"""Experts by numbers that follow from what is known of them: a plan that is made of numbers cannot depend on names.

Wherever two experts are as good as each other a planner takes the first, and which one that is must not come from the
model's order: two copies of an expert with load 16 weigh what one with load 8 does, and another choice among equals can
end in a layout that is a fifth worse. So a plan is made with the heaviest expert as number 0 of its layer, and so on;
of equally heavy ones the first has the lower slot today. What is still equal is alike in all that a planner looks at.
"""

from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_core.experts.checks import FloatArray, IntArray

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Naming:
    """name_LX [L, E + 2] the expert of each number, number_LX the way back; the empty slots of shelf.py keep theirs."""

    name_LX: IntArray
    number_LX: IntArray

    @classmethod
    def of(cls, load_LE: FloatArray, *then_LE: FloatArray | IntArray) -> Self:
        """Heaviest first, then by the least of the other keys."""
        num_layers, num_experts = load_LE.shape
        name_LX = np.tile(np.arange(num_experts + 2), (num_layers, 1))
        name_LX[:, :num_experts] = np.lexsort((*reversed(then_LE), -load_LE), axis=1)
        return cls(name_LX, np.argsort(name_LX, axis=1, kind="stable"))

    @property
    def num_experts(self) -> int:
        return int(self.name_LX.shape[1]) - 2

    def by_number(self, values_LE: NDArray[_Number]) -> NDArray[_Number]:
        """[L, E, ...] values by name, in the order of the numbers."""
        name_LE = self.name_LX[:, : self.num_experts]
        return np.asarray(values_LE[np.arange(len(name_LE))[:, None], name_LE])

    def by_numbers(self, values_LEE: FloatArray) -> FloatArray:
        """[L, E, E] values of two experts by name."""
        name_LE = self.name_LX[:, : self.num_experts]
        layers = np.arange(len(name_LE))[:, None, None]
        return np.asarray(values_LEE[layers, name_LE[:, :, None], name_LE[:, None, :]])

    def by_name(self, values_LE: IntArray) -> IntArray:
        number_LE = self.number_LX[:, : self.num_experts]
        return np.asarray(np.take_along_axis(values_LE, number_LE, axis=1))

    def numbers(self, logical_LRS: IntArray) -> IntArray:
        return np.asarray(self.number_LX[np.arange(len(logical_LRS))[:, None, None], logical_LRS])

    def names(self, logical_LRS: IntArray) -> IntArray:
        return np.asarray(self.name_LX[np.arange(len(logical_LRS))[:, None, None], logical_LRS])


def first_slots(logical_LRS: IntArray, num_experts: int) -> IntArray:
    """[L, E] the first slot of each expert; of one that is in none, the number of slots."""
    num_slots = logical_LRS.shape[1] * logical_LRS.shape[2]
    first_LX = np.full((len(logical_LRS), num_experts + 2), num_slots, dtype=np.int64)
    layers = np.arange(len(logical_LRS))[:, None]
    np.minimum.at(first_LX, (layers, logical_LRS.reshape(len(logical_LRS), num_slots)), np.arange(num_slots)[None, :])
    return first_LX[:, :num_experts]
