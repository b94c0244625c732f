"""Rank pods: create what is missing behind the gate, replace exactly the dead, within a budget, with back-off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_core.contract.names import ROLE_RANK
from moe_core.decide.crew import Seat
from moe_core.decide.memory import Memory
from moe_core.facts import Action, DeletePod
from moe_core.manifests.plan import Plan
from moe_core.manifests.pods import create_pod

BACKOFF_FIRST_S = 5.0
BACKOFF_MOST_S = 300.0
"""As Kubernetes backs off restarts: doubling, at most five minutes."""


@dataclass(slots=True)
class Steps:
    """What one cycle does to the ranks, and what stands in the way."""

    actions: list[Action] = field(default_factory=list)
    exhausted: bool = False
    lost: dict[int, str] = field(default_factory=dict)
    """Ranks that have no live pod though they had one, and why."""
    replaced: list[tuple[int, int, str]] = field(default_factory=list)
    """(rank, new incarnation, why)."""
    waking: list[float] = field(default_factory=list)
    restarts: int = 0


def remember(
    num_ranks: int, memory: Memory, ranks: Mapping[int, Seat], *, planned: bool
) -> tuple[list[int], list[int]]:
    """(incarnations, baselines) by rank. `planned` says that no missing pod counts as a failure now (suspended)."""
    size = max([num_ranks, len(memory.incarnations), *(index + 1 for index in ranks)])
    seen = [max(memory.incarnation(r), ranks[r].highest if r in ranks else 0) for r in range(size)]
    base = [seen[r] if planned or _is_planned(r, num_ranks, ranks) else memory.baseline(r) for r in range(size)]
    return seen, base


def _is_planned(rank: int, num_ranks: int, ranks: Mapping[int, Seat]) -> bool:
    """Whether the absence of this rank's pod is a resize's doing."""
    return rank >= num_ranks and (rank not in ranks or ranks[rank].live is None)


def backoff_s(replacement: int) -> float:
    """Seconds to wait before the n-th replacement of one rank, counted from the creation of the pod before it.

    >>> [backoff_s(n) for n in (1, 2, 3, 4, 9)]
    [0.0, 5.0, 10.0, 20.0, 300.0]
    """
    return 0.0 if replacement <= 1 else min(BACKOFF_FIRST_S * 2 ** min(replacement - 2, 16), BACKOFF_MOST_S)


def fill(
    plan: Plan,
    now: float,
    *,
    ranks: Mapping[int, Seat],
    seen: Sequence[int],
    base: Sequence[int],
) -> Steps:
    """Create what is missing and clear what is dead.

    A rank that ended well is as dead as any: the end of a job is told by the runtime, its ranks wait until they go.
    """
    steps = Steps()
    steps.restarts = sum(max(0, s - b - 1) for s, b in zip(seen, base, strict=True))
    left = plan.max_restarts - steps.restarts
    for rank in range(plan.num_ranks):
        seat = ranks.get(rank, Seat(ROLE_RANK, rank, None))
        if seat.live is not None:
            steps.actions += _clear(seat)
            if seat.suspect_until is not None:
                steps.waking.append(seat.suspect_until - now)
            continue
        replacement = seen[rank] - base[rank]
        if replacement <= 0:
            steps.actions += _hurried(seat)  # of a leaver that is wished again, on a node that is gone
            steps.actions.append(create_pod(plan, ROLE_RANK, index=rank, incarnation=seen[rank] + 1))
            steps.actions += _clear(seat, but_running=True)
            continue
        why = _why_lost(seat)
        steps.lost[rank] = why
        if left <= 0:
            steps.exhausted = True
            continue
        left -= 1
        newest = seat.newest
        wait = 0.0 if newest is None else newest.created_at + backoff_s(replacement) - now
        if wait > 0:
            steps.waking.append(wait)
            continue
        steps.actions += _hurried(seat)
        steps.actions.append(create_pod(plan, ROLE_RANK, index=rank, incarnation=seen[rank] + 1))
        steps.actions += _clear(seat, but_running=True)
        steps.replaced.append((rank, seen[rank] + 1, why))
    return steps


def _why_lost(seat: Seat) -> str:
    if seat.dead:
        pod, why = seat.dead[-1]
        return f"{pod.name}: {why}"
    if seat.leaving:
        return f"{seat.leaving[-1].name} was deleted"
    return "its pod has vanished"


def _hurried(seat: Seat) -> list[Action]:
    """Dead by the runtime's or the node's word, yet maybe running: asked to go before the successor is created."""
    return [DeletePod(pod.name, pod.uid) for pod, _ in seat.dead if pod.phase not in ("Failed", "Succeeded")]


def _clear(seat: Seat, *, but_running: bool = False) -> list[Action]:
    """Remove what is over. A failed pod goes once its successor was asked for: until then it tells of its end."""
    return [
        DeletePod(pod.name, pod.uid) for pod, _ in seat.dead if not but_running or pod.phase in ("Failed", "Succeeded")
    ]
