"""The pods of one owner as they are: who lives, who is dead and why, who is leaving. No decision is taken here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_core.contract.exchange import RankState, RuntimeState
from moe_core.contract.names import ROLE_RANK
from moe_core.facts import Facts, NodeFact, PodFact

NODE_GRACE_S = 20.0
"""A node may miss its heartbeats this long before its pods count as dead.

The node controller itself waits 40 to 50 s before it says NotReady, so this is on top of that.
"""


@dataclass(frozen=True, slots=True)
class Seat:
    """One index of one role: a rank, the coordinator, a gateway."""

    role: str
    index: int
    live: PodFact | None
    """The pod that counts; at most one lives, the newest where a shell's cache shows two."""
    dead: tuple[tuple[PodFact, str], ...] = ()
    """Pods that are over but still exist, with why."""
    leaving: tuple[PodFact, ...] = ()
    """Pods that somebody has asked to go; they never come back."""
    highest: int = 0
    """Highest incarnation among all of them."""
    suspect_until: float | None = None
    """The live pod's node is not ready, and counts as gone at this time."""

    @property
    def newest(self) -> PodFact | None:
        everyone = [*([self.live] if self.live else []), *(pod for pod, _ in self.dead), *self.leaving]
        return max(everyone, key=lambda pod: pod.incarnation, default=None)

    @property
    def is_placed(self) -> bool:
        return self.live is not None and not self.live.gated and self.live.node is not None


def seats(facts: Facts, now: float, role: str, *, silent: Mapping[str, str] | None = None) -> dict[int, Seat]:
    """Every index of this role that has any pod, in order. `silent`: uid -> why, of ranks to be taken for dead."""
    nodes = {node.name: node for node in facts.nodes}
    failed = {**_failed_uids(facts.runtime), **(silent or {})} if role == ROLE_RANK else {}
    by_index: dict[int, list[PodFact]] = {}
    for pod in sorted(facts.pods, key=lambda p: (p.index, p.incarnation, p.uid)):
        if pod.role == role:
            by_index.setdefault(pod.index, []).append(pod)
    return {index: _seat(role, index, pods, nodes, failed, now) for index, pods in sorted(by_index.items())}


def _seat(  # noqa: PLR0917
    role: str,
    index: int,
    pods: Sequence[PodFact],
    nodes: dict[str, NodeFact],
    failed: dict[str, str],
    now: float,
) -> Seat:
    live: PodFact | None = None
    dead: list[tuple[PodFact, str]] = []
    for pod in pods:
        if pod.deleting:
            continue
        why = _why_dead(pod, nodes, now) or failed.get(pod.uid, "")
        if why:
            dead.append((pod, why))
        else:
            if live is not None:
                dead.append((live, f"superseded by incarnation {pod.incarnation}"))
            live = pod
    node = nodes.get(live.node) if live is not None and live.node is not None else None
    until = None
    if node is not None and not node.ready and node.not_ready_since is not None:
        until = node.not_ready_since + NODE_GRACE_S
    return Seat(
        role=role,
        index=index,
        live=live,
        dead=tuple(dead),
        leaving=tuple(pod for pod in pods if pod.deleting),
        highest=max(pod.incarnation for pod in pods),
        suspect_until=until,
    )


def _why_dead(pod: PodFact, nodes: dict[str, NodeFact], now: float) -> str:
    """Why this pod is over, empty while it lives. A gated pod needs no node."""
    if pod.phase in ("Failed", "Succeeded"):
        return pod.message or f"pod {pod.phase.lower()}"
    if pod.gated or pod.node is None:
        return ""
    node = nodes.get(pod.node)
    if node is None:
        return f"node {pod.node} is gone"
    if not node.ready and (node.not_ready_since is None or now >= node.not_ready_since + NODE_GRACE_S):
        return f"node {pod.node} is not ready"
    if pod.phase == "Pending" and not pod.scheduled and node.unschedulable:
        return f"node {pod.node} was cordoned before the pod was scheduled"  # and the pod may go nowhere else
    return ""


def _failed_uids(runtime: RuntimeState | None) -> dict[str, str]:
    if runtime is None or runtime.failure:  # what no restart can mend is told, not restarted
        return {}
    return {r.pod_uid: r.message or "the runtime gave this rank up" for r in runtime.ranks if r.phase == "Failed"}


def states_of(runtime: RuntimeState | None) -> dict[str, RankState]:
    """What the runtime says about each pod, by uid: incarnations of one rank must never be mixed up."""
    return {} if runtime is None else {state.pod_uid: state for state in runtime.ranks}


def active_uids(runtime: RuntimeState | None) -> frozenset[str]:
    return frozenset(uid for uid, state in states_of(runtime).items() if state.phase == "Active")


def may_take_part(pod: PodFact, runtime: RuntimeState | None) -> bool:
    """Whether this pod may be in a group that no status remembers: it runs, and no coordinator has heard of it.

    One that is away cannot say, one that has just started does not know yet.
    """
    return not pod.gated and pod.phase != "Pending" and pod.uid not in states_of(runtime)


def proven_dead(facts: Facts) -> tuple[str, ...]:
    """uids of rank pods of which no process can be left: reaped, or removed from the API.

    A pod on a lost node is not proven dead: its process may well go on without us. Nobody has to have seen a pod die:
    survivors tell whom they miss, and whoever is missing among the pods is gone.
    """
    pods = {pod.uid: pod for pod in facts.pods}
    uids = [pod.uid for pod in facts.pods if pod.role == ROLE_RANK and pod.phase in ("Failed", "Succeeded")]
    if facts.runtime is not None:
        known = (*(state.pod_uid for state in facts.runtime.ranks), *facts.runtime.member_uids)
        uids += [uid for uid in known if uid not in pods]
    return tuple(sorted(set(uids)))
