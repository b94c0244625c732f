"""One sequence from prompt to end over as many ranks as it takes: the replay. No Ray, no HTTP.

When a rank dies, hangs or leaves, the sequence goes on elsewhere with prompt plus tokens already sent. Sampling depends
on (seed, position) only, so the continuation is the one the first rank would have written.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.gateway.ranks import KnownRank, RankDirectory
from moe_runtime.rank.desk import Poll

POLL_S = 1.0
ANSWER_S = 3.0
"""A rank that does not answer a poll within POLL_S + ANSWER_S is taken for hung. Its event loop answers also while the
step loop waits for a recovery; a wrong guess costs a replay, not a token."""
NO_PROGRESS_S = 60.0
"""How long a sequence waits for a next token, over all ranks, before its request fails. The only bound: how many ranks
are full, or say that they take nothing now, ends no sequence."""
BACKOFF_S = 0.1
_MAX_BACKOFF_S = 1.0


class RankUnreachable(Exception):
    """A call to a rank failed or took too long. `is_gone`: the rank is known to be dead, not only slow."""

    def __init__(self, message: str, *, is_gone: bool = False) -> None:
        super().__init__(message)
        self.is_gone = is_gone


class RankForgot(Exception):
    """The rank does not hold the request any more."""


class RankClient(Protocol):
    """Calls to ranks. Both raise RankUnreachable; `poll` RankForgot."""

    async def submit(self, pod_uid: str, request: GenerationRequest, *, wait_s: float, timeout_s: float) -> Poll:
        """Hand in a request (idempotent by id) and poll it at once."""

    async def poll(self, pod_uid: str, request_id: str, *, have: int, wait_s: float, timeout_s: float) -> Poll:
        """Tokens from index `have` on; returns empty after `wait_s`."""

    def cancel(self, pod_uid: str, request_id: str) -> None:
        """Tell the rank to forget the request; no answer is awaited."""


class NoRankLeft(Exception):
    """No rank could go on within the time a request may wait."""


class RequestRefused(Exception):
    """The request itself cannot be served: `too_long` or `refused` (an expert is lost and fallback is Refuse, the
    model's logits are no numbers, or its router cannot route).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class AllBusy(Exception):
    """Every rank's queue is full."""


@dataclass(slots=True)
class Trace:
    """What happened to one sequence besides its tokens."""

    replays: list[str] = field(default_factory=list)
    """Cause of each replay: died, hung, moved, forgot."""
    finish_reason: str | None = None
    degraded_by_attempt: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def degraded(self) -> dict[str, int]:
        """Tokens of the answer that were computed degraded, by reason."""
        total: dict[str, int] = {}
        for counts in self.degraded_by_attempt.values():
            for reason, count in counts.items():
                total[reason] = total.get(reason, 0) + count
        return total


@dataclass(frozen=True, slots=True)
class Sampling:
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(slots=True)
class _Visit:
    """One attempt on one rank; `end` says how it ended: as the rank said, or died, hung, forgot."""

    known: KnownRank
    request: GenerationRequest
    degraded: dict[str, int] = field(default_factory=dict)
    end: str = ""
    message: str = ""
    was_taken: bool = False
    """The rank held the request for a while; one outside of every epoch says `moved` at once."""

    async def tokens(self, client: RankClient) -> AsyncGenerator[tuple[int, ...], None]:
        """Yields tokens as they come, until the end."""
        self.known.in_flight += 1
        try:
            async for poll in self._polls(client):
                self.degraded = poll.degraded
                self.was_taken |= poll.end is None or bool(poll.tokens)
                if poll.tokens:
                    yield poll.tokens
                self.end, self.message = poll.end or "", poll.message
        except RankForgot:
            self.end = "forgot"
        except RankUnreachable as error:
            self.end, self.message = "died" if error.is_gone else "hung", str(error)
        finally:
            self.known.in_flight -= 1
            if self.end in ("", "hung"):
                client.cancel(self.known.pod_uid, self.request.request_id)

    async def _polls(self, client: RankClient) -> AsyncGenerator[Poll, None]:
        uid, timeout_s = self.known.pod_uid, POLL_S + ANSWER_S
        poll = await client.submit(uid, self.request, wait_s=POLL_S, timeout_s=timeout_s)
        have, progress_at = 0, time.monotonic()
        while True:
            if poll.tokens:
                have, progress_at = have + len(poll.tokens), time.monotonic()
            yield poll
            if poll.end is not None:
                return
            if time.monotonic() - progress_at > NO_PROGRESS_S:
                raise RankUnreachable(f"rank {self.known.rank} made no progress for {NO_PROGRESS_S:.0f} s")
            poll = await client.poll(uid, self.request.request_id, have=have, wait_s=POLL_S, timeout_s=timeout_s)


async def generate(
    directory: RankDirectory,
    client: RankClient,
    *,
    sequence_id: str,
    prompt: tuple[int, ...],
    sampling: Sampling,
    trace: Trace,
) -> AsyncGenerator[tuple[int, ...], None]:
    """Yields tokens as they come. Raises NoRankLeft, AllBusy (while no rank has taken it), RequestRefused."""
    sent: list[int] = []
    avoid: frozenset[str] = frozenset()
    busy: frozenset[str] = frozenset()
    was_taken = False
    in_vain = 0  # rounds since the last token
    progress_at = time.monotonic()
    for attempt in itertools.count():
        known = await directory.wait_for_rank(progress_at + NO_PROGRESS_S, avoid | busy)
        if known is None or time.monotonic() - progress_at > NO_PROGRESS_S:
            break
        visit = _Visit(known, _request(f"{sequence_id}.{attempt}", prompt, sent, sampling))
        async with contextlib.aclosing(visit.tokens(client)) as parts:
            async for part in parts:
                sent += part
                progress_at, in_vain = time.monotonic(), 0
                directory.clear(known.pod_uid)
                trace.degraded_by_attempt[attempt] = visit.degraded
                yield part
        if visit.end in ("stop", "length"):
            trace.finish_reason = visit.end
            return
        if visit.end in ("too_long", "refused"):
            raise RequestRefused(visit.end, visit.message)
        if visit.end == "overloaded":
            busy |= {known.pod_uid}
            if not busy.issuperset(k.pod_uid for k in directory.usable()):
                continue
            if not was_taken:
                raise AllBusy(visit.message)
            busy = frozenset()
        elif len(sent) >= sampling.max_tokens:  # all was sent, only the last word was lost
            trace.finish_reason = "length"
            return
        else:
            if visit.end != "moved" or visit.was_taken:
                was_taken = True
                trace.replays.append(visit.end)
            directory.suspect(known.pod_uid, is_gone=visit.end == "died")
            avoid = frozenset({known.pod_uid})
        await asyncio.sleep(min(BACKOFF_S * in_vain, _MAX_BACKOFF_S))
        in_vain += 1
    waited = time.monotonic() - progress_at
    raise NoRankLeft(f"no rank could go on: {len(trace.replays)} replays, no token for {waited:.0f} s")


def _request(request_id: str, prompt: tuple[int, ...], sent: list[int], sampling: Sampling) -> GenerationRequest:
    """What is left of the sequence; positions count on, so that sampling does."""
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt + tuple(sent),
        max_tokens=sampling.max_tokens - len(sent),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
    )
