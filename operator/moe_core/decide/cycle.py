"""One cycle, shared by both kinds: objects, helpers, ranks, wish. What it means is said in job.py and service.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY, ROLE_RANK
from moe_core.decide.assignment import Assigned, assigned, is_spoilt
from moe_core.decide.crew import Seat, may_take_part, seats
from moe_core.decide.follow import Following, follow, group_size, release_leavers
from moe_core.decide.gang import Steps, fill, remember
from moe_core.decide.helpers import tend
from moe_core.decide.maps import report_maps
from moe_core.decide.memory import Memory
from moe_core.decide.place import bind
from moe_core.decide.report import Counts, count
from moe_core.decide.silence import listen
from moe_core.facts import Action, DeleteObject, DeletePod, EnsureToken, Event, Facts
from moe_core.manifests.objects import wanted_objects
from moe_core.manifests.plan import Plan
from moe_core.outcome import NoFit, Reason

MAX_LOSS_TOLD = 500
STRANDED_S = 60.0
"""Longer than a node's flap or a pod that is just ending elsewhere, short against waiting in vain on held devices."""


@dataclass(frozen=True, slots=True)
class Cycle:
    actions: tuple[Action, ...]
    events: tuple[Event, ...]
    memory: Memory
    ranks: Mapping[int, Seat]
    gateways: Mapping[int, Seat]
    counts: Counts
    filled: Steps
    no_fit: NoFit | None
    following: Following
    assignment: Assigned
    formed: bool
    waking: tuple[float, ...]

    @property
    def restarts(self) -> int:
        return self.filled.restarts + len(self.filled.replaced)


def run_cycle(plan: Plan, memory: Memory, facts: Facts, now: float) -> Cycle:
    """Everything but completion and suspension."""
    epoch = max(memory.epoch, facts.runtime.epoch if facts.runtime is not None else 0)
    memory = replace(memory, epoch=epoch)
    formed = epoch > 0
    silence = listen(memory, facts, now, num_ranks=plan.num_ranks)
    ranks, gateways = seats(facts, now, ROLE_RANK, silent=silence.dead), seats(facts, now, ROLE_GATEWAY)
    coordinator = seats(facts, now, ROLE_COORDINATOR)
    size = group_size(plan, memory, facts, ranks)
    assignment = assigned(plan, memory, facts, now, num_ranks=size, ranks=ranks)
    following = follow(plan, memory, facts, num_ranks=size, expert_map=assignment.expert_map)

    seen, base = remember(plan.num_ranks, memory, ranks, planned=False)
    filled = fill(plan, now, ranks=ranks, seen=seen, base=base)
    ran = min(memory.wish_ranks or plan.num_ranks, plan.num_ranks) if formed else 0
    bound = bind(plan, facts, ranks=ranks, helpers=[*coordinator.values(), *gateways.values()], formed=ran)
    helpers, helper_waking = _helpers(plan, ranks, coordinator, gateways, now, starting=bool(bound.actions) or formed)
    stranded = _stranded(ranks, facts, now) if bound.no_fit is not None and not formed else None
    if stranded is not None and stranded <= 0:
        undone = [seat.live for _, seat in sorted(ranks.items()) if seat.live is not None and seat.is_placed]
        bound.undo = [DeletePod(pod.name, pod.uid) for pod in undone]
        base = [seen[r] if r in ranks and ranks[r].is_placed else base[r] for r in range(len(seen))]
    actions = (
        *_objects(plan, facts, assignment.expert_map),
        *filled.actions,
        *bound.actions,
        *bound.undo,
        *helpers,
        *following.actions,
        *release_leavers(plan, facts, following, ranks, formed=formed),
        *report_maps(assignment.expert_map, facts, now),
    )
    memory = replace(
        memory,
        incarnations=tuple(seen),
        baselines=tuple(base),
        wish_generation=following.generation,
        wish_digest=following.digest,
        wish_ranks=following.num_ranks if facts.runtime is not None else memory.wish_ranks,
        dead_pod_uids=following.dead_pod_uids,
        started_at=memory.started_at if memory.started_at is not None else now,
        heard=silence.heard,
        silent_since=silence.since,
        weighed_at=assignment.weighed_at,
        num_experts=plan.num_experts,
        num_layers=plan.num_layers,
        redundant_per_rank=plan.redundant_per_rank,
        levels=plan.pack.levels,
        last_loss=_last_loss(filled, memory),
    )
    return Cycle(
        actions=actions,
        events=tuple(
            Event("Warning", Reason.RANK_REPLACED, f"rank {rank} lost ({why}); incarnation {incarnation} replaces it")
            for rank, incarnation, why in filled.replaced
        ),
        memory=memory,
        ranks=ranks,
        gateways=gateways,
        counts=count(plan.num_ranks, ranks, facts.runtime, last_active=memory.active if formed else 0),
        filled=filled,
        no_fit=bound.no_fit,
        following=following,
        assignment=assignment,
        formed=formed,
        waking=(
            *filled.waking,
            *helper_waking,
            *silence.waking,
            *assignment.waking,
            *([] if stranded is None else [max(stranded, 0.05)]),
        ),
    )


