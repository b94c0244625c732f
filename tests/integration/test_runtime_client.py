"""The operator's side of the coordinator's HTTP face, against a server that restarts and refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from moe_core.contract.exchange import RuntimeState, RuntimeWish, ServingProgress
from moe_core.contract.expert_map import ExpertMap
from moe_operator import runtime_client
from moe_operator.cluster.protocol import Conflict, Refused, Unavailable
from moe_operator.runtime_client import RuntimeClient

pytestmark = pytest.mark.integration

WISH = RuntimeWish(
    generation=3,
    ranks=(0,),
    expert_map=ExpertMap(generation=0, num_logical_experts=1, slots_of_rank=(1,), logical_of_slot=((0,),)),
)


class Coordinator:
    """Answers long polls with `state`; `status` other than 200 refuses everything."""

    def __init__(self) -> None:
        self.state = RuntimeState(version=7, epoch=1)
        self.status = 200
        self.polls: list[int] = []
        self.tokens: set[str] = set()
        self.url = ""

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Coordinator]:
        app = web.Application()
        app.router.add_get("/v1/state", self._state)
        app.router.add_put("/v1/wish", self._wish)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _state(self, request: web.Request) -> web.Response:
        self.polls.append(int(request.query["after"]))
        self.tokens.add(request.headers["Authorization"])
        while self.status == 200 and self.state.version <= int(request.query["after"]):
            await asyncio.sleep(0.01)
        return web.Response(status=self.status, text=self.state.canonical())

    async def _wish(self, request: web.Request) -> web.Response:
        if self.status == 200:
            return web.Response(status=204)
        return web.json_response({"error": "not so"}, status=self.status)


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    async with Coordinator().serve() as running:
        yield running


@pytest.fixture
async def client(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RuntimeClient]:
    monkeypatch.setattr(runtime_client, "AWAY_AFTER_S", 0.5)
    monkeypatch.setattr(runtime_client, "RETRY_S", 0.02)
    made = RuntimeClient(coordinator.url, token=lambda: "secret", on_change=lambda: None)
    yield made
    await made.close()


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not seen():
            await asyncio.sleep(0.01)


async def test_the_newest_state_is_followed_with_the_token(coordinator: Coordinator, client: RuntimeClient) -> None:
    client.start()
    await client.first_answer()
    assert client.state is not None and client.state.epoch == 1
    coordinator.state = RuntimeState(version=8, epoch=2, wish_put=5)
    await until(lambda: client.state is not None and client.state.epoch == 2)
    assert client.put_generation == 5
    assert coordinator.polls[:2] == [0, 7]
    assert coordinator.tokens == {"Bearer secret"}


async def test_a_restarted_coordinator_that_counts_anew_is_heard_at_once(
    coordinator: Coordinator, client: RuntimeClient
) -> None:
    client.start()
    await client.first_answer()
    coordinator.status = 503
    await until(lambda: 0 in coordinator.polls[1:])
    coordinator.state, coordinator.status = RuntimeState(version=1, epoch=1), 200
    await until(lambda: client.state is not None and client.state.version == 1)


async def test_a_failure_is_no_absence_and_many_are(coordinator: Coordinator, client: RuntimeClient) -> None:
    client.start()
    await client.first_answer()
    coordinator.status = 503
    await until(lambda: len(coordinator.polls) > 4)
    assert client.state is not None
    await until(lambda: client.state is None)
    assert client.put_generation is None


async def test_counters_are_told_now_and_then_and_a_lost_rank_at_once(coordinator: Coordinator) -> None:
    told: list[int] = []
    client = RuntimeClient(coordinator.url, token=lambda: "x", on_change=lambda: told.append(1), calm_s=0.5)
    client.start()
    try:
        await client.first_answer()
        for version in range(8, 16):
            coordinator.state = RuntimeState(version=version, epoch=1, serving=ServingProgress(tokens_out=version))
            await until(lambda: client.state == coordinator.state)
        assert len(told) == 1
        await until(lambda: len(told) == 2)
        coordinator.state = RuntimeState(version=20, epoch=2)
        await until(lambda: len(told) == 3)
    finally:
        await client.close()


async def test_an_older_wish_is_a_conflict_and_a_refusal_is_told(
    coordinator: Coordinator, client: RuntimeClient
) -> None:
    await client.put_wish(WISH)
    assert client.put_generation == 3
    coordinator.status = 409
    with pytest.raises(Conflict, match="/v1/wish"):
        await client.put_wish(WISH)
    coordinator.status = 500
    with pytest.raises(Unavailable, match="500"):
        await client.put_wish(WISH)
    coordinator.status = 403
    with pytest.raises(Refused, match="403 not so") as refused:
        await client.put_wish(WISH)
    assert (refused.value.code, refused.value.said) == (403, "not so")


async def test_without_a_token_nothing_is_sent(coordinator: Coordinator) -> None:
    client = RuntimeClient(coordinator.url, token=lambda: None, on_change=lambda: None)
    with pytest.raises(Unavailable, match="its token does not exist yet"):
        await client.put_wish(WISH)
    await client.close()
    assert coordinator.polls == []
