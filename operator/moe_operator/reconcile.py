"""observe -> decide -> apply -> report: the same cycle on Kubernetes and on one machine.

One status write and one batch of actions per cycle. The brain runs in a worker thread, so a heavy plan never blocks the
event loop that answers liveness and renews the lease.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from moe_core.decide import decide
from moe_core.facts import (
    FOREIGN,
    Action,
    ApplyObject,
    BindPod,
    CreatePod,
    Decision,
    DeleteObject,
    DeleteOwner,
    DeletePod,
    EnsureToken,
    Event,
    Facts,
    InjectFault,
    PutWish,
    RefusedAction,
    ReportMap,
    Wish,
)
from moe_operator.cluster.protocol import Cluster, Conflict, Foreign, Key, Refused, Unavailable
from moe_operator.keys import DirtyKeys
from moe_operator.metrics import Metrics
from moe_operator.report import is_only_counting, merge_conditions

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.2
# A conflict is settled by looking again, an absent server comes back soon; anything else needs somebody to act.
LAST_RETRY_S, LAST_RETRY_OF_UNAVAILABLE_S, LAST_RETRY_OF_CONFLICT_S = 30.0, 5.0, 1.0
LOOK_AGAIN_S = 1.0

ON_PODS = frozenset({CreatePod, BindPod, DeletePod})

Brain = Callable[[Wish, Facts, float], Decision]
Refusal = tuple[Action, Refused | Foreign]


class NotAllowed(Exception):
    """This process may not apply now: the lease is not held."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look at a key, and what was decided on it."""

    wish: Wish
    facts: Facts
    now: float
    decision: Decision


