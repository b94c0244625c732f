"""The gateway's HTTP face over fake ranks: whole answers, streams, and everything that may go wrong with either."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from moe_runtime.engine.scheduler import GenerationRequest
from moe_runtime.gateway.face import GatewayFace
from moe_runtime.gateway.ranks import RankDirectory
from moe_runtime.gateway.tokenizer import ByteTokenizer
from moe_runtime.rank.desk import Poll
from serving_config import serving_config

CONFIG = serving_config()
Answer = Callable[[GenerationRequest, int], Poll]
"""What the only rank answers to a request of which the gateway has so many tokens."""


def said(text: str, end: str | None = None) -> Poll:
    return Poll(tuple(text.encode()), end, "", {}, 1)  # type: ignore[arg-type]


def letters(request: GenerationRequest, have: int) -> Poll:
    return said("abcdefgh"[have : have + 1], "length" if have + 1 >= request.max_tokens else None)


class FakeRank:
    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._requests: dict[str, GenerationRequest] = {}
        self.cancelled = asyncio.Event()

    async def submit(self, pod_uid: str, request: GenerationRequest, *, wait_s: float, timeout_s: float) -> Poll:
        self._requests[request.request_id] = request
        return await self.poll(pod_uid, request.request_id, have=0, wait_s=wait_s, timeout_s=timeout_s)

    async def poll(self, pod_uid: str, request_id: str, *, have: int, wait_s: float, timeout_s: float) -> Poll:
        answer = self._answer(self._requests[request_id], have)
        if not answer.tokens and answer.end is None:
            await asyncio.sleep(wait_s)
        return answer

    def cancel(self, pod_uid: str, request_id: str) -> None:
        self.cancelled.set()


@asynccontextmanager
async def gateway(answer: Answer) -> AsyncIterator[tuple[TestClient[Any, Any], GatewayFace, FakeRank]]:
    directory, rank = RankDirectory(), FakeRank(answer)
    directory.tell(1, [(0, "a")])
    face = GatewayFace(CONFIG, directory, rank, ByteTokenizer())
    server = TestServer(face.app(), handler_cancellation=True)
    async with TestClient(server) as client:
        yield client, face, rank


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "p", "max_tokens": 3, **more}


def events(text: str) -> list[Any]:
    parts = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


async def test_an_answer_is_whole_or_in_pieces_and_the_same() -> None:
    async with gateway(letters) as (client, face, _):
        whole = await (await client.post("/v1/completions", json=asked(n=2))).json()
        stream = events(await (await client.post("/v1/completions", json=asked(stream=True))).text())
    assert [choice["text"] for choice in whole["choices"]] == ["abc", "abc"]
    assert whole["usage"] == {"prompt_tokens": 1, "completion_tokens": 6, "total_tokens": 7}
    assert "".join(event["choices"][0]["text"] for event in stream[:-1]) == "abc"
    assert stream[-1] == "[DONE]"
    assert (face.counts.ok, face.counts.failed, face.counts.tokens_out) == (2, 0, 9)


@pytest.mark.parametrize("stream", [False, True])
async def test_where_every_rank_is_full_the_client_is_told_to_come_again(stream: bool) -> None:
    async with gateway(lambda _, __: said("", "overloaded")) as (client, face, _):
        answer = await client.post("/v1/completions", json=asked(stream=stream))
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        assert (await answer.json())["error"]["type"] == "rate_limit_error"
    assert face.counts.failed == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_that_nobody_expected_is_told_in_the_shape_of_every_other(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: GenerationRequest, __: int) -> Poll:
        raise KeyError("a mistake of ours")

    async with gateway(broken) as (client, face, _):
        answer = await asyncio.wait_for(client.post("/v1/completions", json=asked(stream=stream)), 5)
        assert (answer.status, (await answer.json())["error"]["type"]) == (500, "server_error")
    assert face.counts.failed == 1
    assert "a mistake of ours" in caplog.text


async def test_a_stream_that_breaks_off_ends_with_the_error_as_an_event() -> None:
    def broken(_: GenerationRequest, have: int) -> Poll:
        if have:
            raise KeyError("a mistake of ours")
        return said("a")

    async with gateway(broken) as (client, face, _):
        answer = await client.post("/v1/completions", json=asked(stream=True))
        *_, last = events(await asyncio.wait_for(answer.text(), 5))
    assert (answer.status, last["error"]["code"]) == (200, "internal")
    assert face.counts.failed == 1


async def test_one_of_several_choices_that_fails_ends_the_stream() -> None:
    def broken(request: GenerationRequest, have: int) -> Poll:
        if request.request_id.endswith("-1.0"):
            return said("", "refused")
        return said("a" if not have else "")

    async with gateway(broken) as (client, _, rank):
        answer = await client.post("/v1/completions", json=asked(n=2, stream=True))
        *_, last = events(await asyncio.wait_for(answer.text(), 5))
        await asyncio.wait_for(rank.cancelled.wait(), 5)
    assert last["error"]["code"] == "refused"


async def test_a_client_that_goes_is_no_failure_and_its_rank_is_told() -> None:
    async with gateway(lambda _, have: said("a" if not have else "")) as (client, face, rank):
        answer = await client.post("/v1/completions", json=asked(stream=True))
        await answer.content.readline()
        answer.close()
        await asyncio.wait_for(rank.cancelled.wait(), 5)
        for _ in range(200):
            if 'outcome="cancelled"' in face.metrics.render().decode():
                break
            await asyncio.sleep(0.01)
    assert (face.counts.ok, face.counts.failed) == (0, 0)
    assert 'moe_requests_total{outcome="cancelled"} 1.0' in face.metrics.render().decode()


async def test_what_is_not_served_has_the_same_shape() -> None:
    async with gateway(letters) as (client, face, _):
        unknown = await client.get("/v1/chat")
        model = await client.post("/v1/completions", json=asked(model="other"))
        long = await client.post("/v1/completions", json=asked(max_tokens=64))
        health = await client.get("/health")
        assert (unknown.status, model.status, long.status, health.status) == (404, 404, 400, 200)
        for answer in (unknown, model, long):
            assert (await answer.json())["error"]["type"] == "invalid_request_error"
    assert face.counts.failed == 0, "what was never begun did not fail"


async def test_a_gateway_that_no_request_can_reach_yet_is_not_ready() -> None:
    async with gateway(letters) as (client, face, _):
        face.is_open = False
        assert (await client.get("/health")).status == 503
        face.is_open = True
        assert (await client.get("/health")).status == 200
