"""What the running group is told: how many ranks, which map, who is proven dead; and when a leaver's pod may go.

Growing: new pods first, and only when every new rank has reported does the wish name it and its share of the experts.
Shrinking: the wish with the smaller map first; a pod goes only when the runtime says that its rank is out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_core.contract.base import digest_of
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.expert_map import ExpertMap
from moe_core.decide.crew import Seat, may_take_part, proven_dead, states_of
from moe_core.decide.memory import MAX_DEAD_PODS, Memory
from moe_core.facts import Action, DeletePod, Facts, PutWish
from moe_core.manifests.plan import Plan

LOAD_WINDOW_S = 60.0
"""Where nothing follows the load: what the balance of the last minute is measured over."""
_OUT = ("Left", "Failed")
_MEMBER = ("Active", "Draining")


@dataclass(frozen=True, slots=True)
class Following:
    """What the coordinator is told; without actions it knows already, or none answers."""

    num_ranks: int
    generation: int
    digest: str
    dead_pod_uids: tuple[str, ...]
    actions: tuple[Action, ...]

    def in_force(self, runtime: RuntimeState | None) -> bool:
        return runtime is not None and self.generation > 0 and runtime.wish_generation == self.generation


def group_size(plan: Plan, memory: Memory, facts: Facts, ranks: Mapping[int, Seat]) -> int:
    """Ranks that the wish names now; while there is nobody to tell, those that it named last."""
    told = memory.wish_ranks
    if facts.runtime is None and told:
        return told
    if told == 0 or (memory.epoch == 0 and (facts.runtime is None or facts.runtime.epoch == 0)):
        return plan.num_ranks
    if plan.num_ranks <= told:
        return plan.num_ranks
    joiners = [ranks[r].live if r in ranks else None for r in range(told, plan.num_ranks)]
    states = states_of(facts.runtime)
    # Left is how a rank reports that is loaded and not wished yet, so it may come back as well
    ready = all(pod is not None and pod.uid in states and states[pod.uid].phase != "Failed" for pod in joiners)
    return plan.num_ranks if ready else told


def follow(plan: Plan, memory: Memory, facts: Facts, *, num_ranks: int, expert_map: ExpertMap) -> Following:
    """The wish under a generation that only grows, put unless the coordinator is known to have it."""
    known = memory.dead_pod_uids
    dead = (*known, *(uid for uid in proven_dead(facts) if uid not in known))[-MAX_DEAD_PODS:]
    window_s = float(plan.rebalance.window_seconds) if plan.rebalance is not None else LOAD_WINDOW_S
    digest = digest_of(f"{num_ranks} {expert_map.digest} {','.join(dead)} {window_s} {plan.probe}")
    runtime = facts.runtime
    if runtime is None:  # nobody to tell; a wish that was never heard is not remembered
        return Following(
            num_ranks=num_ranks,
            generation=memory.wish_generation,
            digest=memory.wish_digest,
            dead_pod_uids=dead,
            actions=(),
        )
    generation = memory.wish_generation
    heard_of = max(facts.put_generation or 0, runtime.wish_generation or 0)
    if digest != memory.wish_digest or generation == 0 or heard_of > generation:
        # the last: a wish was put, and the status that should remember it was never written
        generation = max(generation, heard_of) + 1
    wish = RuntimeWish(
        generation=generation,
        ranks=tuple(range(num_ranks)),
        expert_map=expert_map,
        dead_pod_uids=dead,
        newest_epoch=memory.epoch,
        load_window_s=window_s,
        probe=plan.probe,
    )
    heard = facts.put_generation == generation
    return Following(
        num_ranks=num_ranks,
        generation=generation,
        digest=digest,
        dead_pod_uids=dead,
        actions=() if heard else (PutWish(wish),),
    )


def release_leavers(
    plan: Plan, facts: Facts, following: Following, ranks: Mapping[int, Seat], *, formed: bool
) -> list[Action]:
    """Delete pods beyond the wished size whose rank is out of the group, by uid."""
    actions: list[Action] = []
    heard = (
        facts.runtime is not None and facts.runtime.wish_put == following.generation
    )  # one snapshot: no older phases
    told = heard and following.num_ranks <= plan.num_ranks
    states = states_of(facts.runtime)
    for rank, seat in sorted(ranks.items()):
        if rank < plan.num_ranks:
            continue
        actions += [DeletePod(pod.name, pod.uid) for pod, _ in seat.dead]
        pod = seat.live
        if pod is None:
            continue
        state = states.get(pod.uid)
        never_in = pod.gated or not (formed or may_take_part(pod, facts.runtime))
        out = state is not None and state.phase in _OUT
        settled = following.in_force(facts.runtime) and (state is None or state.phase not in _MEMBER)
        if never_in or (told and (out or settled)):
            actions.append(DeletePod(pod.name, pod.uid))
    return actions


def is_leaving_done(plan: Plan, ranks: Mapping[int, Seat]) -> bool:
    return all(rank < plan.num_ranks or seat.live is None for rank, seat in ranks.items())
