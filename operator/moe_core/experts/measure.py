"""How even and how complete an assignment is. Three numbers for balance, never one word for all of them.

balancedness         mean over max of the ranks' load in one layer, meant over the layers
balancedness_min     the same of the worst layer
balancedness_tokens  sum of the layers' means over the sum of their maxima: layers with many tokens weigh more

A layer without load counts as even (1.0). An expert's live copies divide its load as the map's shares say.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moe_core.contract.exchange import Coverage
from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.checks import FloatArray, IntArray, as_load_LE
from moe_core.experts.parts import live_slots, parts_of_slots


@dataclass(frozen=True, slots=True)
class Balance:
    balancedness: float
    balancedness_min: float
    balancedness_tokens: float


def copies_of_logical(expert_map: ExpertMap, live_ranks: Collection[int] | None = None) -> IntArray:
    """[L, E] number of live copies; all ranks live by default."""
    num_columns = expert_map.num_logical_experts + 1  # the last one for empty slots
    live_LS = expert_map.table_LS[:, live_slots(expert_map, live_ranks)]
    first_of_layer = np.arange(expert_map.num_layers)[:, None] * num_columns
    flat = np.where(live_LS == EMPTY_SLOT, num_columns - 1, live_LS) + first_of_layer
    counts = np.bincount(flat.ravel(), minlength=expert_map.num_layers * num_columns)
    return counts.reshape(expert_map.num_layers, num_columns)[:, :-1]


def coverage(expert_map: ExpertMap, live_ranks: Collection[int] | None = None) -> Coverage:
    """How many (layer, logical expert) pairs have at least one live copy."""
    copies = copies_of_logical(expert_map, live_ranks)
    return Coverage(covered=int((copies > 0).sum()), total=int(copies.size))


def load_of_slots(expert_map: ExpertMap, load: ArrayLike, live_ranks: Collection[int] | None = None) -> FloatArray:
    """[L, S] load of each slot; 0 in slots that are empty or of lost ranks."""
    load_LE = as_load_LE(load, num_layers=expert_map.num_layers, num_logical_experts=expert_map.num_logical_experts)
    load_LS = np.take_along_axis(load_LE, np.maximum(expert_map.table_LS, 0), axis=1)
    return load_LS * parts_of_slots(expert_map, live_ranks)


def load_of_ranks(expert_map: ExpertMap, load: ArrayLike, live_ranks: Collection[int] | None = None) -> FloatArray:
    """[L, live ranks] load that falls on each live rank that owns slots, ranks ascending."""
    of_slot_LS = load_of_slots(expert_map, load, live_ranks)
    ranks = range(expert_map.num_ranks) if live_ranks is None else sorted(set(live_ranks))
    slots = [expert_map.slot_range(rank) for rank in ranks if expert_map.slots_of_rank[rank]]
    columns = [of_slot_LS[:, own.start : own.stop].sum(1) for own in slots]
    return np.stack(columns, axis=1) if columns else np.zeros((expert_map.num_layers, 0))


def balance(expert_map: ExpertMap, load: ArrayLike, live_ranks: Collection[int] | None = None) -> Balance:
    """The three balance numbers of `load` [L][E] under this map. Raises InvalidInput for a bad load."""
    of_rank = load_of_ranks(expert_map, load, live_ranks)
    if of_rank.size == 0 or of_rank.max() == 0:
        return Balance(1.0, 1.0, 1.0)
    means, maxima = of_rank.mean(-1), of_rank.max(-1)
    per_layer = _even_L(means, maxima)
    return Balance(float(per_layer.mean()), float(per_layer.min()), float(means.sum() / maxima.sum()))


def balancedness_of(mean_L: FloatArray, worst_L: FloatArray) -> float:
    """Balancedness where only the ranks' mean load and their largest are known, by layer."""
    return float(_even_L(mean_L, worst_L).mean())


def _even_L(mean_L: FloatArray, worst_L: FloatArray) -> FloatArray:
    return np.where(worst_L > 0, mean_L / np.where(worst_L > 0, worst_L, 1.0), 1.0)