class Reconciler:
    """Drives every marked key to its wish.

    `may_apply` says whether this process holds the lease. It is asked before every single action: without it nothing is
    changed and the key is looked at later. `clock` gives seconds since the Unix epoch. `at_once` actions on pods run
    side by side, and `cycles_at_once` keys: after a take-over all of them want their turn, and the server must bear it.
    A status in which only counters have moved is written every `calm_s` seconds at most.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        may_apply: Callable[[], bool],
        at_once: int = 1,
        cycles_at_once: int = 16,
        calm_s: float = 1.0,
        brain: Brain = decide,
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._clock = clock
        self._may_apply = may_apply
        self._at_once = at_once
        self._turn = asyncio.Semaphore(cycles_at_once)
        self._calm_s = calm_s
        self._brain = brain
        self._failures: dict[Key, int] = {}
        self._not_before: dict[Key, float] = {}
        self._written_at: dict[Key, float] = {}
        self._placing = asyncio.Lock()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._keys: DirtyKeys | None = None

    async def run(self) -> None:
        """Follow the cluster until cancelled; ends with the error of a cycle that should not have failed."""
        self._keys = DirtyKeys(self.reconcile)
        watch = asyncio.create_task(self._mark_dirty(self._keys), name="dirty keys")
        try:
            await asyncio.wait({watch, self._keys.failure}, return_when=asyncio.FIRST_COMPLETED)
            if self._keys.failure.done():
                self._keys.failure.result()
            watch.result()
        finally:
            watch.cancel()
            await self._keys.close()

    async def at_rest(self, *, within_s: float) -> None:
        """Wait until no cycle runs. Once it may not apply any more, each ends after the request that is under way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()

    async def _mark_dirty(self, keys: DirtyKeys) -> None:
        async for key in self._cluster.dirty():
            keys.mark(key)

    async def reconcile(self, key: Key) -> float | None:
        """One cycle. Returns seconds until the next look, None when only a change can bring news."""
        wait_s = self._not_before.get(key, 0.0) - asyncio.get_running_loop().time()
        if wait_s > 0 or not self._may_apply():
            return max(wait_s, LOOK_AGAIN_S)
        async with self._turn:
            self._num_running += 1
            self._idle.clear()
            try:
                return await self._guarded_cycle(key)
            finally:
                self._num_running -= 1
                if not self._num_running:
                    self._idle.set()

    async def _guarded_cycle(self, key: Key) -> float | None:
        with self._metrics.cycle(key.kind):
            try:
                wake_in = await self._cycle(key)
            except NotAllowed:
                return LOOK_AGAIN_S
            except Exception as error:  # noqa: BLE001 - one broken object must not stop the others; retried with back-off
                return self._failed(key, error)
        self._forgive(key)
        return wake_in

    def _failed(self, key: Key, error: Exception) -> float:
        """Say what went wrong and return the seconds until the next try; marks in between do not shorten them."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay: float = min(FIRST_RETRY_S * 2 ** min(failures - 1, 10), LAST_RETRY_S)
        if isinstance(error, Conflict):
            logger.info("%s: %s; observing again", key, error)
            delay = min(delay, LAST_RETRY_OF_CONFLICT_S)
        elif isinstance(error, Unavailable):
            logger.warning("%s: %s", key, error)
            delay = max(min(delay, LAST_RETRY_OF_UNAVAILABLE_S), error.retry_after or 0.0)
        elif isinstance(error, Foreign | Refused):
            logger.warning("%s: %s", key, error)
        else:
            logger.error("%s: reconcile failed", key, exc_info=error)
            self._metrics.count_error(key.kind)
        self._not_before[key] = asyncio.get_running_loop().time() + delay
        return delay

    def _forgive(self, key: Key) -> None:
        self._failures.pop(key, None)
        self._not_before.pop(key, None)

    async def _cycle(self, key: Key) -> float | None:
        seen = await self._decide(key)
        if seen is None:
            self._forgive(key)
            self._written_at.pop(key, None)
            if self._keys is not None:
                self._keys.forget(key)
            return None
        if not any(isinstance(action, BindPod) for action in seen.decision.actions):
            return await self._carry_out(key, seen)
        # Two gangs that are placed at once would each count on the same free room and both end half placed: one at a
        # time, and on facts that show what the one before has taken.
        async with self._placing:
            seen = await self._decide(key)
            return await self._carry_out(key, seen) if seen is not None else None

    async def _decide(self, key: Key) -> _Seen | None:
        observed = await self._cluster.observe(key)
        if observed is None:
            return None
        wish, facts = observed
        now = self._clock()
        return _Seen(wish, facts, now, await asyncio.to_thread(self._brain, wish, facts, now))

    async def _carry_out(self, key: Key, seen: _Seen) -> float | None:
        """What is refused becomes a fact of its own, and what is reported is decided with it."""
        refusals: list[Refusal] = []
        for kind, group in itertools.groupby(seen.decision.actions, type):
            if kind in ON_PODS and any(_stops_pods(*refusal) for refusal in refusals):
                continue
            actions, at_once = list(group), self._at_once if kind in ON_PODS else 1
            refusals += await self._carry_out_batch(key, seen.wish, actions, at_once=at_once)
        self._check_lease()
        if not refusals:
            if DeleteOwner in map(type, seen.decision.actions):
                return seen.decision.wake_in
            return await self._report(key, seen.wish, seen.decision, seen.now)
        facts = replace(seen.facts, refused=tuple(_fact(action, error) for action, error in refusals))
        decision = await asyncio.to_thread(self._brain, seen.wish, facts, seen.now)
        await self._report(key, seen.wish, decision, seen.now)
        raise refusals[0][1]

    async def _carry_out_batch(self, key: Key, wish: Wish, actions: Sequence[Action], *, at_once: int) -> list[Refusal]:
        """Actions of one kind, some of them side by side, up to the first that are refused.

        All that were begun are finished before a failure counts.
        """
        refusals: list[Refusal] = []
        for start in range(0, len(actions), at_once):
            begun = actions[start : start + at_once]
            tried = [self._carry_out_one(key, wish, action) for action in begun]
            outcomes = await asyncio.gather(*tried, return_exceptions=True)
            for action, outcome in zip(begun, outcomes, strict=True):
                if isinstance(outcome, Refused | Foreign):
                    refusals.append((action, outcome))
                elif isinstance(outcome, BaseException):
                    raise outcome
            if refusals:
                break
        return refusals

    async def _carry_out_one(self, key: Key, wish: Wish, action: Action) -> None:
        self._check_lease()
        logger.info("%s: %s", key, describe(action))
        await self._apply(wish, action)
        self._failures.pop(key, None)  # it got further: not the same failure again

    def _check_lease(self) -> None:
        if not self._may_apply():
            raise NotAllowed

    async def _report(self, key: Key, wish: Wish, decision: Decision, now: float) -> float | None:
        """Events and the status. Returns the seconds until the next look."""
        old = wish.status.get("conditions", ())
        conditions = merge_conditions(old, decision.conditions, generation=wish.generation, now=now)
        before = {name: value for name, value in wish.status.items() if name != "conditions"}
        for event in decision.events:  # first: once the status says it, no later cycle would tell it again
            await self._emit(wish, event)
        if conditions == list(old) and before == dict(decision.status):
            return decision.wake_in
        loop_time = asyncio.get_running_loop().time()
        wait_s = self._written_at.get(key, -self._calm_s) + self._calm_s - loop_time
        if wait_s > 0 and is_only_counting(old, conditions, before, decision.status):
            return wait_s if decision.wake_in is None else min(wait_s, decision.wake_in)
        await self._cluster.write_status(wish, conditions=conditions, status=decision.status)
        self._written_at[key] = loop_time
        return decision.wake_in

    async def _emit(self, wish: Wish, event: Event) -> None:
        try:
            await self._cluster.emit(wish, event)
        except Refused as refusal:  # a status matters more, and may still be written
            logger.warning("%s %s/%s: %s", wish.kind, wish.namespace, wish.name, refusal)

    async def _apply(self, wish: Wish, action: Action) -> None:
        match action:
            case ApplyObject():
                await self._cluster.apply_object(wish, action)
            case EnsureToken():
                await self._cluster.ensure_token(wish, action)
            case CreatePod():
                await self._cluster.create_pod(wish, action)
            case BindPod():
                await self._cluster.bind_pod(wish, action)
            case DeletePod():
                await self._cluster.delete_pod(wish, action)
            case DeleteObject():
                await self._cluster.delete_object(wish, action)
            case ReportMap():
                await self._cluster.report_map(wish, action)
            case DeleteOwner():
                await self._cluster.delete_owner(wish)
            case PutWish():
                await self._cluster.runtime(wish).put_wish(action.wish)
            case InjectFault():
                await self._cluster.runtime(wish).inject(action.request)
            case _:
                assert_never(action)


def _stops_pods(action: Action, error: Refused | Foreign) -> bool:
    """A successor is created only after its predecessor was asked to go, and no pod mounts what is somebody else's."""
    return type(action) in ON_PODS or isinstance(error, Foreign)


def _fact(action: Action, error: Refused | Foreign) -> RefusedAction:
    if isinstance(error, Refused):
        return RefusedAction(action, error.code, error.said)
    return RefusedAction(action, FOREIGN, str(error))


def describe(action: Action) -> str:
    """One line for a log: the verb and what it touches, never a manifest or a token."""
    name = getattr(action, "name", "")
    uid = getattr(action, "uid", "")
    return " ".join(part for part in (type(action).__name__, name, uid) if part)
