"""How the copies of one expert share its load: unevenly, so that busy ranks answer less of it.

An even split wastes what copies are good for: a busy rank that holds a copy of a hot expert would take as much of it as
an idle one does. Here each expert's load is poured over the ranks that hold it as water into vessels,
one expert after the other and round again, until levels no longer change. No expert moves for it, so most of what a
drifting load costs is won back by the split alone (replan.py uses it before it moves anything).
"""

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.fleet import Fleet

_SWEEPS = 8
_STILL = 1e-4
"""A sweep that lowers no layer's largest load by this part of it is the last."""


def split(load_LE: FloatArray, logical_LRS: IntArray, fleet: Fleet) -> tuple[FloatArray, FloatArray]:
    """(share_LRS, load_LR): which part of its expert's load each slot answers, the parts of one expert adding up to 1,
    and what that makes of the ranks' load over speed. Never less even than the even split.
    """
    num_layers, num_experts = load_LE.shape
    slots = logical_LRS.reshape(num_layers, -1)
    copies_LE = np.zeros((num_layers, num_experts + 2), dtype=np.int64)
    np.add.at(copies_LE, (np.arange(num_layers)[:, None], slots), 1)
    share_LP = 1.0 / np.maximum(np.take_along_axis(copies_LE, slots, axis=1), 1)
    share_LP[slots >= num_experts] = 0.0
    load_of_slot = np.concatenate([load_LE, np.zeros((num_layers, 2))], axis=1)
    weight_LP = np.take_along_axis(load_of_slot, slots, axis=1)
    speed_P = np.repeat(fleet.speed_R, logical_LRS.shape[2])
    rank_P = np.repeat(np.arange(fleet.num_ranks), logical_LRS.shape[2])
    load_LR = (share_LP * weight_LP).reshape(logical_LRS.shape).sum(2) / fleet.speed_R
    turns = _turns(load_LE, copies_LE[:, :num_experts], slots)
    worst_L = load_LR.max(1)
    for _ in range(_SWEEPS):
        for layer, places in turns:
            _pour(layer, places, share_LP, weight_LP, load_LR, speed_P, rank_P)
        before, worst_L = worst_L, load_LR.max(1)
        if (before - worst_L <= _STILL * before).all():
            break
    return share_LP.reshape(logical_LRS.shape), load_LR


def _turns(load_LE: FloatArray, copies_LE: IntArray, slots_LP: IntArray) -> list[tuple[IntArray, IntArray]]:
    """For each turn the layers that still have a copied expert, and the places [N, C] of its copies, -1 behind them.

    Hottest experts first; turn t takes every layer's t-th.
    """
    order_LE = np.argsort(np.where(copies_LE > 1, -load_LE, np.inf), axis=1, kind="stable")
    num_copied_L = (copies_LE > 1).sum(1)
    place_order = np.argsort(slots_LP, axis=1, kind="stable")
    first_LE = np.concatenate([np.zeros((len(copies_LE), 1), dtype=np.int64), copies_LE.cumsum(1)], axis=1)[:, :-1]
    turns = []
    for turn in range(int(num_copied_L.max(initial=0))):
        layer = np.flatnonzero(num_copied_L > turn)
        expert = order_LE[layer, turn]
        copies = copies_LE[layer, expert]
        offset = np.arange(int(copies.max()))
        is_copy = offset[None, :] < copies[:, None]
        index = np.where(is_copy, first_LE[layer, expert][:, None] + offset[None, :], 0)
        turns.append((layer, np.where(is_copy, place_order[layer[:, None], index], -1)))
    return turns


def _pour(  # noqa: PLR0917
    layer: IntArray,
    places_NC: IntArray,
    share_LP: FloatArray,
    weight_LP: FloatArray,
    load_LR: FloatArray,
    speed_P: FloatArray,
    rank_P: IntArray,
) -> None:
    """One expert of each layer anew over the ranks that hold it, to one level: level * speed - load = its part."""
    lane = layer[:, None]
    is_copy = places_NC >= 0
    ranks, speeds = rank_P[places_NC], np.where(is_copy, speed_P[places_NC], 0.0)
    load_N = weight_LP[layer, places_NC[:, 0]]
    had = np.where(is_copy, share_LP[lane, places_NC], 0.0) * load_N[:, None]
    floor = np.where(is_copy, load_LR[lane, ranks] - had / np.maximum(speeds, 1e-300), np.inf)
    by_floor = np.argsort(floor, axis=1, kind="stable")
    sorted_floor = np.take_along_axis(floor, by_floor, axis=1)
    sorted_speed = np.take_along_axis(speeds, by_floor, axis=1)
    with np.errstate(invalid="ignore"):
        filled = np.where(np.isfinite(sorted_floor), sorted_floor * sorted_speed, 0.0).cumsum(1)
    levels = (load_N[:, None] + filled) / np.maximum(sorted_speed.cumsum(1), 1e-300)
    # The level that the k lowest vessels reach is the true one when it is not above the next vessel's floor.
    next_floor = np.concatenate([sorted_floor[:, 1:], np.full((len(layer), 1), np.inf)], axis=1)
    level = np.take_along_axis(levels, (levels <= next_floor).argmax(1)[:, None], axis=1)
    gets = np.where(is_copy, np.maximum(level - np.where(is_copy, floor, 0.0), 0.0) * speeds, 0.0)
    total = gets.sum(1)
    has_load = (load_N > 0) & (total > 0)
    row, column = np.nonzero(is_copy & has_load[:, None])
    share_LP[layer[row], places_NC[row, column]] = gets[row, column] / total[row]
    load_LR[layer[row], ranks[row, column]] += (gets[row, column] - had[row, column]) / speeds[row, column]
