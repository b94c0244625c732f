"""Which expert map the group shall follow now: the one it has, one for another size, or a better one for its load.

The current map is a fact, read from the ExpertMap objects, so that an operator that starts anew goes on with it. A
better one is looked for once a window, in a quiet moment: everybody active, the wish in force, enough tokens counted.
Whether it is worth its moves is experts.replan's to say, in seconds; this module names the prices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt

import numpy as np

from moe_core.contract.exchange import RuntimeState
from moe_core.contract.expert_map import ExpertMap
from moe_core.decide.crew import Seat
from moe_core.decide.memory import Memory, condition_in
from moe_core.decide.speeds import seconds_of_ranks, speeds_of, told_speeds
from moe_core.experts.bounds import bound_of_slots
from moe_core.experts.carry import carry_over
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import replan_groups
from moe_core.experts.links import seconds_per_byte
from moe_core.experts.measure import balancedness_of, copies_of_logical
from moe_core.experts.replan import Prices, Replan, Rows, replan
from moe_core.experts.tiers import first_group, side_by_side
from moe_core.facts import Condition, Facts, ObjectFact, Wish
from moe_core.manifests.map_slices import map_of_mixed_slices, map_of_slices
from moe_core.manifests.plan import Plan
from moe_core.outcome import InvalidInput, Reason
from moe_core.spec.service import Rebalance

PICKS_PER_EXPERT = 16
"""Below so many in a window, on average, a load is more chance than popularity: a count of 16 is off by a quarter
(Poisson), a rank of nine such experts by a twelfth."""
FULL_WINDOW = 0.9
CHANGE_S = 0.1
"""What taking up a new map costs beside its moves: ranks agree on an epoch and connect anew, 30 to 50 ms on four ranks
of two shared cores (tests/bench: recovery), and the processes behind them notice."""
CHANCE = 2.0
"""Standard errors of a count (Poisson: its square root): what is less may be one window's luck."""
EVEN_ENOUGH = 0.9
"""Of the balancedness that is possible at best; below it a service is called not balanced."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """`balanced` is the condition to report, None where the one that was written stands; `weighed_at` as in Memory."""

    expert_map: ExpertMap
    balanced: Condition | None = None
    weighed_at: float | None = None
    waking: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Current:
    expert_map: ExpertMap
    least_copies: int


@dataclass(frozen=True, slots=True)
class _Found:
    """`problem`: why the objects do not hold the map that was written; `current` is then what could be saved of it."""

    current: _Current | None = None
    problem: str = ""


def assigned(
    plan: Plan, memory: Memory, facts: Facts, now: float, *, num_ranks: int, ranks: Mapping[int, Seat]
) -> Assigned:
    """The map for a group of `num_ranks`."""
    if plan.rebalance is None:
        return Assigned(plan.expert_map(num_ranks), _unknown(Reason.LOAD_NOT_FOLLOWED, "the policy is not Balanced"))
    found = _found(facts.objects)
    current = found.current
    slots = plan.slots(num_ranks)
    if current is None or not _suits(current, plan, slots, num_ranks):
        anew = _anew(plan, current, facts, _fleet(slots, ranks), num_ranks)
        return Assigned(anew, _of_new_map(found.problem, "in order again" if current is None else "planned anew"))
    if found.problem:
        return Assigned(current.expert_map, _of_new_map(found.problem, "every layer stays as its object has it"))
    runtime = facts.runtime
    if runtime is None or facts.refused or not _is_quiet(plan, memory, runtime, current.expert_map, num_ranks):
        return Assigned(current.expert_map, None, memory.weighed_at)
    wait = _due_in(plan.rebalance, memory, runtime, now)
    if wait > 0:
        return Assigned(current.expert_map, None, memory.weighed_at, waking=(wait,))
    fleet = replace(_fleet(slots, ranks), speed_of_rank=speeds_of(seconds_of_ranks(runtime, ranks), num_ranks))
    weighed = _weighed(plan, plan.rebalance, current.expert_map, runtime, now, fleet)
    # Where nothing was counted the time stands too: a status would be written every window for its sake alone.
    return weighed if runtime.load else replace(weighed, weighed_at=memory.weighed_at)


def balanced_condition(wish: Wish, found: Assigned) -> Condition:
    """What was found now, else what was last written."""
    before = condition_in(wish.status, "Balanced")
    if found.balanced is not None:
        return found.balanced
    known = next((reason for reason in _REASONS if before is not None and reason == before.get("reason")), None)
    if before is None or known is None:
        return _unknown(Reason.COUNTING, "no load has been counted yet")
    status = before.get("status")
    return Condition(
        "Balanced", status if status in ("True", "False") else "Unknown", known, str(before.get("message", ""))
    )


_REASONS = (Reason.BALANCED, Reason.REBALANCED, Reason.IMBALANCED, Reason.COUNTING, Reason.MAP_UNREADABLE)


def _unknown(reason: Reason, message: str) -> Condition:
    return Condition("Balanced", "Unknown", reason, message)


def _of_new_map(problem: str, instead: str) -> Condition:
    if not problem:
        return _unknown(Reason.COUNTING, "a new expert map; no load has been counted since")
    told = f"the ExpertMap objects do not say which experts the ranks hold: {problem}; {instead}"
    return Condition("Balanced", "False", Reason.MAP_UNREADABLE, told)


def is_spoilt(objects: Sequence[ObjectFact]) -> bool:
    """Whether there are ExpertMap objects and they are not the map they should be, whatever was applied last."""
    return bool(_found(objects).problem)


def _found(objects: Sequence[ObjectFact]) -> _Found:
    """As the objects say."""
    return _read(_Versions(sorted((obj for obj in objects if obj.kind == "ExpertMap"), key=lambda obj: obj.name)))


class _Versions:
    """ExpertMap objects that compare by name and version: what they hold is read once, not in every cycle."""

    def __init__(self, slices: Sequence[ObjectFact]) -> None:
        self.slices = slices
        self._key = tuple((obj.name, obj.version) for obj in slices)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Versions) and self._key == other._key


@lru_cache(maxsize=32)
def _read(versions: _Versions) -> _Found:
    """Slices of another map than the first one's are left over from that map; unless the first one's are not all there,
    because whoever wrote them was stopped: then the layers of both are the map.
    """
    specs = [obj.spec for obj in versions.slices]
    try:
        whole = map_of_slices([spec for spec in specs if spec.get("digest") == specs[0].get("digest")])
        return _Found() if whole is None else _Found(_counted(whole))
    except InvalidInput as error:
        problem = str(error)
    try:
        return _Found(_counted(map_of_mixed_slices(specs)), problem)
    except InvalidInput:
        return _Found(problem=problem)


def _counted(expert_map: ExpertMap) -> _Current:
    return _Current(expert_map, int(copies_of_logical(expert_map).min(initial=expert_map.num_ranks)))


def _suits(current: _Current, plan: Plan, slots: tuple[int, ...], num_ranks: int) -> bool:
    """Made for this model and these slots, with the copies that every expert was promised: as far as so many ranks can
    have them, while a group that is to have more grows.
    """
    promised = min(plan.min_copies, plan.least_copies(num_ranks))
    shape = (current.expert_map.num_logical_experts, current.expert_map.num_layers, current.expert_map.slots_of_rank)
    return shape == (plan.num_experts, plan.num_layers, slots) and current.least_copies >= promised


def _fleet(slots: tuple[int, ...], ranks: Mapping[int, Seat]) -> Fleet:
    """A node is what ranks die together with."""
    live = [ranks[rank].live if rank in ranks else None for rank in range(len(slots))]
    nodes = [pod.node if pod is not None and pod.node else f"of rank {rank}" for rank, pod in enumerate(live)]
    return Fleet(slots, domain_of_rank=tuple(nodes))


def _anew(plan: Plan, current: _Current | None, facts: Facts, fleet: Fleet, num_ranks: int) -> ExpertMap:
    """For a first group in order; for another size by what is known of the load, with few moves."""
    known = current.expert_map if current is not None else None
    if known is None or (known.num_logical_experts, known.num_layers) != (plan.num_experts, plan.num_layers):
        return plan.expert_map(num_ranks)
    load_LE = _load(plan, facts.runtime)
    if load_LE is None or load_LE.sum() < _needed_picks(plan):
        load_LE = np.ones((plan.num_layers, plan.num_experts))
    if plan.group_ranks:
        group = _group_anew(plan, known, load_LE, fleet, num_ranks)
        whole = side_by_side(group, plan.groups(num_ranks))
        return _next_map(known, fleet.slots_of_rank, whole.logical_of_slot, whole.share_of_slot)
    rows = carry_over(known, load_LE, fleet, least_copies=plan.min_copies)
    return _next_map(known, fleet.slots_of_rank, rows)


def _group_anew(plan: Plan, known: ExpertMap, load_LE: FloatArray, fleet: Fleet, num_ranks: int) -> ExpertMap:
    """The layout of every EP group: the one there is where it will do, so that a group more or less moves nothing."""
    size, copies = plan.group_ranks, plan.copies_in_group(num_ranks)
    group, slots = first_group(known, size), fleet.slots_of_rank[:size]
    if group.slots_of_rank == slots and copies_of_logical(group).min(initial=size) >= copies:
        return group
    members = Fleet(slots, domain_of_rank=fleet.domain_of_rank[:size])
    return _next_map(group, slots, carry_over(group, load_LE, members, least_copies=copies))


def _next_map(before: ExpertMap, slots: tuple[int, ...], rows: Rows, shares: Rows = ()) -> ExpertMap:
    return ExpertMap(
        generation=before.generation + 1,
        num_logical_experts=before.num_logical_experts,
        slots_of_rank=slots,
        logical_of_slot=rows,
        share_of_slot=shares,
    )


def _load(plan: Plan, runtime: RuntimeState | None) -> FloatArray | None:
    """[L, E]; None where nothing was counted, or for another model."""
    if runtime is None or len(runtime.load) != plan.num_layers:
        return None
    if {len(row) for row in runtime.load} != {plan.num_experts} or not any(map(any, runtime.load)):
        return None
    return np.asarray(runtime.load, dtype=np.float64)


def _needed_picks(plan: Plan) -> int:
    """Fewer do not tell popular experts."""
    return PICKS_PER_EXPERT * plan.num_layers * plan.num_experts


def _is_quiet(plan: Plan, memory: Memory, runtime: RuntimeState, current: ExpertMap, num_ranks: int) -> bool:
    """The wish is in force, members and map; nobody joins, leaves or is missed."""
    in_force = memory.wish_generation > 0 and runtime.wish_generation == memory.wish_generation
    return in_force and runtime.map_digest == current.digest and num_ranks == plan.num_ranks


def _due_in(rebalance: Rebalance, memory: Memory, runtime: RuntimeState, now: float) -> float:
    """Seconds until a whole window lies behind the last decision, and behind the coordinator that counts.

    A decision that lies ahead was dated by another clock, or by this one before it was set back: it holds nothing up.
    """
    weighed_at = memory.weighed_at
    since = 0.0 if weighed_at is None or weighed_at > now else weighed_at + rebalance.window_seconds - now
    return max(since, FULL_WINDOW * rebalance.window_seconds - runtime.load_window_s)


def _weighed(  # noqa: PLR0917
    plan: Plan, rebalance: Rebalance, current: ExpertMap, runtime: RuntimeState, now: float, fleet: Fleet
) -> Assigned:
    load_LE = _load(plan, runtime)
    picks = 0 if load_LE is None else int(load_LE.sum())
    needed = _needed_picks(plan)
    if load_LE is None or picks < needed or runtime.seconds_per_pick <= 0:
        told = f"{picks} picks in the last {runtime.load_window_s:.0f} s, {needed} are needed to tell popular experts"
        return Assigned(current, _unknown(Reason.COUNTING, told), now)
    prices = replace(
        limits(rebalance, current, window_s=runtime.load_window_s),
        seconds_per_pick=runtime.seconds_per_pick,
        bytes_per_expert=runtime.expert_bytes,
        bytes_per_pick=runtime.pick_bytes,
    )
    links_RR = seconds_per_byte(runtime.links, fleet.domain_of_rank)
    found = next_assignment(plan, load_LE, fleet, current, prices=prices, links_RR=links_RR)
    stays = _why_stay(found, pick_bytes=0 if links_RR is None else runtime.pick_bytes)
    is_new = not stays
    bound_L = bound_of_slots(load_LE, fleet, group_ranks=plan.group_ranks)
    told, is_even = _said(load_LE.sum(1) / fleet.ranks_with_slots, bound_L, found, stays)
    if unlike := told_speeds(fleet.speed_of_rank):
        told = f"{told}; {unlike}"
    reason = Reason.REBALANCED if is_new else Reason.BALANCED if is_even else Reason.IMBALANCED
    new_map = _next_map(current, fleet.slots_of_rank, found.logical_of_slot, found.share_of_slot) if is_new else current
    return Assigned(new_map, Condition("Balanced", "True" if is_even else "False", reason, told), now)


def next_assignment(
    plan: Plan,
    load_LE: FloatArray,
    fleet: Fleet,
    current: ExpertMap,
    *,
    prices: Prices,
    links_RR: FloatArray | None,
    from_LEG: FloatArray | None = None,
) -> Replan:
    """What was promised decides who plans: where copies lie on fixed sets of ranks they go on doing so.

    from_LEG: who asks for whom by failure domain, as a trace tells it; of ranks in fixed sets all are taken as alike.
    """
    rows, shares = current.logical_of_slot, current.share_of_slot
    if not plan.in_mirrors:
        return replan(load_LE, fleet, rows, prices=prices, current_shares=shares, links_RR=links_RR, from_LEG=from_LEG)
    return replan_groups(
        load_LE,
        fleet,
        rows,
        prices=prices,
        current_shares=shares,
        least_copies=max(plan.min_copies, plan.num_groups),
        links_RR=links_RR,
        group_ranks=plan.group_ranks,
    )


def limits(rebalance: Rebalance, expert_map: ExpertMap, *, window_s: float | None = None) -> Prices:
    """What the resource says of a new map; the load was counted over a window as wished, or over `window_s`."""
    num_slots = sum(expert_map.slots_of_rank) * expert_map.num_layers
    return Prices(
        horizon=rebalance.horizon_seconds / (window_s or rebalance.window_seconds),
        most_moves=rebalance.max_moved_percent * num_slots // 100,
    )


def _why_stay(found: Replan, *, pick_bytes: int) -> str:
    """Nothing where the new map is to be taken up: when it spares the heaviest ranks, or the links between machines."""
    if found.gain_s <= found.cost_s:
        return found.reason
    saved_s, heaviest = found.gain_s - found.cost_s, sum(found.worst_before)
    if saved_s <= CHANGE_S:
        return f"stays: another map saves {saved_s:.3g} s, taking it up costs {CHANGE_S} s"
    fewer = heaviest - sum(found.worst_after)
    crossing = found.crossed_before / max(pick_bytes, 1)
    no_longer = crossing - found.crossed_after / max(pick_bytes, 1)
    if fewer <= CHANCE * sqrt(heaviest) and no_longer <= CHANCE * sqrt(crossing):
        return f"stays: another map spares the heaviest ranks {fewer:.0f} of {heaviest:.0f} picks, which may be chance"
    return ""


def _said(mean_L: FloatArray, bound_L: FloatArray, found: Replan, stays: str) -> tuple[str, bool]:
    """(the condition's message, whether the load will fall evenly enough)"""
    before, after = (balancedness_of(mean_L, np.asarray(worst)) for worst in (found.worst_before, found.worst_after))
    best = balancedness_of(mean_L, bound_L)
    to_come = "" if stays else f", {after:.3f} from now on"
    told = f"balancedness {before:.3f}{to_come}, at best {best:.3f}; {stays or found.reason}"
    is_even = (before if stays else after) >= EVEN_ENOUGH * best
    return (told if is_even else f"{told}; raise experts.rebalance.maxMovedPercent or horizonSeconds"), is_even
