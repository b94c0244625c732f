"""Which rank gets the next request: a gateway's own view of the members, kept from several sources. No Ray here.

The coordinator tells who is a member, and so does every rank that answers; with the coordinator gone the ranks' word is
enough. A rank that failed a call is suspected for a while instead of being forgotten: it may only have been slow.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_SUSPECT_S = 3.0
"""A suspect gets no request for this long; long enough for the ranks to agree on the next epoch."""

_DESERTED_S = 10.0
"""No rank has confirmed the known epoch for this long: longer than any recovery (seconds) and than asking each in turn
(one a second, and a coordinator that answers tells twice a second)."""


@dataclass(slots=True)
class KnownRank:
    rank: int
    pod_uid: str
    is_active: bool = False
    in_flight: int = 0
    suspected_until: float = 0.0
    is_gone: bool = False


class RankDirectory:
    """All ranks this gateway knows, and the newest epoch anybody told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, KnownRank] = {}
        self._change = asyncio.Event()
        self._confirmed_at = clock()
        self.epoch = 0
        self.covered = 0
        self.total = 0

    def tell(self, epoch: int, members: Iterable[tuple[int, str]]) -> bool:
        """Somebody says: in this epoch these (rank, pod uid) are members. False for older news than known.

        Unless the known epoch is deserted: a group whose ranks and coordinator all went may count from one again.
        """
        now = self._clock()
        if epoch < self.epoch and now - self._confirmed_at <= _DESERTED_S:
            return False
        self.epoch, self._confirmed_at = epoch, now
        present = {uid: rank for rank, uid in members}
        for uid, rank in present.items():
            self._known.setdefault(uid, KnownRank(rank, uid)).is_active = True
        for uid, known in list(self._known.items()):
            if uid not in present:
                known.is_active = False
                if known.in_flight == 0:
                    del self._known[uid]
        self._wake()
        return True

    def suspect(self, pod_uid: str, *, is_gone: bool = False) -> None:
        known = self._known.get(pod_uid)
        if known is not None:
            known.suspected_until = self._clock() + _SUSPECT_S
            known.is_gone = known.is_gone or is_gone

    def clear(self, pod_uid: str) -> None:
        """The rank wrote tokens, or says that it is a member of the known epoch."""
        known = self._known.get(pod_uid)
        if known is not None:
            known.suspected_until = 0.0
            self._confirmed_at = self._clock()

    def usable(self) -> list[KnownRank]:
        now = self._clock()
        return [k for k in self._known.values() if k.is_active and not k.is_gone and k.suspected_until <= now]

    def active_uids(self) -> list[str]:
        return [k.pod_uid for k in self._known.values() if k.is_active and not k.is_gone]

    def known_uids(self) -> list[str]:
        return list(self._known)

    def pick(self, avoid: frozenset[str] = frozenset()) -> KnownRank | None:
        """The usable rank with the fewest requests in flight; one in `avoid` only when there is no other."""
        usable = self.usable()
        preferred = [k for k in usable if k.pod_uid not in avoid] or usable
        return min(preferred, key=lambda k: (k.in_flight, k.rank), default=None)

    async def wait_for_rank(self, deadline: float, avoid: frozenset[str] = frozenset()) -> KnownRank | None:
        """Waits for a usable rank; None after `deadline` (of the directory's clock)."""
        while (picked := self.pick(avoid)) is None:
            left = deadline - self._clock()
            if left <= 0:
                return None
            change = self._change
            with contextlib.suppress(TimeoutError):
                # Suspicion ends by time alone, so look again soon even without news.
                await asyncio.wait_for(change.wait(), min(left, 0.2))
        return picked

    def _wake(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()
