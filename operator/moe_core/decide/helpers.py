"""Coordinator and gateways: kept alive one by one, without a budget, because their state is soft."""

from collections.abc import Mapping

from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY
from moe_core.decide.crew import Seat
from moe_core.decide.gang import backoff_s
from moe_core.facts import Action, DeletePod
from moe_core.manifests.plan import Plan
from moe_core.manifests.pods import create_pod


def tend(
    plan: Plan, role: str, count: int, seats: Mapping[int, Seat], now: float, *, reattach: bool = False
) -> tuple[list[Action], list[float]]:
    """Actions, and seconds after which to look again. `reattach`: others of the group run already."""
    assert role in (ROLE_COORDINATOR, ROLE_GATEWAY), role
    actions: list[Action] = []
    waking: list[float] = []
    for index in range(count):
        seat = seats.get(index, Seat(role, index, None))
        if seat.live is None:
            newest = seat.newest
            wait = 0.0 if newest is None else newest.created_at + backoff_s(newest.incarnation) - now
            if wait > 0:
                waking.append(wait)
                continue
            actions.append(create_pod(plan, role, index=index, incarnation=seat.highest + 1, reattach=reattach))
        elif seat.suspect_until is not None:
            waking.append(seat.suspect_until - now)
        actions += [DeletePod(pod.name, pod.uid) for pod, _ in seat.dead]
    for index, seat in sorted(seats.items()):
        if index >= count:
            gone = [*([seat.live] if seat.live else []), *(pod for pod, _ in seat.dead)]
            actions += [DeletePod(pod.name, pod.uid) for pod in gone]
    return actions, waking
