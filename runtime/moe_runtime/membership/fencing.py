"""Asks the guards of excluded ranks to end them, beside the step thread: the new epoch does not wait for it.

It need not: a rank of an old epoch finds no partner there and no vote in the new one. Fencing frees its device and
memory, and turns "probably hung" into "proven gone", which the coordinator may vouch for.
"""

import threading
from collections.abc import Iterable

from moe_core.contract.membership import Member
from moe_runtime.membership.wire import WireError, ask

_TRIES = 3
_TRY_MS = 2000
"""A guard answers once the process is reaped; seen 10 to 40 ms for a rank of 120 MiB (2 busy cores)."""


class Fencing:
    """What no guard confirms is said in the log: somebody has to look at it."""

    def __init__(self, *, token: str) -> None:
        self._token = token
        self._closed = threading.Event()

    def ask(self, members: Iterable[Member]) -> None:
        """Start fencing these; returns at once."""
        for member in members:
            if member.guard_address:
                threading.Thread(target=self._fence, args=(member,), name=f"fence-{member.rank}", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _fence(self, member: Member) -> None:
        outcome = ""
        for _ in range(_TRIES):
            try:
                request = {"op": "fence", "to": member.pod_uid, "reason": f"rank {member.rank} is out of the epoch"}
                outcome = str(ask(member.guard_address, request, token=self._token, timeout_ms=_TRY_MS)["state"])
            except WireError as error:
                outcome = f"unconfirmed: {error}"
            if outcome == "reaped" or self._closed.wait(0.2):
                return
        print(f"rank {member.rank} (pod {member.pod_uid}) may still run: {outcome}", flush=True)
