"""observe -> decide -> apply -> report: the same cycle on Kubernetes and on one machine.

One status write and one batch of actions per cycle. The brain runs in a worker thread, so a heavy plan never blocks the
event loop that answers liveness and renews the lease.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from moe_core.decide import decide

from moe_core.facts import (
    Action,
    ApplyObject,
    BindPod,
    CreatePod,
    Decision,
    DeleteObject,
    DeleteOwner,
    DeletePod,
    EnsureToken,
    InjectFault,
    PutWish,
    Wish,
)
from moe_operator.cluster.protocol import Cluster, Conflict, Foreign, Key, Unavailable
from moe_operator.keys import DirtyKeys
from moe_operator.metrics import Metrics
from moe_operator.report import merge_conditions

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.2, 30.0


class Reconciler:
    """Drives every marked key to its wish.

    `may_apply` says whether this process holds the lease; without it nothing is changed and the key is looked at later.
    `clock` gives seconds since the Unix epoch.
    """

    def __init__(
        self, cluster: Cluster, *, metrics: Metrics, clock: Callable[[], float], may_apply: Callable[[], bool]
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._clock = clock
        self._may_apply = may_apply
        self._failures: dict[Key, int] = {}
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

    async def _mark_dirty(self, keys: DirtyKeys) -> None:
        async for key in self._cluster.dirty():
            keys.mark(key)

    async def reconcile(self, key: Key) -> float | None:
        """One cycle. Returns seconds until the next look, None when only a change can bring news."""
        if not self._may_apply():
            return 1.0
        with self._metrics.cycle(key.kind):
            try:
                wake_in = await self._cycle(key)
            except Conflict as conflict:
                logger.info("%s: %s; observing again", key, conflict)
                return self._retry(key)
            except Unavailable as away:
                logger.warning("%s: %s", key, away)
                return away.retry_after or self._retry(key)
            except Foreign as foreign:
                logger.warning("%s: %s", key, foreign)
                return self._retry(key)
            except Exception:  # one broken object must not stop the others; counted, logged, retried with back-off
                logger.exception("%s: reconcile failed", key)
                self._metrics.count_error(key.kind)
                return self._retry(key)
        self._failures.pop(key, None)
        return wake_in

    async def _cycle(self, key: Key) -> float | None:
        observed = await self._cluster.observe(key)
        if observed is None:
            self._failures.pop(key, None)
            if self._keys is not None:
                self._keys.forget(key)
            return None
        wish, facts = observed
        now = self._clock()
        decision = await asyncio.to_thread(decide, wish, facts, now)
        if not self._may_apply():
            return 1.0
        for action in decision.actions:
            logger.info("%s: %s", key, describe(action))
            await self._apply(wish, action)
        await self._report(wish, decision, now)
        return decision.wake_in

    async def _report(self, wish: Wish, decision: Decision, now: float) -> None:
        if any(isinstance(action, DeleteOwner) for action in decision.actions):
            return
        old = wish.status.get("conditions", ())
        conditions = merge_conditions(old, decision.conditions, generation=wish.generation, now=now)
        before = {name: value for name, value in wish.status.items() if name != "conditions"}
        if conditions != list(old) or before != dict(decision.status):
            await self._cluster.write_status(wish, conditions=conditions, status=decision.status)
        for event in decision.events:
            await self._cluster.emit(wish, event)

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
            case DeleteOwner():
                await self._cluster.delete_owner(wish)
            case PutWish():
                await self._cluster.runtime(wish).put_wish(action.wish)
            case InjectFault():
                await self._cluster.runtime(wish).inject(action.request)
            case _:
                assert_never(action)

    def _retry(self, key: Key) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        return min(FIRST_RETRY_S * 2 ** min(failures - 1, 10), LAST_RETRY_S)


def describe(action: Action) -> str:
    """One line for a log: the verb and what it touches, never a manifest or a token."""
    name = getattr(action, "name", "")
    uid = getattr(action, "uid", "")
    return " ".join(part for part in (type(action).__name__, name, uid) if part)
