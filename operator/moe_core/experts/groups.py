"""Replanning ranks that hold the same experts in groups (mirror.py), so that they go on doing so.

With groups of mirrors an expert is lost only when a whole group is. A plan that moves single copies would scatter them
and make every pair of ranks somebody's only hosts. Here a group is planned for as one wide rank, which holds what each
member holds, carries what they carry together, and for whose moves every member is sent the expert.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_core.experts.align import keep_places, slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.crossing import leaving, picks_across
from moe_core.experts.fleet import Fleet
from moe_core.experts.mirror import pack_mirrored
from moe_core.experts.replan import Prices, Replan, moves_told, replan
from moe_core.experts.shelf import Shelf, rows_of
from moe_core.experts.split import follow, parts_on_ranks, rows_of_parts, shares_of


def replan_groups(
    load_LE: FloatArray,
    fleet: Fleet,
    current: Sequence[Sequence[int]],
    *,
    prices: Prices,
    current_shares: Sequence[Sequence[int]] = (),
    least_copies: int = 1,
) -> Replan:
    """As `replan`; where `current` has groups of mirrors, so has the result. Raises InvalidInput."""
    num_experts = load_LE.shape[1]
    start_LRS = slots_on_ranks(current, fleet, num_experts=num_experts)
    groups_NM = mirrors(start_LRS, fleet)
    if groups_NM is None:
        return replan(load_LE, fleet, current, prices=prices, current_shares=current_shares, least_copies=least_copies)
    first_N, size = groups_NM[:, 0], groups_NM.shape[1]
    start_part_LRS = parts_on_ranks(current_shares, start_LRS, fleet, num_experts)
    wide = Fleet(tuple(fleet.slots_R[first_N].tolist()), tuple(fleet.speed_R[first_N].tolist()))
    found = replan(
        load_LE,
        wide,
        rows_of(start_LRS[:, first_N], wide, num_experts),
        prices=replace(
            prices,
            seconds_per_pick=prices.seconds_per_pick / size,
            bytes_per_expert=prices.bytes_per_expert * size,
            most_moves=None if prices.most_moves is None else prices.most_moves // size,
        ),
        current_shares=rows_of_parts(start_part_LRS[:, first_N], wide),
        least_copies=-(-least_copies // size),
    )
    wide_LNS = slots_on_ranks(found.logical_of_slot, wide, num_experts=num_experts)
    logical_LRS = _on_members(wide_LNS, groups_NM, fleet)
    kept_LRS = keep_places(logical_LRS, start_LRS, num_experts)
    part_LRS = _on_members(parts_on_ranks(found.share_of_slot, wide_LNS, wide, num_experts), groups_NM, fleet)
    kept_part_LRS = follow(part_LRS, logical_LRS, kept_LRS, num_experts)
    crossed_before, crossed_after = (
        leaving(picks_across(load_LE, slots, shares_of(part, slots, num_experts), fleet)) * prices.bytes_per_pick
        for slots, part in ((start_LRS, start_part_LRS), (kept_LRS, kept_part_LRS))
    )
    return replace(
        found,
        logical_of_slot=rows_of(kept_LRS, fleet, num_experts),
        share_of_slot=rows_of_parts(kept_part_LRS, fleet) if found.share_of_slot else (),
        moves=found.moves * size,
        worst_before=tuple(worst / size for worst in found.worst_before),
        worst_after=tuple(worst / size for worst in found.worst_after),
        crossed_before=crossed_before,
        crossed_after=crossed_after,
        reason=moves_told(found.moves * size, found.gain_s, found.cost_s) if found.moves else found.reason,
    )


def pack_groups(load_LE: FloatArray, fleet: Fleet, *, least_copies: int) -> Shelf:
    """The plan from scratch that `replan_groups` can go on with: groups of `least_copies` ranks that hold the same, or
    pack_anew's where the ranks do not divide or one copy is enough.
    """
    if least_copies > 1 and fleet.ranks_with_slots % least_copies == 0:
        mirrored = pack_mirrored(load_LE, fleet, least_copies)
        if mirrored is not None and mirrors(mirrored.logical_LRS, fleet) is not None:
            return mirrored
    return pack_anew(load_LE, fleet, least_copies=least_copies)


def mirrors(logical_LRS: IntArray, fleet: Fleet) -> IntArray | None:
    """[groups, members] ranks that hold the same in every layer; None unless all ranks are in equal groups of two or
    more.
    """
    held_LRS = np.sort(logical_LRS, axis=2)
    ranks_of: dict[tuple[bytes, float], list[int]] = {}
    for rank in range(fleet.num_ranks):
        ranks_of.setdefault((held_LRS[:, rank].tobytes(), float(fleet.speed_R[rank])), []).append(rank)
    sizes = {len(ranks) for ranks in ranks_of.values()}
    if len(sizes) != 1 or sizes == {1} or not fleet.slots_R.all():
        return None
    return np.asarray(list(ranks_of.values()), dtype=np.int64)


def _on_members(of_group_LNS: IntArray, groups_NM: IntArray, fleet: Fleet) -> IntArray:
    """[L, R, S] each member as its group."""
    found = np.empty((len(of_group_LNS), fleet.num_ranks, of_group_LNS.shape[2]), dtype=np.int64)
    found[:, groups_NM.reshape(-1)] = np.repeat(of_group_LNS, groups_NM.shape[1], axis=1)
    return found
