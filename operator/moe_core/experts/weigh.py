"""What a layout costs in every step, in picks at a rank of speed 1: its heaviest rank, and the time that links take."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.crossing import picks_across, picks_across_in_groups
from moe_core.experts.fleet import Fleet
from moe_core.experts.split import level_of_ranks


class Weighs(Protocol):
    """Shapes as in shelf.py; from_LEG as in crossing.py."""

    def across(
        self, load_LE: FloatArray, logical_LRS: IntArray, share_LRS: FloatArray, from_LEG: FloatArray | None
    ) -> FloatArray:
        """[L, G, G] picks between failure domains."""

    def weigh(
        self, load_LE: FloatArray, logical_LRS: IntArray, share_LRS: FloatArray, from_LEG: FloatArray | None
    ) -> tuple[FloatArray, FloatArray]:
        """([L] load of the heaviest rank over its speed, [L] that and what a rank spends on links)"""


@dataclass(frozen=True, slots=True)
class Scale:
    """links_GG: seconds per byte between domains; None where links decide nothing. bytes_per_work_s: what picks send in
    the time that a rank of speed 1 takes for them. group_ranks: ranks of each of several EP groups, 0 for one group.
    """

    fleet: Fleet
    links_GG: FloatArray | None = None
    bytes_per_work_s: float = 0.0
    group_ranks: int = 0

    def across(
        self, load_LE: FloatArray, logical_LRS: IntArray, share_LRS: FloatArray, from_LEG: FloatArray | None = None
    ) -> FloatArray:
        if self.group_ranks:
            return picks_across_in_groups(load_LE, logical_LRS, share_LRS, self.fleet, self.group_ranks)
        return picks_across(load_LE, logical_LRS, share_LRS, self.fleet, from_LEG)

    def weigh(
        self, load_LE: FloatArray, logical_LRS: IntArray, share_LRS: FloatArray, from_LEG: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        worst_L = level_of_ranks(load_LE, logical_LRS, share_LRS, self.fleet).max(1)
        if self.links_GG is None:
            return worst_L, worst_L
        on_links_L = (self.across(load_LE, logical_LRS, share_LRS, from_LEG) * self.links_GG).sum((1, 2))
        return worst_L, np.asarray(worst_L + on_links_L * self.bytes_per_work_s / self.fleet.ranks_with_slots)
