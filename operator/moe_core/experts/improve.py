"""From the layout there is, a few slots at a time: what a plan does that must not move half of the experts.

In every layer the heaviest rank is relieved by the cheapest of two steps, whichever wins more per slot that changes:

    exchange   one of its copies changes places with a lighter one of another rank          (two slots change)
    recopy     a slot that holds one of several copies of y elsewhere takes a copy of x,
               which the heavy rank then shares                                             (one slot changes)

The layouts on the way are kept, so that the caller can stop where the next step does not pay (see replan.py).
"""

from dataclasses import dataclass

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Path:
    """Layouts [K + 1] from the start on; worst_KL the largest rank load of each, changed_KL slots changed so far."""

    layouts: tuple[IntArray, ...]
    worst_KL: FloatArray
    changed_KL: IntArray


@dataclass(frozen=True, slots=True)
class _Steps:
    """The best step of one kind for each of N layers. `worst` is the larger load of the ranks it touches."""

    worst_N: FloatArray
    mine_N: IntArray
    """Place on the heaviest rank."""
    other_N: IntArray
    """The other slot as rank * S + place."""


def improve(load_LE: FloatArray, shelf: Shelf, *, most_steps: int, even_enough: float = 1e-3) -> Path:
    """Up to `most_steps` steps per layer, all layers side by side; a layer ends early when no step helps, or when its
    heaviest rank is within `even_enough` of the mean. The shelf is worked on and ends as the last layout.
    """
    num_layers = len(load_LE)
    speed = shelf.fleet.speed_R[shelf.fleet.slots_R > 0].sum()
    target_L = load_LE.sum(1) / speed * (1 + even_enough)
    layouts = [shelf.logical_LRS.copy()]
    worst = [shelf.load_LR.max(1)]
    changed = [np.zeros(num_layers, dtype=np.int64)]
    is_open_L = worst[0] > target_L
    for _ in range(most_steps):
        layer = np.flatnonzero(is_open_L)
        if layer.size == 0:
            break
        slots = _step(load_LE, shelf, layer)
        is_open_L[layer[slots == 0]] = False
        layouts.append(shelf.logical_LRS.copy())
        worst.append(shelf.load_LR.max(1))
        changed.append(changed[-1].copy())
        changed[-1][layer] += slots
        is_open_L &= worst[-1] > target_L
    return Path(tuple(layouts), np.stack(worst), np.stack(changed))


def _step(load_LE: FloatArray, shelf: Shelf, layer: IntArray) -> IntArray:
    """One step in each of these layers; slots changed [N]: 2, 1, or 0 where none helps."""
    rows = np.arange(len(layer))
    heavy = shelf.load_LR[layer].argmax(1)
    before = shelf.load_LR[layer, heavy]
    exchange, recopy = _exchanges(shelf, layer, heavy), _recopies(load_LE, shelf, layer, heavy)
    gain_exchange, gain_recopy = (before - exchange.worst_N) / 2, before - recopy.worst_N
    least = before * 1e-6
    by_recopy = gain_recopy >= gain_exchange
    helps = np.where(by_recopy, gain_recopy, gain_exchange) > least
    width = shelf.logical_LRS.shape[2]
    chosen = rows[helps & ~by_recopy]
    shelf.swap(layer[chosen], (heavy[chosen], exchange.mine_N[chosen]), np.divmod(exchange.other_N[chosen], width))
    chosen = rows[helps & by_recopy]
    if chosen.size:
        logical = shelf.logical_LRS[layer[chosen], heavy[chosen], recopy.mine_N[chosen]]
        shelf.recopy(load_LE, layer[chosen], np.divmod(recopy.other_N[chosen], width), logical)
    return np.where(helps, np.where(by_recopy, 1, 2), 0)


def _exchanges(shelf: Shelf, layer: IntArray, heavy: IntArray) -> _Steps:
    """The best exchange of each layer's heaviest rank with any other."""
    mine, all_slots = shelf.logical_LRS[layer, heavy], shelf.logical_LRS[layer]
    may_leave, may_come = _may_trade(shelf, layer, heavy)
    shift = shelf.per_copy_LX[layer[:, None], mine][:, :, None, None] - shelf.weight_of(layer)[:, None]
    speed_R = shelf.fleet.speed_R
    after_mine = shelf.load_LR[layer, heavy][:, None, None, None] - shift / speed_R[heavy][:, None, None, None]
    after_other = shelf.load_LR[layer][:, None, :, None] + shift / speed_R[None, None, :, None]
    worst = np.maximum(after_mine, after_other)
    worst[~(may_leave[..., None] & may_come[:, None])] = np.inf
    return _best(worst, all_slots.shape[2])


