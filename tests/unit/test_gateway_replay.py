"""Replay over ranks that die, hang, move and refuse: no token lost, none twice."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import pytest

from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.gateway import ranks, replay
from moe_runtime.gateway.ranks import RankDirectory
from moe_runtime.gateway.replay import (
    AllBusy,
    NoRankLeft,
    RankForgot,
    RankUnreachable,
    RequestRefused,
    Sampling,
    Trace,
    generate,
)
from moe_runtime.rank.desk import Poll

PROMPT = (100, 101)
Script = Callable[[int], Poll | None]
"""What a rank does once it has written so many tokens; None: as usual."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "BACKOFF_S", 0.0)
    monkeypatch.setattr(ranks, "_SUSPECT_S", 0.0)


class FakeRanks:
    """Each rank writes its sequence's positions as tokens, `step` at a time, until its script says otherwise."""

    def __init__(self, scripts: Mapping[str, Script], *, step: int = 2) -> None:
        self._scripts = scripts
        self._step = step
        self._requests: dict[str, GenerationRequest] = {}
        self.cancelled: list[tuple[str, str]] = []
        self.visited: list[str] = []

    async def submit(self, pod_uid: str, request: GenerationRequest, *, wait_s: float, timeout_s: float) -> Poll:
        self.visited.append(pod_uid)
        self._requests[request.request_id] = request
        return await self.poll(pod_uid, request.request_id, have=0, wait_s=wait_s, timeout_s=timeout_s)

    async def poll(self, pod_uid: str, request_id: str, *, have: int, wait_s: float, timeout_s: float) -> Poll:
        request = self._requests[request_id]
        script = self._scripts.get(pod_uid)
        scripted = script(len(request.prompt) + have - len(PROMPT)) if script is not None else None
        if scripted is not None:
            return scripted
        first = len(request.prompt) + have
        count = min(self._step, request.max_tokens - have)
        ends = have + count == request.max_tokens
        return poll(tuple(range(first, first + count)), "length" if ends else None)

    def cancel(self, pod_uid: str, request_id: str) -> None:
        self.cancelled.append((pod_uid, request_id))


def poll(tokens: tuple[int, ...] = (), end: str | None = None, degraded: dict[str, int] | None = None) -> Poll:
    return Poll(tokens, end, "", degraded or {}, 1)  # type: ignore[arg-type]


def at(position: int, error: Exception) -> Callable[[int], Poll | None]:
    def script(done: int) -> Poll | None:
        if done >= position:
            raise error
        return None

    return script


def ends_for(times: int, end: str) -> Script:
    """A rank whose first visits end so at once; later ones go as usual."""
    visits = iter(range(times))

    def script(_: int) -> Poll | None:
        return poll(end=end) if next(visits, None) is not None else None

    return script


async def collect(
    fakes: FakeRanks, *, uids: Sequence[str] = ("a", "b"), max_tokens: int = 9
) -> tuple[list[int], Trace]:
    directory = RankDirectory()
    directory.tell(1, [(i, uid) for i, uid in enumerate(uids)])
    trace = Trace()
    tokens: list[int] = []
    sampling = Sampling(max_tokens, 0.0, 1.0, 0, frozenset())
    async for part in generate(directory, fakes, sequence_id="s", prompt=PROMPT, sampling=sampling, trace=trace):
        tokens += part
    return tokens, trace


WHOLE = list(range(2, 11))


async def test_an_undisturbed_sequence_stays_on_one_rank() -> None:
    fakes = FakeRanks({})
    tokens, trace = await collect(fakes)
    assert (tokens, trace.replays, trace.finish_reason, fakes.visited) == (WHOLE, [], "length", ["a"])
    assert fakes.cancelled == []


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (RankUnreachable("gone", is_gone=True), "died"),
        (RankUnreachable("silent"), "hung"),
        (RankForgot("?"), "forgot"),
    ],
)
async def test_a_lost_rank_costs_no_token(fault: Exception, cause: str) -> None:
    fakes = FakeRanks({"a": at(4, fault)})
    tokens, trace = await collect(fakes)
    assert tokens == WHOLE
    assert trace.replays == [cause]
    assert fakes.visited == ["a", "b"]


