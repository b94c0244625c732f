"""Whether every expert still has a live copy after some ranks, nodes or racks are lost: the chance of it.

An expert is lost when all units that host it fail; a unit is a rank or a whole failure domain. Given the sets of hosts,
the chance for k random failures is exact where all choices of k units can be counted, and sampled otherwise.
Few distinct sets of hosts are better than many (Cidon et al., Copysets, 2013): each set is one more way to lose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.hosts import smallest
from moe_core.outcome import InvalidInput

COUNTED = 200_000
"""So many choices of failing units are counted one by one: half a second."""


@dataclass(frozen=True, slots=True)
class Survival:
    """`chance` that all experts stay covered after `failures` units of `units` fail; `error` is one standard error of
    it, 0 when every choice was counted.
    """

    failures: int
    units: int
    chance: float
    error: float


def host_sets(expert_map: ExpertMap, unit_of_rank: Sequence[int]) -> list[int]:
    """The distinct sets of units that host an expert in some layer, without those that contain another one; a set is a
    number with a bit for each unit.

    Raises InvalidInput if a unit is missing for a rank, or an expert has no copy at all.
    """
    if len(unit_of_rank) != expert_map.num_ranks:
        raise InvalidInput(f"unit_of_rank must have {expert_map.num_ranks} entries, got {len(unit_of_rank)}")
    unit_of_slot = [unit_of_rank[rank] for rank in expert_map.rank_of_slot]
    found: set[int] = set()
    for layer_idx, row in enumerate(expert_map.logical_of_slot):
        hosts = [0] * expert_map.num_logical_experts
        for slot, logical in enumerate(row):
            if logical != EMPTY_SLOT:
                hosts[logical] |= 1 << unit_of_slot[slot]
        if not all(hosts):
            raise InvalidInput(f"layer {layer_idx} must hold every expert, expert {hosts.index(0)} is in no slot")
        found.update(hosts)
    return smallest(found)


def survival(
    expert_map: ExpertMap,
    *,
    failures: int,
    unit_of_rank: Sequence[int] | None = None,
    samples: int = 20_000,
    seed: int = 0,
) -> Survival:
    """The chance that coverage survives `failures` random units. Ranks are the units by default."""
    units_of = tuple(range(expert_map.num_ranks)) if unit_of_rank is None else tuple(unit_of_rank)
    units = {unit: index for index, unit in enumerate(sorted(set(units_of)))}
    if not 0 <= failures <= len(units):
        raise InvalidInput(f"failures must be between 0 and the {len(units)} units, got {failures}")
    fatal = [
        hosts for hosts in host_sets(expert_map, [units[unit] for unit in units_of]) if hosts.bit_count() <= failures
    ]
    masks_FU = np.asarray([[hosts >> unit & 1 for unit in units.values()] for hosts in fatal], dtype=np.float32)
    masks_FU = masks_FU.reshape(len(fatal), len(units))
    sizes_F = masks_FU.sum(1)
    if not fatal or failures == 0:
        return Survival(failures, len(units), 1.0, 0.0)
    total = comb(len(units), failures)
    if total <= COUNTED:
        choices = np.asarray(list(combinations(range(len(units)), failures)), dtype=np.int64)
        return Survival(failures, len(units), float(_survivors(choices, masks_FU, sizes_F).mean()), 0.0)
    random = np.random.default_rng(seed)
    choices = random.random((samples, len(units))).argpartition(failures, axis=1)[:, :failures]
    chance = float(_survivors(choices, masks_FU, sizes_F).mean())
    return Survival(failures, len(units), chance, float(np.sqrt(max(chance * (1 - chance), 1 / samples) / samples)))


def _survivors(choices_CK: np.ndarray, masks_FU: np.ndarray, sizes_F: np.ndarray) -> np.ndarray:
    """[C] whether no set of hosts lies whole within the failing units."""
    survives = np.ones(len(choices_CK), dtype=bool)
    for start in range(0, len(choices_CK), 4096):
        part = slice(start, start + 4096)
        failed_CU = np.zeros((len(choices_CK[part]), masks_FU.shape[1]), dtype=np.float32)
        np.put_along_axis(failed_CU, choices_CK[part], 1, axis=1)
        survives[part] = ~(failed_CU @ masks_FU.T >= sizes_F).any(1)
    return survives