def _recopies(load_LE: FloatArray, shelf: Shelf, layer: IntArray, heavy: IntArray) -> _Steps:
    """The best slot elsewhere for one more copy of something the heaviest rank holds.

    The copy that gives way makes the other copies of its expert heavier: the heaviest of their ranks counts too.
    """
    rows = np.arange(len(layer))[:, None, None]
    mine, all_slots = shelf.logical_LRS[layer, heavy], shelf.logical_LRS[layer]
    num_experts = shelf.num_experts
    copies_NX = np.concatenate([shelf.copies_LE[layer], np.full((len(layer), 2), 2)], axis=1)
    load_NX = np.concatenate([load_LE[layer], np.zeros((len(layer), 2))], axis=1)
    per_copy_NX = shelf.per_copy_LX[layer]
    speed_R = shelf.fleet.speed_R

    less_mine_NS = (per_copy_NX - load_NX / (copies_NX + 1))[np.arange(len(layer))[:, None], mine]
    rise_NX = load_NX / np.maximum(copies_NX - 1, 1) - per_copy_NX
    host_load_NX = _heaviest_hosts(shelf, layer)
    others_NRS = (host_load_NX + rise_NX / speed_R.min())[rows, all_slots]

    new_copy_NS = per_copy_NX[np.arange(len(layer))[:, None], mine] - less_mine_NS
    shift = new_copy_NS[:, :, None, None] - shelf.weight_of(layer)[:, None]
    after_other = shelf.load_LR[layer][:, None, :, None] + shift / speed_R[None, None, :, None]
    after_mine = (shelf.load_LR[layer, heavy][:, None] - less_mine_NS / speed_R[heavy][:, None])[:, :, None, None]
    worst = np.maximum(np.maximum(after_mine, after_other), others_NRS[:, None])

    may_leave, _ = _may_trade(shelf, layer, heavy)
    is_spare = (copies_NX[rows, all_slots] > 1) & (all_slots <= num_experts)
    is_other = np.arange(shelf.fleet.num_ranks)[None, :] != heavy[:, None]
    worst[~(may_leave[..., None] & (is_spare & is_other[..., None])[:, None])] = np.inf
    worst[mine >= num_experts] = np.inf
    return _best(worst, all_slots.shape[2])


def _may_trade(shelf: Shelf, layer: IntArray, heavy: IntArray) -> tuple[np.ndarray, np.ndarray]:
    """[N, S, R] whether a place of the heaviest rank may go to a rank; [N, R, S] whether a slot may come from there."""
    mine, all_slots = shelf.logical_LRS[layer, heavy], shelf.logical_LRS[layer]
    num_experts = shelf.num_experts
    ranks_R = np.arange(shelf.fleet.num_ranks)
    rows = np.arange(len(layer))
    held_NRX = np.zeros((len(layer), shelf.fleet.num_ranks, num_experts + 2), dtype=bool)
    np.put_along_axis(held_NRX, all_slots, True, axis=2)
    held_NRX[..., num_experts] = False
    held_NRX[..., num_experts + 1] = True
    may_leave = ~held_NRX[rows[:, None, None], ranks_R[None, None, :], mine[:, :, None]]
    may_leave &= shelf.may_enter(
        layer[:, None, None], mine[:, :, None], source=heavy[:, None, None], target=ranks_R[None, None, :]
    )
    may_come = ~np.take_along_axis(held_NRX[rows, heavy][:, None, :], all_slots, axis=2)
    may_come &= shelf.may_enter(
        layer[:, None, None], all_slots, source=ranks_R[None, :, None], target=heavy[:, None, None]
    )
    return may_leave, may_come


def _heaviest_hosts(shelf: Shelf, layer: IntArray) -> FloatArray:
    """[N, E + 2] the largest load of a rank that holds each expert; nothing for the last two columns."""
    found = np.zeros((len(layer), shelf.num_experts + 2))
    rows = np.arange(len(layer))[:, None, None]
    np.maximum.at(found, (rows, shelf.logical_LRS[layer]), shelf.load_LR[layer][..., None])
    found[:, -2:] = 0.0
    return found


def _best(worst_NSRS: FloatArray, width: int) -> _Steps:
    num_layers = len(worst_NSRS)
    flat = worst_NSRS.reshape(num_layers, -1)
    best = flat.argmin(1)
    mine, other = np.divmod(best, flat.shape[1] // width)
    return _Steps(flat[np.arange(num_layers), best], mine, other)
