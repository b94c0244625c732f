"""The sets of ranks that host experts: how likely one of them is lost, and exchanges that leave fewer of them.

An expert is lost when all its hosts are, so a layout is as safe as its distinct sets of hosts are few (survival.py). A
set goes when each expert that has exactly these hosts changes a copy's place with another copy, such that both then
have hosts that contain a set which is there anyway, or that are more than the set that goes. Small sets go first.

Sets are numbers with a bit for each rank, so at most MOST_RANKS; mask_LE are the hosts of each expert.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from math import comb

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.shelf import BoolArray, Shelf

MOST_RANKS = 24
"""10,626 choices of four are counted in some milliseconds."""
FAILURES = 4


def hosts_of(logical_LRS: IntArray, num_experts: int, unit_R: IntArray) -> IntArray:
    """mask_LE: the units that hold each expert."""
    mask_LX = np.zeros((len(logical_LRS), num_experts + 2), dtype=np.int64)
    layers = np.arange(len(logical_LRS))[:, None, None]
    np.bitwise_or.at(mask_LX, (layers, logical_LRS), (1 << unit_R)[None, :, None])
    return mask_LX[:, :num_experts]


def smallest(masks: Iterable[int]) -> list[int]:
    """Those that contain no other one, small ones first."""
    found: list[int] = []
    for mask in sorted(set(masks), key=lambda m: (m.bit_count(), m)):
        if not any(known & mask == known for known in found):
            found.append(mask)
    return found


def chances(shelf: Shelf) -> FloatArray:
    """That every expert keeps a host after 1, 2, ... FAILURES random failures: first of ranks, then of domains."""
    fleet = shelf.fleet
    found = _chances(shelf, np.arange(fleet.num_ranks), fleet.num_ranks)
    if shelf.in_domain_LXG is not None:
        found += _chances(shelf, fleet.domain_R, fleet.num_domains)
    return np.asarray(found)


def _chances(shelf: Shelf, unit_R: IntArray, num_units: int) -> list[float]:
    sets = smallest(hosts_of(shelf.logical_LRS, shelf.num_experts, unit_R).reshape(-1).tolist())
    safe = [1 << unit for unit in range(num_units) if 1 << unit not in sets]
    several = np.asarray([mask for mask in sets if mask.bit_count() > 1], dtype=np.int64)
    found = []
    for failures in range(1, min(FAILURES, num_units - 1) + 1):
        failed_C = np.asarray([sum(chosen) for chosen in combinations(safe, failures)], dtype=np.int64)
        survives_C = ~_contains(failed_C, several)
        found.append(float(survives_C.sum()) / comb(num_units, failures))
    return found


def thin_out(shelf: Shelf, limit_L: FloatArray, *, most_steps: int) -> None:
    """Make sets of hosts fewer, one at a time, while no rank's load goes above limit_L; at most so many exchanges are
    looked for. A set that cannot go as a whole stays, and what was exchanged for it is undone.
    """
    ranks = np.arange(shelf.fleet.num_ranks)
    search = _Search(shelf, limit_L, hosts_of(shelf.logical_LRS, shelf.num_experts, ranks), most_steps)
    stuck: set[int] = set()
    while search.steps_left > 0:
        by_use = [m for m in smallest(search.used) if m not in stuck and m.bit_count() < shelf.fleet.ranks_with_slots]
        if not by_use:
            return
        goes = min(by_use, key=lambda m: (m.bit_count(), search.used[m], m))
        if not search.remove(goes):
            stuck.add(goes)


class _Search:
    """A shelf, the hosts of its experts, and how many experts of any layer have exactly these."""

    def __init__(self, shelf: Shelf, limit_L: FloatArray, mask_LE: IntArray, most_steps: int) -> None:
        self.shelf, self.limit_L, self.mask_LE, self.steps_left = shelf, limit_L * (1 + 1e-9), mask_LE, most_steps
        self.used = Counter(mask_LE.reshape(-1).tolist())

    def remove(self, goes: int) -> bool:
        """Whether no expert has exactly the hosts `goes` any more."""
        done: list[tuple[int, int, int]] = []
        kept = np.asarray(smallest(mask for mask in self.used if mask != goes), dtype=np.int64)
        for layer, expert in np.argwhere(self.mask_LE == goes).tolist():
            found = self._exchange_for(layer, expert, kept) if self.steps_left > 0 else None
            self.steps_left -= 1
            if found is None:
                for step in reversed(done):
                    self._swap(*step)
                return False
            self._swap(layer, *found)
            done.append((layer, *found))
        return True

    def _exchange_for(self, layer: int, expert: int, kept: IntArray) -> tuple[int, int] | None:
        """Slots (as rank * S + place) of a copy and what it changes places with: the ranks that end lightest."""
        shelf = self.shelf
        speed_R, load_R, slots_RS = shelf.fleet.speed_R, shelf.load_LR[layer], shelf.logical_LRS[layer]
        width, num_experts = slots_RS.shape[1], shelf.num_experts
        ranks_R, goes = np.arange(len(slots_RS)), int(self.mask_LE[layer, expert])
        source_H, place_H = np.nonzero(slots_RS == expert)
        bit_R, bit_H = 1 << ranks_R, 1 << source_H
        hosts_X = np.concatenate([self.mask_LE[layer], [0, -1]])
        hosts_RS = hosts_X[slots_RS]
        size = goes.bit_count()
        after_HR = (goes & ~bit_H)[:, None] | bit_R
        after_HRS = (hosts_RS & ~bit_R[:, None]) | bit_H[:, None, None]
        fits_HRS = (hosts_RS & bit_H[:, None, None] == 0) & (goes & bit_R == 0)[:, None]
        fits_HRS &= _contains(after_HR, kept)[:, :, None]
        fits_HRS &= (slots_RS == num_experts) | _contains(after_HRS, kept) | (_size(hosts_RS) > size)
        fits_HRS &= shelf.may_enter(np.asarray(layer), np.asarray(expert), source=source_H[:, None], target=ranks_R)[
            :, :, None
        ]
        fits_HRS &= shelf.may_enter(
            np.asarray(layer), slots_RS, source=ranks_R[:, None], target=source_H[:, None, None]
        )
        shift_RS = shelf.per_copy_LX[layer, expert] - shelf.per_copy_LX[layer, slots_RS]
        worst_HRS = np.maximum(
            load_R[source_H][:, None, None] - shift_RS / speed_R[source_H][:, None, None],
            load_R[:, None] + shift_RS / speed_R[:, None],
        )
        worst_HRS[~fits_HRS | (worst_HRS > self.limit_L[layer])] = np.inf
        best = int(worst_HRS.argmin())
        if not np.isfinite(worst_HRS.reshape(-1)[best]):
            return None
        host, other = divmod(best, slots_RS.size)
        return int(source_H[host] * width + place_H[host]), other

    def _swap(self, layer: int, slot: int, other: int) -> None:
        shelf, width = self.shelf, self.shelf.logical_LRS.shape[2]
        ranks = (slot // width, other // width)
        moved = [int(shelf.logical_LRS[layer].reshape(-1)[s]) for s in (slot, other)]
        for expert in moved:
            if expert < shelf.num_experts:
                before = int(self.mask_LE[layer, expert])
                after = before ^ (1 << ranks[0]) ^ (1 << ranks[1])
                self.mask_LE[layer, expert] = after
                self.used[before] -= 1
                self.used[after] += 1
                if not self.used[before]:
                    del self.used[before]
        places = [np.divmod(np.asarray([s]), width) for s in (slot, other)]
        shelf.swap(np.asarray([layer]), places[0], places[1])


def _contains(masks: IntArray, kept: IntArray) -> BoolArray:
    """Whether each mask contains one of the kept sets."""
    return np.asarray((masks[..., None] & kept == kept).any(-1))


def _size(masks: IntArray) -> IntArray:
    return np.bitwise_count(masks.astype(np.uint64)).astype(np.int64)
