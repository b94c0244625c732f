"""All layers' slots as one array, so that a step of planning is done for every layer at once.

Shapes: L layers, R ranks, S slots of the widest rank, E logical experts, G failure domains. logical_LRS holds logical
ids, E for an empty slot, E + 1 where the rank has no such slot; tables by expert are two columns wider for them.

The rule that everything here keeps: no two copies of an expert on one rank, and no more of them in one failure domain
than an even spread over the domains needs (`cap_LE`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_core.contract.expert_map import EMPTY_SLOT
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet

BoolArray = NDArray[np.bool_]


@dataclass(slots=True)
class Shelf:
    """A layout being worked on. `load_LR` is the ranks' load over their speed, kept in step with the slots."""

    fleet: Fleet
    copies_LE: IntArray
    per_copy_LX: FloatArray
    """Load of one copy [L, E + 2]; nothing in the last two columns."""
    logical_LRS: IntArray
    load_LR: FloatArray
    cap_LE: IntArray
    in_domain_LXG: IntArray | None
    """Copies per domain [L, E + 2, G]; None where every rank is a domain of its own and the rank rule says it all."""

    @classmethod
    def of(cls, load_LE: FloatArray, copies_LE: IntArray, fleet: Fleet, logical_LRS: IntArray) -> "Shelf":
        """The shelf with these slots; `copies_LE` must be what `logical_LRS` holds."""
        nothing = np.zeros((len(load_LE), 2))
        per_copy_LX = np.concatenate([load_LE / np.maximum(copies_LE, 1), nothing], axis=1)
        cap_LE = -(-copies_LE // fleet.domains_with_slots)
        shelf = cls(fleet, copies_LE, per_copy_LX, logical_LRS, np.empty(0), cap_LE, None)
        shelf.load_LR = shelf.weight_LRS().sum(2) / fleet.speed_R
        shelf.in_domain_LXG = copies_in_domains(logical_LRS, shelf.num_experts, fleet)
        return shelf

    @property
    def num_experts(self) -> int:
        return int(self.copies_LE.shape[1])

    def weight_LRS(self) -> FloatArray:
        return self.weight_of(slice(None))

    def weight_of(self, layer: IntArray | slice) -> FloatArray:
        """[N, R, S] load of each slot in these layers."""
        return np.take_along_axis(self.per_copy_LX[layer][:, None, :], self.logical_LRS[layer], axis=2)

    def repeats_LRS(self, layer: IntArray | slice = slice(None)) -> BoolArray:
        """Slots of these layers whose expert has another copy in an earlier slot of the same rank."""
        logical_LRS = self.logical_LRS[layer]
        width = logical_LRS.shape[2]
        by_expert_LRS = np.sort(logical_LRS * width + np.arange(width), axis=2)  # quicker than argsort
        sorted_LRS, order = np.divmod(by_expert_LRS, max(width, 1))
        again = np.zeros_like(sorted_LRS, dtype=bool)
        again[:, :, 1:] = (sorted_LRS[:, :, 1:] == sorted_LRS[:, :, :-1]) & (sorted_LRS[:, :, 1:] < self.num_experts)
        found = np.empty_like(again)
        np.put_along_axis(found, order, again, axis=2)
        return found

    def crowded_LRS(self, layer: IntArray | slice = slice(None)) -> BoolArray:
        """Slots of these layers whose expert has more copies in their domain than an even spread needs."""
        logical_LRS, cap_LE = self.logical_LRS[layer], self.cap_LE[layer]
        if self.in_domain_LXG is None:
            return np.zeros_like(logical_LRS, dtype=bool)
        layer_idx = np.arange(len(self.copies_LE))[layer][:, None, None]
        here_LRS = self.in_domain_LXG[layer_idx, logical_LRS, self.fleet.domain_R[None, :, None]]
        cap_LX = np.concatenate([cap_LE, np.zeros((len(cap_LE), 2), dtype=np.int64)], axis=1)
        return np.asarray(here_LRS > np.take_along_axis(cap_LX[:, None, :], logical_LRS, axis=2))

    def may_enter(self, layer: IntArray, logical: IntArray, *, source: IntArray, target: IntArray) -> BoolArray:
        """Whether the domain rule lets a copy move from rank `source` to rank `target`; arrays that broadcast."""
        if self.in_domain_LXG is None:
            return np.ones(np.broadcast(layer, logical, source, target).shape, dtype=bool)
        domain = self.fleet.domain_R[target]
        cap = self.cap_LE[layer, np.minimum(logical, self.num_experts - 1)]
        has_room = self.in_domain_LXG[layer, logical, domain] < cap
        return np.asarray(has_room | (logical >= self.num_experts) | (domain == self.fleet.domain_R[source]))

    def swap(self, layer: IntArray, slot_a: tuple[IntArray, IntArray], slot_b: tuple[IntArray, IntArray]) -> None:
        """Exchange what is in slots (rank, place) a and b; each layer's slots may occur once only."""
        (rank_a, _), (rank_b, _) = slot_a, slot_b
        logical_a, logical_b = self.logical_LRS[layer, *slot_a], self.logical_LRS[layer, *slot_b]
        self.logical_LRS[layer, *slot_a], self.logical_LRS[layer, *slot_b] = logical_b, logical_a
        shift = self.per_copy_LX[layer, logical_a] - self.per_copy_LX[layer, logical_b]
        np.add.at(self.load_LR, (layer, rank_a), -shift / self.fleet.speed_R[rank_a])
        np.add.at(self.load_LR, (layer, rank_b), shift / self.fleet.speed_R[rank_b])
        if self.in_domain_LXG is not None:
            domain_a, domain_b = self.fleet.domain_R[rank_a], self.fleet.domain_R[rank_b]
            for logical, source, target in ((logical_a, domain_a, domain_b), (logical_b, domain_b, domain_a)):
                np.add.at(self.in_domain_LXG, (layer, logical, source), -1)
                np.add.at(self.in_domain_LXG, (layer, logical, target), 1)
            self.in_domain_LXG[:, -2:] = 0

    def take(self, layer: IntArray, anew: "Shelf") -> None:
        """What follows from the slots of these layers, from a shelf that was made anew for them."""
        self.per_copy_LX[layer], self.load_LR[layer], self.cap_LE[layer] = anew.per_copy_LX, anew.load_LR, anew.cap_LE
        if self.in_domain_LXG is not None and anew.in_domain_LXG is not None:
            self.in_domain_LXG[layer] = anew.in_domain_LXG

    def rows(self) -> tuple[tuple[int, ...], ...]:
        return rows_of(self.logical_LRS, self.fleet, self.num_experts)


def copies_in_domains(logical_LRS: IntArray, num_experts: int, fleet: Fleet) -> IntArray | None:
    """[L, E + 2, G] copies in each domain; None where every rank is one and the rank rule says it all."""
    if fleet.num_domains == fleet.num_ranks:
        return None
    width = num_experts + 2
    rows = np.arange(len(logical_LRS))[:, None, None]
    flat = (rows * width + logical_LRS) * fleet.num_domains + fleet.domain_R[None, :, None]
    counts = np.bincount(flat.reshape(-1), minlength=len(logical_LRS) * width * fleet.num_domains)
    found = counts.reshape(len(logical_LRS), width, fleet.num_domains)
    found[:, -2:] = 0
    return found


def rows_of(logical_LRS: IntArray, fleet: Fleet, num_experts: int) -> tuple[tuple[int, ...], ...]:
    """logical_of_slot of an ExpertMap: per layer, ranks one after the other."""
    flat_LS = logical_LRS[:, fleet.exists_RS]
    return tuple(tuple(row) for row in np.where(flat_LS < num_experts, flat_LS, EMPTY_SLOT).tolist())
