"""Continuous batching for one rank: which sequences run which tokens in the next step. No tensors, clock or threads.

`plan` changes nothing that a failed step would have to undo: planning again after a rollback gives the same chunks.
Only `commit` moves sequences on. Prompts are read in chunks beside the sequences that decode.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`prompt` includes what an earlier rank has already sent; `seed` makes sampling the same on every rank."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence in a step: `token_ids` at positions first_position.. of KV row `row`."""

    request_id: str
    row: int
    token_ids: tuple[int, ...]
    first_position: int
    samples: bool
    """Whether the last token's logits give the next token (False inside a prompt)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one committed step brought a sequence."""

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None


class Overloaded(RuntimeError):
    """Rows and queue are full; another rank may have room."""


class TooLong(ValueError):
    """Prompt and completion do not fit into a sequence."""


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    row: int
    tokens: list[int]
    committed: int = 0
    sampled: int = 0
    stepped_at: int = 0
    """Number of the committed step that it last took part in."""

    @property
    def is_reading(self) -> bool:
        """Still inside its prompt."""
        return len(self.tokens) - self.committed > 1


@dataclass(slots=True)
class Scheduler:
    """At most `max_sequences` run, `max_queue` wait. A step holds at most `max_step_tokens`, a chunk `max_chunk`."""

    max_sequences: int
    max_context: int
    max_queue: int = 64
    max_chunk: int = 64
    max_step_tokens: int = 256
    _queue: deque[GenerationRequest] = field(default_factory=deque)
    _running: dict[str, _Running] = field(default_factory=dict)
    _free_rows: list[int] = field(default_factory=list)
    _steps: int = 0

    def __post_init__(self) -> None:
        self._free_rows = list(range(self.max_sequences - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._queue)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises Overloaded, TooLong."""
        if not request.prompt:
            raise TooLong("the prompt holds no token")
        if len(request.prompt) + request.max_tokens > self.max_context:
            raise TooLong(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} to come exceed the context of "
                f"{self.max_context}"
            )
        if len(self._queue) >= self.max_queue + len(self._free_rows):
            raise Overloaded(f"{self.num_running} sequences run and {self.num_queued} wait")
        self._queue.append(request)

    def cancel(self, request_id: str) -> int | None:
        """Forget a request; returns the KV row it held, to be freed."""
        running = self._running.pop(request_id, None)
        if running is None:
            self._queue = deque(r for r in self._queue if r.request_id != request_id)
            return None
        self._free_rows.append(running.row)
        return running.row

    def plan(self) -> tuple[Chunk, ...]:
        """The next step, ordered by row. Admits waiting requests to free rows; decoding sequences go first.

        Where not all fit, those go first that have waited for longest, and one chunk is kept for prompts.
        """
        while self._queue and self._free_rows:
            request = self._queue.popleft()
            row = self._free_rows.pop()
            self._running[request.request_id] = _Running(request, row, list(request.prompt))
        waiting = sorted(self._running.values(), key=lambda r: (r.stepped_at, r.sampled, r.row))
        reading = [r for r in waiting if r.is_reading]
        # Decoding first: a long prompt must not starve the sequences whose readers wait for the next token.
        kept = self.max_chunk if reading else 0
        decoding = [r for r in waiting if not r.is_reading][: max(1, self.max_step_tokens - kept)]
        budget = self.max_step_tokens
        chunks: list[Chunk] = []
        for running in (*decoding, *reading):
            pending = running.tokens[running.committed : running.committed + min(self.max_chunk, budget)]
            if not pending:
                break
            budget -= len(pending)
            ends = running.committed + len(pending) == len(running.tokens)
            chunks.append(Chunk(running.request.request_id, running.row, tuple(pending), running.committed, ends))
        return tuple(sorted(chunks, key=lambda c: c.row))

    def request(self, request_id: str) -> GenerationRequest:
        return self._running[request_id].request

    def commit(self, chunks: Sequence[Chunk], sampled: Sequence[int | None]) -> tuple[list[Progress], list[int]]:
        """The step counts: `sampled` holds a token for each chunk that samples. Returns progress and rows to free."""
        progress: list[Progress] = []
        freed: list[int] = []
        self._steps += 1
        for chunk, token_id in zip(chunks, sampled, strict=True):
            running = self._running.get(chunk.request_id)
            if running is None:
                continue
            running.committed += len(chunk.token_ids)
            running.stepped_at = self._steps
            if not chunk.samples:
                continue
            assert token_id is not None, f"no token for {chunk.request_id}"
            finish: FinishReason | None = None
            shown: int | None = token_id
            if token_id in running.request.stop_token_ids:
                finish, shown = "stop", None
            else:
                running.tokens.append(token_id)
                running.sampled += 1
                if running.sampled >= running.request.max_tokens:
                    finish = "length"
            progress.append(Progress(chunk.request_id, shown, finish))
            if finish is not None:
                del self._running[chunk.request_id]
                self._free_rows.append(running.row)
                freed.append(running.row)
        return progress, freed
