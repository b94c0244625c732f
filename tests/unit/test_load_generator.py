"""What counts as a failed request."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from moe_operator.load_generator import LoadGenerator

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[LoadGenerator]]]:
    """A server on a free loopback port that answers with one handler, and a generator of one client aimed at it."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> LoadGenerator:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return LoadGenerator(f"http://127.0.0.1:{port}/v1", model="m", clients=1, pause_s=0)

    yield start
    for runner in runners:
        await runner.cleanup()


async def run_two(load: LoadGenerator, seen: list[dict[str, object]]) -> None:
    """Two requests: one whole, one streaming."""
    original = load._body

    def body(number: int, *, stream: bool) -> dict[str, object]:
        if number == 1:
            load.stop()
        seen.append(original(number, stream=stream))
        return seen[-1]

    load._body = body  # type: ignore[method-assign]
    await load.run()


def chunk(text: str, finish: str | None, **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}], **more}).encode() + b"\n\n"


async def good(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if not body.get("stream"):
        choices = [{"text": "x", "finish_reason": "length"}]
        return web.json_response({"choices": choices, "usage": {"completion_tokens": 3}})
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(chunk("a", None))
    await answer.write(chunk("b", "length"))
    await answer.write(b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n')
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def cut_off(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(chunk("a", None))
    return answer


async def refuse(_: web.Request) -> web.StreamResponse:
    return web.json_response({"error": "no"}, status=503)


async def test_whole_and_streamed_answers_are_counted_with_their_tokens(
    serve: Callable[[Handler], Awaitable[LoadGenerator]],
) -> None:
    seen: list[dict[str, object]] = []
    load = await serve(good)
    await run_two(load, seen)
    assert (load.tally.sent, load.tally.ok, load.tally.failed, load.tally.streamed) == (2, 2, 0, 1)
    assert load.tally.tokens == 5
    assert [bool(body.get("stream")) for body in seen] == [False, True]


@pytest.mark.parametrize("handler", [cut_off, refuse], ids=["a stream without its end", "a status other than 200"])
async def test_anything_but_a_complete_answer_is_a_failure(
    serve: Callable[[Handler], Awaitable[LoadGenerator]], handler: Handler
) -> None:
    load = await serve(handler)
    await run_two(load, [])
    assert (load.tally.sent, load.tally.ok, load.tally.failed) == (2, 0, 2)
