"""How many copies each logical expert gets: the number that decides how even a layer can ever be.

Every further copy goes to the expert with the most load per copy, which minimises the largest load of a copy: a copy of
anything else would leave the largest as it is. The idea is EPLB's. Ties go to the expert with fewer copies, then to the
lower id, so that a layer without load spreads its copies.
"""

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray


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
    copies_LE, spare_L = _in_bulk(weight_LE, copies_LE, num_slots=min(num_slots, num_experts * most), most=most)
    per_copy_LE = np.where(copies_LE < most, weight_LE / copies_LE, -1.0)
    while spare_L.any():
        rows = np.flatnonzero(spare_L)
        spare_L[rows] -= 1
        hottest = per_copy_LE[rows].argmax(1)
        copies_LE[rows, hottest] += 1
        copies = copies_LE[rows, hottest]
        per_copy_LE[rows, hottest] = np.where(copies < most, weight_LE[rows, hottest] / copies, -1.0)
    return copies_LE


def _in_bulk(weight_LE: FloatArray, copies_LE: IntArray, *, num_slots: int, most: int) -> tuple[IntArray, IntArray]:
    """Copies that are due in any case, at once, and the slots that remain per layer: one by one takes long for many.

    No expert's last due copy may carry less than `limit`: with sum(ceil(load / limit)) <= slots all of them fit.
    """
    while True:  # each turn hands on what experts at `most` could not take
        spare_L = num_slots - copies_LE.sum(1)
        is_open_LE = copies_LE < most
        open_L = np.maximum(spare_L + (copies_LE * is_open_LE).sum(1) - is_open_LE.sum(1), 0)
        limit_L = np.where(open_L > 0, (weight_LE * is_open_LE).sum(1) / np.maximum(open_L, 1), np.inf)
        due_LE = np.minimum(np.ceil(weight_LE / limit_L[:, None]), most).astype(np.int64)
        raised_LE = np.where(is_open_LE, np.maximum(copies_LE, due_LE), copies_LE)
        too_many_L = raised_LE.sum(1) > num_slots  # only where `least` has given more than was due
        raised_LE[too_many_L] = copies_LE[too_many_L]
        if (raised_LE == copies_LE).all():
            return copies_LE, spare_L
        copies_LE = raised_LE
