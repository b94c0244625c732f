"""Replanning ranks that hold the same experts in teams (mirror.py), so that they go on doing so.

With teams an expert is lost only when a whole one is. A plan that moves single copies would scatter them and make every
pair of ranks somebody's only hosts. Here a team is planned for as one wide rank, which holds what each member holds,
carries what they carry together, and for whose moves every member is sent the expert.

Members of one EP group divide an expert's tokens as they are fast. Every EP group brings the same number of tokens, and
they stay in it: so the slowest group's members say how fast a team is.

N teams, M members each; other shapes as in shelf.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from moe_core.experts.align import arrivals, keep_places, slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.crossing import leaving
from moe_core.experts.fleet import Fleet
from moe_core.experts.mirror import pack_mirrored
from moe_core.experts.naming import Naming
from moe_core.experts.replan import WORTH_CHANGING, Prices, Replan, reason_of, replan, scale_of
from moe_core.experts.shelf import Shelf, rows_of
from moe_core.experts.split import follow, parts_on_ranks, rows_of_parts, said_parts, shares_of, whole_parts
from moe_core.experts.weigh import Scale


@dataclass(frozen=True, slots=True)
class _Teams:
    """members_NM: ranks of each team. part_NM: what each answers of its team's tokens, 1 in sum over a team. `scale`
    weighs what all ranks hold and answer together.
    """

    members_NM: IntArray
    part_NM: FloatArray
    wide: Fleet
    scale: Scale

    @classmethod
    def of(cls, members_NM: IntArray, scale: Scale) -> Self:
        fleet = scale.fleet
        group_R = np.arange(fleet.num_ranks) // (scale.group_ranks or fleet.num_ranks)
        num_groups = int(group_R.max()) + 1
        speed_NM, group_NM = fleet.speed_R[members_NM], group_R[members_NM]
        of_group_NK = np.stack([(speed_NM * (group_NM == group)).sum(1) for group in range(num_groups)], axis=1)
        part_NM = speed_NM / np.take_along_axis(of_group_NK, group_NM, axis=1) / num_groups
        domains = tuple(repr(sorted(set(fleet.domain_R[ranks].tolist()))) for ranks in members_NM)
        speeds = tuple((of_group_NK.min(1) * num_groups).tolist())
        return cls(members_NM, part_NM, Fleet(tuple(fleet.slots_R[members_NM[:, 0]].tolist()), speeds, domains), scale)

    def on_members(self, of_team_LNS: IntArray, *, fill: int) -> IntArray:
        """[L, R, S] each member as its team; `fill` for ranks without slots."""
        shape = (len(of_team_LNS), self.scale.fleet.num_ranks, of_team_LNS.shape[2])
        found = np.full(shape, fill, dtype=of_team_LNS.dtype)
        found[:, self.members_NM.reshape(-1)] = np.repeat(of_team_LNS, self.members_NM.shape[1], axis=1)
        return found

    def shares_on_members(self, share_LNS: FloatArray) -> FloatArray:
        found = np.zeros((len(share_LNS), self.scale.fleet.num_ranks, share_LNS.shape[2]))
        for place, ranks in enumerate(self.members_NM.T):
            found[:, ranks] = share_LNS * self.part_NM[:, place, None]
        return found

    def parts_on_members(self, part_LNS: IntArray, logical_LNS: IntArray, num_experts: int) -> IntArray:
        if np.ptp(self.part_NM) == 0:
            return self.on_members(part_LNS, fill=0)
        share_LRS = self.shares_on_members(shares_of(part_LNS, logical_LNS, num_experts))
        return whole_parts(share_LRS, self.on_members(logical_LNS, fill=num_experts + 1), num_experts)

    def across(
        self, load_LE: FloatArray, logical_LNS: IntArray, share_LNS: FloatArray, from_LEG: FloatArray | None
    ) -> FloatArray:
        logical_LRS = self.on_members(logical_LNS, fill=load_LE.shape[1] + 1)
        return self.scale.across(load_LE, logical_LRS, self.shares_on_members(share_LNS), from_LEG)

    def weigh(
        self, load_LE: FloatArray, logical_LNS: IntArray, share_LNS: FloatArray, from_LEG: FloatArray | None
    ) -> tuple[FloatArray, FloatArray]:
        logical_LRS = self.on_members(logical_LNS, fill=load_LE.shape[1] + 1)
        return self.scale.weigh(load_LE, logical_LRS, self.shares_on_members(share_LNS), from_LEG)


def replan_groups(
    load_LE: FloatArray,
    fleet: Fleet,
    current: Sequence[Sequence[int]],
    *,
    prices: Prices,
    current_shares: Sequence[Sequence[int]] = (),
    least_copies: int = 1,
    links_RR: FloatArray | None = None,
    group_ranks: int = 0,
) -> Replan:
    """As `replan`; where `current` has teams, so has the result. group_ranks: ranks of each of several EP groups, which
    all hold every expert: without teams that span them they cannot be planned for, and stay. Raises InvalidInput.
    """
    num_experts = load_LE.shape[1]
    start_LRS = slots_on_ranks(current, fleet, num_experts=num_experts)
    members_NM = mirrors(start_LRS, fleet) if not group_ranks else _across_groups(start_LRS, fleet, group_ranks)
    if members_NM is None and not group_ranks:
        return replan(
            load_LE,
            fleet,
            current,
            prices=prices,
            current_shares=current_shares,
            least_copies=least_copies,
            links_RR=links_RR,
        )
    scale = scale_of(fleet, prices, links_RR, group_ranks=group_ranks)
    start_part_LRS = parts_on_ranks(current_shares, start_LRS, fleet, num_experts)
    if members_NM is None:
        told = f"stays: the EP groups of {group_ranks} ranks do not hold the same experts, so they cannot change as one"
        return _from_to(load_LE, scale, prices, (start_LRS, start_part_LRS), (start_LRS, start_part_LRS), told)
    teams, (num_teams, size) = _Teams.of(members_NM, scale), members_NM.shape
    first_N = members_NM[:, 0]
    part_LNS = np.zeros((len(load_LE), num_teams, start_LRS.shape[2]), dtype=np.int64)
    for ranks in members_NM.T:
        part_LNS += follow(start_part_LRS[:, ranks], start_LRS[:, ranks], start_LRS[:, first_N], num_experts)
    found = replan(
        load_LE,
        teams.wide,
        rows_of(start_LRS[:, first_N], teams.wide, num_experts),
        prices=replace(
            prices,
            bytes_per_expert=prices.bytes_per_expert * size,
            most_moves=None if prices.most_moves is None else prices.most_moves // size,
        ),
        current_shares=rows_of_parts(part_LNS, teams.wide),
        least_copies=-(-least_copies // size),
        scale=teams,
    )
    logical_LNS = slots_on_ranks(found.logical_of_slot, teams.wide, num_experts=num_experts)
    logical_LRS = teams.on_members(logical_LNS, fill=num_experts + 1)
    part_LRS = teams.parts_on_members(
        parts_on_ranks(found.share_of_slot, logical_LNS, teams.wide, num_experts), logical_LNS, num_experts
    )
    kept_LRS = keep_places(logical_LRS, start_LRS, num_experts)
    kept_part_LRS = follow(part_LRS, logical_LRS, kept_LRS, num_experts)
    return _from_to(load_LE, scale, prices, (start_LRS, start_part_LRS), (kept_LRS, kept_part_LRS), found.reason)


def _from_to(  # noqa: PLR0917
    load_LE: FloatArray,
    scale: Scale,
    prices: Prices,
    before: tuple[IntArray, IntArray],
    after: tuple[IntArray, IntArray],
    why_stay: str,
) -> Replan:
    """What leads from one layout and its parts to another; layers in which other parts alone would win little stay."""
    num_experts = load_LE.shape[1]
    (start_LRS, start_part_LRS), (logical_LRS, part_LRS) = before, after
    start_share_LRS, share_LRS = (shares_of(part, logical, num_experts) for logical, part in (before, after))
    (worst_before_L, before_L), (worst_after_L, after_L) = (
        scale.weigh(load_LE, start_LRS, start_share_LRS),
        scale.weigh(load_LE, logical_LRS, share_LRS),
    )
    moves_L = arrivals(start_LRS, logical_LRS, num_experts).sum((1, 2))
    stays_L = (moves_L == 0) & (before_L - after_L <= WORTH_CHANGING * before_L)
    stays_LRS = stays_L[:, None, None]
    part_LRS = np.where(stays_LRS, start_part_LRS, part_LRS)
    share_LRS = np.where(stays_LRS, start_share_LRS, share_LRS)
    moves = int(moves_L.sum())
    gain_s = float((before_L - after_L)[~stays_L].sum()) * prices.seconds_per_pick * prices.horizon
    cost_s = moves * prices.bytes_per_expert / prices.bytes_per_s
    crossed_before, crossed_after = (
        leaving(scale.across(load_LE, logical, share)) * prices.bytes_per_pick
        for logical, share in ((start_LRS, start_share_LRS), (logical_LRS, share_LRS))
    )
    return Replan(
        logical_of_slot=rows_of(logical_LRS, scale.fleet, num_experts),
        share_of_slot=said_parts(part_LRS, logical_LRS, scale.fleet, num_experts),
        moves=moves,
        worst_before=tuple(worst_before_L.tolist()),
        worst_after=tuple(np.where(stays_L, worst_before_L, worst_after_L).tolist()),
        crossed_before=crossed_before,
        crossed_after=crossed_after,
        gain_s=gain_s,
        cost_s=cost_s,
        reason=why_stay if stays_L.all() else reason_of(moves, gain_s, cost_s, gain_s, changes=True),
    )


def pack_groups(load_LE: FloatArray, fleet: Fleet, *, least_copies: int) -> Shelf:
    """The plan from scratch that `replan_groups` can go on with: teams of `least_copies` ranks that hold the same, or
    pack_anew's where the ranks do not divide or one copy is enough.
    """
    if least_copies > 1 and fleet.ranks_with_slots % least_copies == 0:
        naming = Naming.of(load_LE)
        mirrored = pack_mirrored(naming.by_number(load_LE), fleet, least_copies)
        if mirrored is not None and mirrors(mirrored.logical_LRS, fleet) is not None:
            copies_LE, logical_LRS = naming.by_name(mirrored.copies_LE), naming.names(mirrored.logical_LRS)
            return Shelf.of(load_LE, copies_LE, fleet, logical_LRS)
    return pack_anew(load_LE, fleet, least_copies=least_copies)


def mirrors(logical_LRS: IntArray, fleet: Fleet) -> IntArray | None:
    """[N, M] ranks that hold the same in every layer; None unless all ranks that have slots are in equal teams of two
    or more.
    """
    held_LRS = np.sort(logical_LRS, axis=2)
    ranks_of: dict[bytes, list[int]] = {}
    for rank in np.flatnonzero(fleet.slots_R).tolist():
        ranks_of.setdefault(held_LRS[:, rank].tobytes(), []).append(rank)
    sizes = {len(ranks) for ranks in ranks_of.values()}
    if len(sizes) != 1 or sizes == {1}:
        return None
    return np.asarray(list(ranks_of.values()), dtype=np.int64)


def _across_groups(logical_LRS: IntArray, fleet: Fleet, group_ranks: int) -> IntArray | None:
    """[N, M] as `mirrors`, each team with as many members in every EP group; at least the ranks of one number, if these
    hold the same in all groups.
    """
    by_number_NM = np.arange(fleet.num_ranks).reshape(-1, group_ranks).T
    held_NMX = np.sort(logical_LRS, axis=2).transpose(1, 0, 2).reshape(fleet.num_ranks, -1)[by_number_NM]
    if (held_NMX != held_NMX[:, :1]).any():
        return None
    members_NM = mirrors(logical_LRS, fleet)
    if members_NM is not None:
        of_group_NK = (members_NM[:, :, None] // group_ranks == np.arange(by_number_NM.shape[1])).sum(1)
        if np.ptp(of_group_NK) == 0:
            return members_NM
    return by_number_NM[fleet.slots_R[by_number_NM[:, 0]] > 0]
