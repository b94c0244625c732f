"""One acting operator at a time, by a Lease (not kopf's peering, and not the client's elector, which can leave two).

Time runs on one process' own clock only. The holder may apply until `renew_deadline_s` after it *sent* its last
successful renewal. Another process takes over once it has seen the Lease unchanged for `duration_s`, counted from when
it first saw that version, which is later than the renewal was sent. A change that the holder sends in its last moment
is given up after a request time-out at the latest, so with

    renew_deadline_s + request time-out <= duration_s

nothing of the old holder is under way when the new one is elected. What a server that hung may still have in its
buffers is waited for: after a take-over nothing is applied for `hold_off_s`. The clock goes on while a process is
stopped, so a leader that was frozen finds its time over at the very next look, before anything is applied.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moe_operator.cluster.protocol import ClusterError, Conflict, Unavailable

logger = logging.getLogger(__name__)

NOBODY = ""


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """`version` is the server's resourceVersion; a replacement is refused unless it is still that."""

    holder: str
    duration_s: float
    transitions: int
    version: str = ""


class LeaseStore(Protocol):
    """One Lease on the server. Verbs raise Conflict when somebody else was quicker, Unavailable when none answers."""

    async def read(self) -> LeaseRecord | None: ...

    async def create(self, record: LeaseRecord) -> LeaseRecord: ...

    async def replace(self, record: LeaseRecord) -> LeaseRecord: ...


def running_clock() -> float:
    """Seconds that also pass while this process is stopped or its machine sleeps, where the system can tell."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Elector:
    """Holds the Lease as long as it can; `remaining_s` says for how long a change may still be sent.

    `on_lost` is called once when a Lease that was held is gone; it should end the process.
    """

    def __init__(
        self,
        store: LeaseStore,
        *,
        identity: str,
        duration_s: float,
        renew_deadline_s: float,
        retry_s: float,
        hold_off_s: float,
        on_lost: Callable[[str], None],
        clock: Callable[[], float] = running_clock,
    ) -> None:
        self._store = store
        self._identity = identity
        self._duration_s = duration_s
        self._renew_deadline_s = renew_deadline_s
        self._retry_s = retry_s
        self._hold_off_s = hold_off_s
        self._on_lost = on_lost
        self._clock = clock
        self._held: LeaseRecord | None = None
        self._deadline = float("-inf")
        self._apply_from = float("inf")
        self._seen_version = ""
        self._seen_at = float("-inf")

    @property
    def holds_lease(self) -> bool:
        return self._held is not None

    def remaining_s(self) -> float:
        """0 when nothing may be changed, now or any more."""
        now = self._clock()
        return max(self._deadline - now, 0.0) if now >= self._apply_from else 0.0

    def may_apply(self) -> bool:
        return self.remaining_s() > 0

    async def run(self) -> None:
        """Compete, then hold, until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(self._retry_s)

    async def step(self) -> None:
        """One look at the Lease: take it, renew it, or wait."""
        try:
            if self._held is None:
                await self._compete()
            else:
                await self._renew(self._held)
        except Conflict as conflict:
            logger.info("lease: %s", conflict)
            await self._find_out_who_holds()
        except ClusterError as away:
            logger.warning("lease: %s", away)
        if self._held is not None and self._clock() >= self._deadline:
            self._lose("the lease could not be renewed in time")

    async def release(self) -> None:
        """Give the Lease back, so that nobody has to wait for its end. Only when nothing is applied any more."""
        held, self._held = self._held, None
        self._deadline = float("-inf")
        if held is None:
            return
        try:
            await self._store.replace(LeaseRecord(NOBODY, 1, held.transitions, held.version))
            logger.info("lease: given back")
        except ClusterError as error:
            logger.info("lease: not given back: %s", error)

    async def _compete(self) -> None:
        sent_at = self._clock()
        record = await self._store.read()
        if record is None:
            await self._take(None, sent_at, hold_off_s=0.0)
        elif record.holder == NOBODY:
            await self._take(record, sent_at, hold_off_s=0.0)
        elif record.version != self._seen_version:
            self._seen_version, self._seen_at = record.version, self._clock()
            logger.info("lease: held by %s", record.holder)
        elif self._clock() - self._seen_at >= max(record.duration_s, self._duration_s):
            logger.warning("lease: %s has not renewed it, taking over", record.holder)
            await self._take(record, self._clock(), hold_off_s=self._hold_off_s)

    async def _take(self, old: LeaseRecord | None, sent_at: float, *, hold_off_s: float) -> None:
        transitions = old.transitions + 1 if old else 0
        wanted = LeaseRecord(self._identity, self._duration_s, transitions, old.version if old else "")
        self._held = await (self._store.replace(wanted) if old else self._store.create(wanted))
        self._deadline = sent_at + self._renew_deadline_s
        self._apply_from = self._clock() + hold_off_s
        logger.info("lease: held by this process, %s, term %d", self._identity, transitions)

    async def _renew(self, held: LeaseRecord) -> None:
        sent_at = self._clock()
        if sent_at < self._deadline:
            self._held = await self._store.replace(held)
            self._deadline = sent_at + self._renew_deadline_s

    async def _find_out_who_holds(self) -> None:
        """A refused write: another process was quicker, or an answer to an earlier one of ours was lost on its way."""
        held = self._held
        if held is None:
            return
        try:
            record = await self._store.read()
        except Unavailable as away:
            logger.warning("lease: %s", away)
            return
        if record is not None and record.holder == self._identity and record.transitions == held.transitions:
            self._held = record
        else:
            self._lose(f"the lease is held by {record.holder if record else 'nobody'}")

    def _lose(self, why: str) -> None:
        self._held = None
        self._deadline = float("-inf")
        self._on_lost(why)
