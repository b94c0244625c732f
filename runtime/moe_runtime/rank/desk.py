"""Between the requests' side of a rank (asyncio, many callers) and its step loop (one thread): the only shared state.

The loop drains what was submitted at a boundary and publishes what a committed step brought; callers poll with the
number of tokens they have, so that a poll may be repeated and nothing is lost or sent twice.
"""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moe_runtime.engine.scheduler import GenerationRequest, Progress

TicketEnd = Literal["stop", "length", "moved", "overloaded", "too_long", "refused"]

LEASE_S = 20.0
"""A request that nobody has polled for this long is dropped: its gateway died or has replayed it elsewhere."""


@dataclass(slots=True)
class Ticket:
    """One request on this rank. `tokens` only grows; `end` is set once."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    end: TicketEnd | None = None
    message: str = ""
    degraded: dict[str, int] = field(default_factory=dict)
    polled_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Poll:
    """Tokens from the asked index on. `degraded`: this answer's tokens that were computed degraded, by reason."""

    tokens: tuple[int, ...]
    end: TicketEnd | None
    message: str
    degraded: dict[str, int]
    epoch: int


class UnknownRequest(KeyError):
    """The rank does not hold this request (any more): replay it."""


class Desk:
    """Thread-safe. `epoch` is kept by the loop; `is_open` False hands every request back as `moved`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._news = asyncio.Event()
        self._tickets: dict[str, Ticket] = {}
        self._submitted: list[str] = []
        self._cancelled: list[str] = []
        self.work = threading.Event()
        """Set when the loop has something to look at: it sleeps on this while idle."""
        self.epoch = 0
        self.is_open = False

    # -- callers' side (event loop) --

    def submit(self, request: GenerationRequest) -> None:
        """Idempotent by request id."""
        with self._lock:
            if request.request_id in self._tickets:
                return
            ticket = Ticket(request, polled_at=time.monotonic())
            self._tickets[request.request_id] = ticket
            if not self.is_open:
                ticket.end = "moved"
                ticket.message = "this rank takes no requests now"
                return
            self._submitted.append(request.request_id)
        self.work.set()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if self._tickets.pop(request_id, None) is not None:
                self._cancelled.append(request_id)
        self.work.set()

    async def poll(self, request_id: str, *, have: int, wait_s: float) -> Poll:
        """Waits up to `wait_s` for more than `have` tokens or the end. Raises UnknownRequest."""
        deadline = time.monotonic() + wait_s
        while True:
            with self._lock:
                news = self._news
                ticket = self._tickets.get(request_id)
                if ticket is None:
                    raise UnknownRequest(request_id)
                ticket.polled_at = time.monotonic()
                left = deadline - ticket.polled_at
                if len(ticket.tokens) > have or ticket.end is not None or left <= 0:
                    answer = Poll(
                        tuple(ticket.tokens[have:]), ticket.end, ticket.message, dict(ticket.degraded), self.epoch
                    )
                    if ticket.end is not None:
                        del self._tickets[request_id]
                    return answer
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                continue

    # -- the loop's side (its thread) --

    def take(self) -> tuple[list[GenerationRequest], list[str]]:
        """New requests in order, and ids to forget (cancelled, or their gateway is gone)."""
        now = time.monotonic()
        with self._lock:
            self.work.clear()
            for request_id, ticket in list(self._tickets.items()):
                if now - ticket.polled_at > LEASE_S:
                    del self._tickets[request_id]
                    self._cancelled.append(request_id)
            new = [self._tickets[i].request for i in self._submitted if i in self._tickets]
            self._submitted.clear()
            cancelled, self._cancelled = self._cancelled, []
        return new, cancelled

    def publish(self, progress: Sequence[Progress], degraded: Mapping[str, Sequence[str]]) -> None:
        """What a committed step brought; `degraded`: by request id, why its token was computed degraded."""
        with self._lock:
            for part in progress:
                ticket = self._tickets.get(part.request_id)
                if ticket is None:
                    continue
                if part.token_id is not None:
                    ticket.tokens.append(part.token_id)
                    for reason in degraded.get(part.request_id, ()):
                        ticket.degraded[reason] = ticket.degraded.get(reason, 0) + 1
                if part.finish_reason is not None:
                    ticket.end = part.finish_reason
        self._wake()

    def end(self, request_id: str, end: TicketEnd, message: str) -> None:
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is not None and ticket.end is None:
                ticket.end, ticket.message = end, message
        self._wake()

    def open(self) -> None:
        with self._lock:
            self.is_open = True

    def hand_back(self, message: str) -> list[str]:
        """Close and end every request as `moved`, so that gateways replay them elsewhere; returns their ids."""
        with self._lock:
            self.is_open = False
            self._submitted.clear()
            moved = [i for i, ticket in self._tickets.items() if ticket.end is None]
            for request_id in moved:
                self._tickets[request_id].end = "moved"
                self._tickets[request_id].message = message
        self._wake()
        return moved

    def _wake(self) -> None:
        def swap() -> None:
            news, self._news = self._news, asyncio.Event()
            news.set()

        self._loop.call_soon_threadsafe(swap)
