"""How even a layer can be at best: lower bounds on the load of the heaviest rank, so that a plan can say how far it is.

For given copies, split evenly (`bound_of_copies`), whatever the packing:

    mean      all load over all ranks' speed
    alone     the heaviest copy together with the lightest ones that fill its rank, on the fastest rank
    together  of the k * R + 1 heaviest copies k + 1 share a rank
    apart     of the i heaviest copies two share a rank, or they are on i ranks and share these with the lightest
    paired    with two slots on each rank nothing beats the heaviest with the lightest, and so on

For a budget of slots (`bound_of_slots`), however many copies there are and however they divide their expert's load: the
mean, and the largest mean copy that remains when copies are counted best (counts.py). With unlike speeds a copy is
taken to be on the fastest rank, which is weaker.
"""

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.counts import count_copies
from moe_core.experts.fleet import Fleet


def bound_of_copies(load_LE: FloatArray, copies_LE: IntArray, fleet: Fleet) -> FloatArray:
    """[L] no packing of exactly these copies on these ranks has a heaviest rank below this (load over speed)."""
    speeds = fleet.speed_R[fleet.slots_R > 0]
    fastest, num_ranks = float(speeds.max()), len(speeds)
    found = np.asarray(load_LE.sum(1) / speeds.sum())
    for layer, (load_E, copies_E) in enumerate(zip(load_LE, copies_LE, strict=True)):
        per_copy_C = np.sort(np.repeat(load_E / np.maximum(copies_E, 1), copies_E))[::-1]
        heaviest = max(_alone(per_copy_C, fleet), _together(per_copy_C, num_ranks), _apart(per_copy_C, fleet))
        if len(per_copy_C) == 2 * num_ranks == fleet.num_slots and int(fleet.slots_R.max()) == 2:
            heaviest = max(heaviest, float((per_copy_C + per_copy_C[::-1]).max()))
        found[layer] = max(found[layer], heaviest / fastest)
    return found


def bound_of_slots(load_LE: FloatArray, fleet: Fleet, *, group_ranks: int = 0) -> FloatArray:
    """[L] no assignment to these ranks, however it counts copies, has a heaviest rank below this. group_ranks: ranks of
    each of several EP groups, of which every one has its part of the load to itself; 0 for one group.
    """
    size = group_ranks or fleet.num_ranks
    groups = [slice(first, first + size) for first in range(0, fleet.num_ranks, size)]
    of_group_LE = load_LE / len(groups)
    found = np.zeros(len(load_LE))
    for own in groups:
        members = Fleet(fleet.slots_of_rank[own])
        speeds = fleet.speed_R[own][members.slots_R > 0]
        copies_LE = count_copies(of_group_LE, members.room_for(load_LE.shape[1]), most=members.ranks_with_slots)
        largest_L = (of_group_LE / copies_LE).max(1, initial=0.0)
        found = np.maximum(found, np.maximum(of_group_LE.sum(1) / speeds.sum(), largest_L / speeds.max()))
    return found


def _companions(fleet: Fleet, num_copies: int, num_ranks: IntArray) -> IntArray:
    """At least so many other copies share `num_ranks` ranks with one copy each: slots are filled but for the empty."""
    narrowest = int(fleet.slots_R[fleet.slots_R > 0].min())
    return np.maximum(0, num_ranks * (narrowest - 1) - (fleet.num_slots - num_copies))


def _alone(per_copy_C: FloatArray, fleet: Fleet) -> float:
    if not len(per_copy_C):
        return 0.0
    companions = int(_companions(fleet, len(per_copy_C), np.asarray(1)))
    return float(per_copy_C[0] + per_copy_C[len(per_copy_C) - companions :].sum())


def _together(per_copy_C: FloatArray, num_ranks: int) -> float:
    """Of the k * R + 1 heaviest copies some rank holds k + 1: at least the k + 1 lightest of them."""
    shares = range(1, -(-len(per_copy_C) // num_ranks))
    return max((float(per_copy_C[k * num_ranks - k : k * num_ranks + 1].sum()) for k in shares), default=0.0)


def _apart(per_copy_C: FloatArray, fleet: Fleet) -> float:
    """For each i: the heaviest of i groups of companions weighs at least their mean, and at least the heaviest one."""
    num_copies = len(per_copy_C)
    lightest_sum = np.concatenate([[0.0], per_copy_C[::-1].cumsum()])
    i = np.arange(2, min(fleet.ranks_with_slots, num_copies) + 1)
    companions = np.minimum(_companions(fleet, num_copies, i), num_copies - i)
    i, companions = i[companions > 0], companions[companions > 0]
    group = np.maximum(lightest_sum[companions] / i, per_copy_C[num_copies - companions])
    two_of_them = per_copy_C[i - 2] + per_copy_C[i - 1]
    return float(np.minimum(two_of_them, per_copy_C[i - 1] + group).max(initial=0.0))
