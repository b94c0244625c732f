"""What one rank knows and has promised: the newest decided epoch, its votes on the next, and who is vouched dead.

Thread-safe and without I/O: the peer face's threads and the step thread meet here. Two epochs are told apart. `known`
is the newest decision heard of; `current` is the one the step thread has taken up, and it changes only in that
thread's calls, never under a running step. Everything lives in memory: a process that dies comes back as another pod
and is no member until it joins.
"""

import threading
from collections.abc import Iterable
from typing import Literal

from moe_core.contract.membership import Member, Membership
from moe_runtime.errors import Fenced
from moe_runtime.membership.agreement import Acceptor, Ballot, Promise, Refusal

Waiting = Literal["", "recover", "change", "form"]
"""What the step thread waits for; empty while it steps."""


class Ledger:
    def __init__(self, me: Member) -> None:
        self.me = me
        self._lock = threading.Condition()
        self._current: Membership | None = None
        self._known: Membership | None = None
        self._acceptors: dict[int, Acceptor[Membership]] = {}
        self._waiting: Waiting = ""
        self._forming: Membership | None = None
        self._out_of = 0
        self._vouched: frozenset[str] = frozenset()
        self._news = 0

    @property
    def current(self) -> Membership | None:
        """The epoch that this rank steps in; None before it joined and after it left."""
        with self._lock:
            return self._current

    @property
    def known(self) -> Membership | None:
        with self._lock:
            return self._known

    @property
    def known_epoch(self) -> int:
        with self._lock:
            return self._known.epoch if self._known is not None else 0

    @property
    def waiting(self) -> Waiting:
        with self._lock:
            return self._waiting

    def is_member(self, membership: Membership) -> bool:
        return self.me.pod_uid in membership.pod_uids

    def check(self) -> None:
        """Raises Fenced once a decided epoch excludes this rank."""
        with self._lock:
            if self._current is not None and self._known is not None and not self.is_member(self._known):
                raise Fenced(
                    f"rank {self.me.rank} of epoch {self._current.epoch} is not in epoch {self._known.epoch}: "
                    f"members are {list(self._known.ranks)}"
                )

    def learn(self, decided: Membership) -> None:
        """Take note of a decided epoch; older ones are ignored."""
        with self._lock:
            if self._known is None or decided.epoch > self._known.epoch:
                self._known = decided
                self._announce()

    def take_up(self) -> Membership | None:
        """Make the newest known epoch the current one, if it is newer and this rank is in it."""
        with self._lock:
            known = self._known
            if known is None or not self.is_member(known):
                return None
            if known.epoch <= (self._out_of if self._current is None else self._current.epoch):
                return None
            self._current = known
            for epoch in [e for e in self._acceptors if e <= known.epoch]:
                del self._acceptors[epoch]
            self._waiting = ""
            self._forming = None
            return known

    def step_out(self) -> None:
        """Be no member any more, after an orderly leave or before asking to rejoin. What is known stays known."""
        with self._lock:
            self._out_of = self._known.epoch if self._known is not None else 0
            self._current = None
            self._waiting = ""

    def is_out_of(self, epoch: int) -> bool:
        """Whether this rank has given up its place in that epoch: peers need neither wait for it nor fence it."""
        with self._lock:
            return self._current is None and epoch <= self._out_of

    def wait_for(self, waiting: Waiting, forming: Membership | None = None) -> None:
        """Say what the step thread waits for, so that peers can tell it from one that hangs in a step."""
        with self._lock:
            self._waiting = waiting
            self._forming = forming

    @property
    def news(self) -> int:
        """Counts decisions learned and vouchings; give it to `sleep` to miss none."""
        with self._lock:
            return self._news

    def sleep(self, seconds: float, *, since: int) -> None:
        """Wait for news later than `since`, at most so long."""
        with self._lock:
            self._lock.wait_for(lambda: self._news != since, max(0.0, seconds))

    def vouch(self, dead_pod_uids: Iterable[str]) -> None:
        with self._lock:
            vouched = self._vouched | frozenset(dead_pod_uids)
            if vouched != self._vouched:
                self._vouched = vouched
                self._announce()

    def is_quorum(self, base: Membership, ranks: frozenset[int]) -> bool:
        """A quorum of `base`, or everybody of it who is not vouched dead.

        The second kind meets every quorum with a living member in it, since it needs all of the living.
        """
        with self._lock:
            vouched = self._vouched
        present = ranks & frozenset(base.ranks)
        return base.is_quorum(present) or (
            bool(present) and all(m.rank in present or m.pod_uid in vouched for m in base.members)
        )

    def prepare(self, base: Membership, ballot: Ballot) -> Promise[Membership] | Refusal | None:
        """Vote on the epoch after `base`; None when it is decided already, or this rank has no vote in it."""
        with self._lock:
            acceptor = self._acceptor(base)
            return None if acceptor is None else acceptor.prepare(ballot)

    def accept(self, base: Membership, ballot: Ballot, value: Membership) -> Ballot | Refusal | None:
        """As `prepare`; the ballot itself means accepted."""
        with self._lock:
            acceptor = self._acceptor(base)
            if acceptor is None:
                return None
            refusal = acceptor.accept(ballot, value)
            return ballot if refusal is None else refusal

    def acknowledge_first(self, first: Membership) -> bool:
        """Whether this rank, a member nowhere, waits for exactly this epoch, and for one it has not heard of."""
        with self._lock:
            known_epoch = self._known.epoch if self._known is not None else 0
            return self._forming == first and self._current is None and known_epoch < first.epoch

    def _acceptor(self, base: Membership) -> Acceptor[Membership] | None:
        self.learn(base)
        if self._known is None or self._known.epoch != base.epoch or not self.is_member(base):
            return None
        return self._acceptors.setdefault(base.epoch + 1, Acceptor())

    def _announce(self) -> None:
        self._news += 1
        self._lock.notify_all()
