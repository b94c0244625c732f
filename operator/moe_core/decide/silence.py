"""Ranks that run and say nothing: stopped together with their guard, or cut off from the coordinator for good.

Everything else that can befall a rank ends its pod or is reported. Here only time tells, and only beside others that do
report: a coordinator that hears nobody is itself the one that is cut off, and ranks step on without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_core.contract.names import ROLE_RANK
from moe_core.decide.crew import states_of
from moe_core.decide.memory import Memory
from moe_core.facts import Facts

SILENT_S = 60.0
"""A guard fences a hung rank within seconds, and a coordinator that restarts has heard everybody after about ten."""
NEVER_HEARD_S = 900.0
"""A rank reports before it loads its model. Until then its own pod bounds every wait (180 s for its Ray node, 120 s for
the actor's creation, 300 s for its imports) and ends by itself; one that is silent for half as long again is stopped.
"""


@dataclass(frozen=True, slots=True)
class Silence:
    heard: tuple[int, ...]
    """Highest incarnation of each rank that a coordinator has ever heard; one that is still starting has more time."""
    since: tuple[tuple[int, float], ...]
    """(rank, when it was first missed)."""
    dead: Mapping[str, str] = field(default_factory=dict)
    """uid -> why, of those that have been silent for too long."""
    waking: tuple[float, ...] = ()


def listen(memory: Memory, facts: Facts, now: float, *, num_ranks: int) -> Silence:
    states = states_of(facts.runtime)
    pods = [p for p in facts.pods if p.role == ROLE_RANK and p.phase == "Running" and not p.deleting]
    heard = list(memory.heard) + [0] * max([num_ranks, *(p.index + 1 for p in pods)], default=0)
    for pod in pods:
        if pod.uid in states:
            heard[pod.index] = max(heard[pod.index], pod.incarnation)
    while heard and heard[-1] == 0:
        heard.pop()
    if facts.runtime is None:
        return Silence(tuple(heard), ())
    before = dict(memory.silent_since)
    silent = {pod.index: pod for pod in pods if pod.uid not in states}
    allowed = {
        rank: SILENT_S if rank < len(heard) and pod.incarnation == heard[rank] else NEVER_HEARD_S
        for rank, pod in silent.items()
    }
    since = tuple((rank, before.get(rank, now)) for rank in sorted(silent))
    if 2 * sum(1 for pod in pods if pod.uid in states) < num_ranks:
        return Silence(tuple(heard), since)
    over = [(rank, at) for rank, at in since if now - at >= allowed[rank]]
    dead = {silent[rank].uid: f"no word from it for {now - at:.0f} s" for rank, at in over}
    waking = tuple(at + allowed[rank] - now for rank, at in since if now - at < allowed[rank])
    return Silence(tuple(heard), since, dead, waking)