def _last_loss(filled: Steps, memory: Memory) -> str:
    if not filled.replaced:
        return memory.last_loss
    rank, _, why = filled.replaced[-1]
    return f"rank {rank}: {why}"[:MAX_LOSS_TOLD]


def _stranded(ranks: Mapping[int, Seat], facts: Facts, now: float) -> float | None:
    """Seconds until a half started gang is undone, None if nothing of it is placed or it may serve already.

    A part of it was started (the operator died between two bindings, or a node went away at once) and the rest finds no
    room: it gives its room back and waits as a whole, so that two such gangs can never wait for each other.
    """
    placed = [seat.live for seat in ranks.values() if seat.live is not None and seat.is_placed]
    if not placed or any(may_take_part(pod, facts.runtime) for pod in placed):
        return None
    return min(pod.created_at for pod in placed) + STRANDED_S - now


def _helpers(
    plan: Plan,
    ranks: Mapping[int, Seat],
    coordinator: Mapping[int, Seat],
    gateways: Mapping[int, Seat],
    now: float,
    *,
    starting: bool,
) -> tuple[list[Action], list[float]]:
    """Coordinator and gateways start with the ranks, not before: a gang that waits for room must not hold any."""
    if not (starting or coordinator or any(seat.is_placed for seat in ranks.values())):
        return [], []
    others = [*ranks.values(), *gateways.values()]
    runs = any(seat.live is not None and seat.live.phase == "Running" for seat in others)
    first, waking = tend(plan, ROLE_COORDINATOR, 1, coordinator, now, reattach=runs)
    second, more = tend(plan, ROLE_GATEWAY, plan.num_gateways, gateways, now)
    return [*first, *second], [*waking, *more]


def _objects(plan: Plan, facts: Facts, expert_map: ExpertMap) -> list[Action]:
    """Apply what differs from what was last applied, remove slices of a map that no longer exist."""
    is_edited = is_spoilt(facts.objects)
    have = {(obj.kind, obj.name): "" if is_edited and obj.kind == "ExpertMap" else obj.digest for obj in facts.objects}
    wanted = wanted_objects(plan, expert_map)
    actions: list[Action] = [] if ("Secret", plan.child("token")) in have else [EnsureToken(plan.child("token"))]
    actions += [obj for obj in wanted if have.get((obj.kind, obj.name)) != obj.digest]
    names = [(obj.kind, obj.name) for obj in wanted]
    stale = sorted(key for key in have if key[0] in ("ExpertMap", "NetworkPolicy", "Service") and key not in names)
    return [*actions, *(DeleteObject(kind, name) for kind, name in stale)]


def everything_goes(facts: Facts) -> list[Action]:
    """Delete every pod of this owner that nobody has asked to go yet."""
    pods = sorted(facts.pods, key=lambda p: (p.role, p.index, p.incarnation, p.uid))
    return [DeletePod(pod.name, pod.uid) for pod in pods if not pod.deleting]


def soonest(waking: Sequence[float]) -> float | None:
    """When to look again, seconds; never a busy loop."""
    return max(0.05, min(waking)) if waking else None
