"""How many copies each logical expert gets: the number that decides how even a layer can ever be.

Every further copy goes to the expert with the most load per copy, which minimises the largest load of a copy: a copy of
anything else would leave the largest as it is. The idea is EPLB's. Ties go to the expert with fewer copies, then to the
lower id, so that a layer without load spreads its copies.
"""

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray

FEW = 32
"""Slots given out one by one; 32 of each of 58 layers take 0.5 ms, as three halvings do."""
HALVINGS = 60
"""The limits start within some 20 powers of ten of each other, and end as neighbouring floats."""


def count_copies(load_LE: FloatArray, num_slots: int, *, most: int, least: int = 1) -> IntArray:
    """copies_LE [L, E], each between `least` and `most`, in all num_slots per layer where `most` allows that many.

    Where the slots do not suffice for `least` of all, the hottest get it first and everybody has one.
    """
    num_layers, num_experts = load_LE.shape
    copies_LE = np.ones((num_layers, num_experts), dtype=np.int64)
    spare = min(num_slots, num_experts * most) - num_experts
    for floor in range(2, min(least, most) + 1):
        promised = min(spare, num_experts)
        hottest = np.argsort(-load_LE, axis=1, kind="stable")[:, :promised]
        np.put_along_axis(copies_LE, hottest, floor, axis=1)
        spare -= promised
    # A trace of load for everybody: unloaded experts then compete by their number of copies.
    weight_LE = load_LE + np.maximum(load_LE.sum(1, keepdims=True), 1.0) * 1e-12
    num_slots = min(num_slots, num_experts * most)
    copies_LE = _but_few(weight_LE, copies_LE, num_slots=num_slots, most=most)
    spare_L = num_slots - copies_LE.sum(1)
    per_copy_LE = np.where(copies_LE < most, weight_LE / copies_LE, -1.0)
    for layer in np.flatnonzero(spare_L > FEW):  # what is still open is as good as equal, so nothing is due twice
        hottest = np.argsort(-per_copy_LE[layer], kind="stable")[: spare_L[layer]]
        copies_LE[layer, hottest] += 1
        spare_L[layer] = 0
    while spare_L.any():
        rows = np.flatnonzero(spare_L)
        spare_L[rows] -= 1
        hottest = per_copy_LE[rows].argmax(1)
        copies_LE[rows, hottest] += 1
        copies = copies_LE[rows, hottest]
        per_copy_LE[rows, hottest] = np.where(copies < most, weight_LE[rows, hottest] / copies, -1.0)
    return copies_LE


def _but_few(weight_LE: FloatArray, copies_LE: IntArray, *, num_slots: int, most: int) -> IntArray:
    """Copies that are due in any case, for all but FEW slots: one by one takes long for many.

    An expert is due another copy as long as its load per copy is at least a limit; the lowest limit whose copies fit
    into the slots is found by halving, until few slots are left, or limit and next limit are the same number.
    """
    found_LE = copies_LE
    low_L1, high_L1 = weight_LE.min(1, keepdims=True) / most, weight_LE.max(1, keepdims=True) * 2
    for _ in range(HALVINGS):
        if (num_slots - found_LE.sum(1)).max(initial=0) <= FEW:
            break
        limit_L1 = np.sqrt(low_L1 * high_L1)
        due_LE = np.minimum(weight_LE / limit_L1, most - 1).astype(np.int64) + 1
        due_LE = np.maximum(due_LE, copies_LE)
        fits_L1 = due_LE.sum(1, keepdims=True) <= num_slots
        found_LE = np.where(fits_L1, due_LE, found_LE)
        low_L1, high_L1 = np.where(fits_L1, low_L1, limit_L1), np.where(fits_L1, limit_L1, high_L1)
    return found_LE
