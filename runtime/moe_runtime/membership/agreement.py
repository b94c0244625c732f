"""Single-decree Paxos: how the members of one epoch come to one next epoch, whatever is lost, late or dead.

Pure: no clock, no wire, no threads. One `Acceptor` per member and epoch remembers what it promised; one `Proposal` per
attempt collects answers and says what to do next. Safety needs no leader and no time-out: two quorums always share a
member, and that member's promise carries an earlier value into every later attempt. (Lamport, "Paxos Made Simple",
2001.)

The value is whatever the caller agrees on; here a whole Membership.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, order=True)
class Ballot:
    """Attempts are ordered, and no two ranks share one.

    >>> Ballot(1, 3) < Ballot(2, 0)
    True
    """

    attempt: int
    rank: int


@dataclass(frozen=True, slots=True)
class Promise(Generic[Value]):
    """Yes to a ballot, with the newest value accepted before it, if any."""

    ballot: Ballot
    accepted: tuple[Ballot, Value] | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """No: this newer ballot has been promised already."""

    promised: Ballot


class Acceptor(Generic[Value]):
    """One member's memory of one decision. It must outlive every proposal of that decision and is never reset."""

    def __init__(self) -> None:
        self.promised: Ballot | None = None
        self.accepted: tuple[Ballot, Value] | None = None

    def prepare(self, ballot: Ballot) -> Promise[Value] | Refusal:
        """Promise to take nothing older than `ballot`."""
        if self.promised is not None and ballot < self.promised:
            return Refusal(self.promised)
        self.promised = ballot
        return Promise(ballot, self.accepted)

    def accept(self, ballot: Ballot, value: Value) -> Refusal | None:
        """Take the value unless something newer was promised; None means accepted."""
        if self.promised is not None and ballot < self.promised:
            return Refusal(self.promised)
        self.promised = ballot
        self.accepted = (ballot, value)
        return None


@dataclass(slots=True)
class Proposal(Generic[Value]):
    """One attempt of one rank: feed it answers, in any order and any number of times, and ask where it stands.

    `wanted` is proposed only if no promise tells of an earlier value: that one may be decided already and must be kept.
    """

    ballot: Ballot
    wanted: Value
    is_quorum: Callable[[frozenset[int]], bool]
    _promises: dict[int, Promise[Value]] = field(default_factory=dict)
    _accepted_by: set[int] = field(default_factory=set)
    _value: tuple[Value] | None = None
    """What was sent out for acceptance; fixed at the first look, since one ballot may carry only one value."""

    def on_promise(self, rank: int, promise: Promise[Value]) -> None:
        if promise.ballot == self.ballot:
            self._promises[rank] = promise

    def on_accepted(self, rank: int, ballot: Ballot) -> None:
        if ballot == self.ballot:
            self._accepted_by.add(rank)

    @property
    def is_promised(self) -> bool:
        return self._value is not None or self.is_quorum(frozenset(self._promises))

    @property
    def value(self) -> Value:
        """The value to send for acceptance. Only once a quorum has promised."""
        if self._value is None:
            if not self.is_promised:
                raise RuntimeError(f"no quorum has promised {self.ballot}: only ranks {sorted(self._promises)}")
            earlier = [p.accepted for p in self._promises.values() if p.accepted is not None]
            self._value = (max(earlier, key=lambda pair: pair[0])[1] if earlier else self.wanted,)
        return self._value[0]

    @property
    def is_decided(self) -> bool:
        return self.is_quorum(frozenset(self._accepted_by))
