"""One sequence from prompt to end over as many ranks as it takes: the replay. No Ray, no HTTP.

When a rank dies, hangs or leaves, the sequence goes on elsewhere with prompt plus tokens already sent. Sampling depends on
(seed, position) only, so the continuation is the one the first rank would have written.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.gateway_ranks import KnownRank, RankDirectory
from moe_runtime.rank_desk import Poll

POLL_S = 1.0
ANSWER_S = 3.0
"""A rank that does not answer a poll within POLL_S + ANSWER_S is taken for hung. Its event loop answers polls even while
the step loop waits for a recovery; seen late by up to 1.6 s while a replacement imports torch on the same two cores."""
NO_PROGRESS_S = 60.0
"""How long a sequence waits for a next token, over all ranks, before its request fails."""
MAX_ATTEMPTS = 20


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
    """The request itself cannot be served: `too_long` or `refused` (an expert is lost and fallback is Refuse)."""

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


async def generate(
    directory: RankDirectory,
    client: RankClient,
    *,
    sequence_id: str,
    prompt: tuple[int, ...],
    sampling: Sampling,
    trace: Trace,
) -> AsyncGenerator[tuple[int, ...], None]:
    """Yields tokens as they come. Raises NoRankLeft, AllBusy (only before the first token), RequestRefused."""
    sent: list[int] = []
    avoid: set[str] = set()
    progress_at = time.monotonic()
    for attempt in range(MAX_ATTEMPTS):
        known = await directory.wait_for_rank(progress_at + NO_PROGRESS_S, frozenset(avoid))
        if known is None:
            raise NoRankLeft(f"no rank took the request within {NO_PROGRESS_S:.0f} s")
        request = GenerationRequest(
            request_id=f"{sequence_id}.{attempt}",
            prompt=prompt + tuple(sent),
            max_tokens=sampling.max_tokens - len(sent),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
        )
        known.in_flight += 1
        finished = False
        try:
            async for poll in _on_rank(client, known, request, progress_at + NO_PROGRESS_S):
                directory.clear(known.pod_uid)
                trace.degraded_by_attempt[attempt] = poll.degraded
                if poll.tokens:
                    sent += poll.tokens
                    progress_at = time.monotonic()
                    yield poll.tokens
                if poll.end in ("stop", "length"):
                    finished = True
                    trace.finish_reason = poll.end
                    return
                if poll.end in ("too_long", "refused"):
                    finished = True
                    raise RequestRefused(poll.end, poll.message)
                if poll.end == "overloaded":
                    finished = True
                    if len(avoid) + 1 >= len(directory.usable()) and not sent:
                        raise AllBusy(poll.message)
                    avoid.add(known.pod_uid)
                    break
                if poll.end == "moved":
                    finished = True
                    raise RankForgot("moved")
        except RankForgot as error:
            trace.replays.append("moved" if str(error) == "moved" else "forgot")
            avoid = {known.pod_uid}
            await asyncio.sleep(0.05 * min(attempt, 10))
        except RankUnreachable as error:
            directory.suspect(known.pod_uid, is_gone=error.is_gone)
            trace.replays.append("died" if error.is_gone else "hung")
            avoid = {known.pod_uid}
        finally:
            known.in_flight -= 1
            if not finished:
                client.cancel(known.pod_uid, request.request_id)
        if time.monotonic() - progress_at > NO_PROGRESS_S:
            raise NoRankLeft(f"no token for {NO_PROGRESS_S:.0f} s, after {len(trace.replays)} replays")
    raise NoRankLeft(f"{MAX_ATTEMPTS} attempts, no rank finished the request")


async def _on_rank(
    client: RankClient, known: KnownRank, request: GenerationRequest, deadline: float
) -> AsyncIterator[Poll]:
    """Polls of one request on one rank until its end; raises RankUnreachable when nothing comes until `deadline`."""
    poll = await client.submit(known.pod_uid, request, wait_s=POLL_S, timeout_s=POLL_S + ANSWER_S)
    have = 0
    while True:
        have += len(poll.tokens)
        if poll.tokens:
            deadline = time.monotonic() + NO_PROGRESS_S
        yield poll
        if poll.end is not None:
            return
        if time.monotonic() > deadline:
            raise RankUnreachable(f"rank {known.rank} made no progress for {NO_PROGRESS_S:.0f} s")
        poll = await client.poll(
            known.pod_uid, request.request_id, have=have, wait_s=POLL_S, timeout_s=POLL_S + ANSWER_S
        )
