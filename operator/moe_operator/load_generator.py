"""Steady, bounded requests against an OpenAI completions face, every second one streaming, counted without mercy.

A request failed if anything but a complete answer came: another status than 200, a stream that ends without its end
mark, no finish reason, or nothing for too long. Nothing is tried twice.
"""

import asyncio
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n",
    "class Error(Exception):\n    ",
    "    for name in sorted(",
    "if __name__ == '__main__':\n    ",
    '    """Return the ',
    "        raise ValueError(",
    "from collections import ",
)
REQUEST_TIMEOUT_S = 60.0
LONGEST_WINDOW_S = 60.0


@dataclass(slots=True)
class Tally:
    """What became of the requests so far; times in seconds."""

    sent: int = 0
    ok: int = 0
    streamed: int = 0
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    longest_silence_s: float = 0.0
    """Longest wait of any stream between two of its pieces, its first included."""

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def in_flight(self) -> int:
        return self.sent - self.ok - self.failed


class BadAnswer(Exception):
    """The answer is not a complete one; the text says what is missing."""


class LoadGenerator:
    """`clients` requests in flight at most, `pause_s` between two of one client."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        clients: int = 4,
        max_tokens: int = 40,
        pause_s: float = 0.1,
        prompts: Sequence[str] = PROMPTS,
    ) -> None:
        self._url = f"{base_url}/completions"
        self._model = model
        self._clients = clients
        self._max_tokens = max_tokens
        self._pause_s = pause_s
        self._prompts = prompts
        self._numbers = itertools.count()
        self._stopping = False
        self._recent: deque[tuple[float, int]] = deque()
        self.tally = Tally()

    async def run(self) -> None:
        """Send until `stop`, then until every request in flight has its answer."""
        limits = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=limits) as session, asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._client(session))

    def stop(self) -> None:
        """Send no more."""
        self._stopping = True

    def tokens_per_s(self, *, window_s: float = 5.0) -> float:
        """Completion tokens of answers that were completed over the last `window_s`, a minute at most."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - LONGEST_WINDOW_S:
            self._recent.popleft()
        return sum(tokens for at, tokens in self._recent if at >= now - window_s) / window_s

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self._stopping:
            number = next(self._numbers)
            started = time.monotonic()
            self.tally.sent += 1
            try:
                await (self._stream(session, number) if number % 2 else self._ask(session, number))
            except (aiohttp.ClientError, TimeoutError, BadAnswer, ValueError) as error:
                self.tally.failures[f"{type(error).__name__}: {error}"[:200]] += 1
            else:
                self.tally.ok += 1
                self.tally.latencies_s.append(time.monotonic() - started)
            await asyncio.sleep(self._pause_s)

    def _body(self, number: int, *, stream: bool) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self._model,
            "prompt": self._prompts[number % len(self._prompts)],
            "max_tokens": self._max_tokens,
            "temperature": 0.7,
            "seed": number,
        }
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        async with session.post(self._url, json=self._body(number, stream=False)) as answer:
            await _need_ok(answer)
            said = await answer.json()
        if not said["choices"] or said["choices"][0]["finish_reason"] is None:
            raise BadAnswer("no finish_reason")
        self._count(int(said["usage"]["completion_tokens"]))

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> None:
        self.tally.streamed += 1
        finished, ended, tokens, last = False, False, 0, time.monotonic()
        async with session.post(self._url, json=self._body(number, stream=True)) as answer:
            await _need_ok(answer)
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                now = time.monotonic()
                self.tally.longest_silence_s, last = max(self.tally.longest_silence_s, now - last), now
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    ended = True
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise BadAnswer(f"error in the stream: {chunk['error'].get('message', '')}")
                finished = finished or any(choice["finish_reason"] for choice in chunk["choices"])
                if chunk.get("usage"):
                    self._count(int(chunk["usage"]["completion_tokens"]) - tokens)
                    tokens = int(chunk["usage"]["completion_tokens"])
        if not (finished and ended):
            raise BadAnswer(f"the stream ended early: finish reason {finished}, [DONE] {ended}")

    def _count(self, tokens: int) -> None:
        self.tally.tokens += tokens
        self._recent.append((time.monotonic(), tokens))


async def _need_ok(answer: aiohttp.ClientResponse) -> None:
    if answer.status != 200:
        raise BadAnswer(f"status {answer.status}: {(await answer.text())[:150]}")