async def test_a_rank_that_hands_its_requests_back_costs_no_token() -> None:
    fakes = FakeRanks({"a": lambda done: poll(end="moved") if done >= 2 else None})
    tokens, trace = await collect(fakes)
    assert (tokens, trace.replays) == (WHOLE, ["moved"])


async def test_a_hung_rank_is_told_to_forget() -> None:
    fakes = FakeRanks({"a": at(4, RankUnreachable("silent"))})
    await collect(fakes)
    assert fakes.cancelled == [("a", "s.0")]


async def test_losing_only_the_last_word_needs_no_replay() -> None:
    def lost_end(done: int) -> Poll | None:
        if done >= 9:
            raise RankUnreachable("gone", is_gone=True)
        return poll(tuple(range(2 + done, 2 + min(done + 2, 9))))

    tokens, trace = await collect(FakeRanks({"a": lost_end}))
    assert (tokens, trace.replays, trace.finish_reason) == (WHOLE, [], "length")


async def test_a_busy_rank_is_passed_over_and_all_busy_is_said() -> None:
    busy: dict[str, Script] = {"a": lambda _: poll(end="overloaded")}
    tokens, trace = await collect(FakeRanks(busy))
    assert (tokens, trace.replays) == (WHOLE, [])
    with pytest.raises(AllBusy):
        await collect(FakeRanks({**busy, "b": lambda _: poll(end="overloaded")}))


async def test_a_stream_waits_for_room_however_often_the_others_are_full() -> None:
    fakes = FakeRanks({"a": at(4, RankUnreachable("gone", is_gone=True)), "b": ends_for(500, "overloaded")})
    tokens, trace = await collect(fakes)
    assert (tokens, trace.replays, trace.finish_reason) == (WHOLE, ["died"], "length")


async def test_a_request_that_was_taken_once_is_not_told_that_all_are_busy() -> None:
    fakes = FakeRanks({"a": at(0, RankUnreachable("gone", is_gone=True)), "b": ends_for(3, "overloaded")})
    tokens, trace = await collect(fakes)
    assert (tokens, trace.replays) == (WHOLE, ["died"])


async def test_any_number_of_full_ranks_is_busy_and_no_failure() -> None:
    uids = [f"r{i}" for i in range(100)]
    with pytest.raises(AllBusy):
        await collect(FakeRanks({uid: lambda _: poll(end="overloaded") for uid in uids}), uids=uids)


async def test_ranks_that_take_nothing_for_a_while_are_waited_for_and_are_no_replays() -> None:
    fakes = FakeRanks({uid: ends_for(100, "moved") for uid in ("a", "b")})
    tokens, trace = await collect(fakes)
    assert (tokens, trace.replays) == (WHOLE, [])


async def test_waiting_for_room_ends_with_the_patience_for_a_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "NO_PROGRESS_S", 0.05)
    fakes = FakeRanks({"a": at(4, RankUnreachable("gone", is_gone=True)), "b": lambda _: poll(end="overloaded")})
    with pytest.raises(NoRankLeft, match="1 replay"):
        await collect(fakes)


async def test_a_refusal_is_not_tried_elsewhere() -> None:
    fakes = FakeRanks({"a": lambda _: poll(end="refused")})
    with pytest.raises(RequestRefused):
        await collect(fakes)
    assert fakes.visited == ["a"]


async def test_without_any_rank_it_gives_up_after_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "NO_PROGRESS_S", 0.05)
    with pytest.raises(NoRankLeft):
        await collect(FakeRanks({}), uids=())


async def test_degraded_tokens_add_up_over_attempts() -> None:
    def degraded_then_gone(done: int) -> Poll | None:
        if done >= 2:
            raise RankUnreachable("gone", is_gone=True)
        return poll((2, 3), degraded={"generalist": 2})

    _, trace = await collect(FakeRanks({"a": degraded_then_gone}))
    assert trace.degraded == {"generalist": 2}


async def test_a_sequence_waits_for_a_rank_that_comes_later() -> None:
    directory = RankDirectory()
    waiting = asyncio.create_task(directory.wait_for_rank(1e12))
    await asyncio.sleep(0)
    directory.tell(1, [(0, "a")])
    assert (picked := await waiting) is not None and picked.pod_uid == "a"
