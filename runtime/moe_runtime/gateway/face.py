"""The OpenAI face of a gateway: routes, streaming, stop strings, usage. Tokens come from `replay.generate`."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from moe_core.contract.runtime_config import RuntimeConfig, ServingConfig
from moe_runtime.gateway import openai_api as api
from moe_runtime.gateway.openai_api import ApiError, CompletionRequest
from moe_runtime.gateway.ranks import RankDirectory
from moe_runtime.gateway.replay import (
    AllBusy,
    NoRankLeft,
    RankClient,
    RequestRefused,
    Sampling,
    Trace,
    generate,
)
from moe_runtime.gateway.stop_strings import StopStrings
from moe_runtime.gateway.tokenizer import Tokenizer
from moe_runtime.metrics import CONTENT_TYPE, GatewayMetrics

_MAX_BODY_BYTES = 16 << 20
_STREAM = web.RequestKey("stream", web.StreamResponse)
"""Where a request keeps the answer that it has begun to stream."""


@dataclass(slots=True)
class Counts:
    """Requests of this gateway, for the coordinator."""

    ok: int = 0
    failed: int = 0
    replayed: int = 0
    tokens_out: int = 0


@dataclass(slots=True)
class _Answer:
    """One choice while it is written."""

    index: int
    prompt_tokens: int
    trace: Trace = field(default_factory=Trace)
    completion_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None


class GatewayFace:
    """Routes over a directory of ranks and a client to call them."""

    def __init__(
        self, config: RuntimeConfig, directory: RankDirectory, client: RankClient, tokenizer: Tokenizer
    ) -> None:
        if config.serving is None:
            raise ValueError(f"a gateway needs a serving configuration, mode is {config.mode}")
        self._serving: ServingConfig = config.serving
        self._directory = directory
        self._client = client
        self._tokenizer = tokenizer
        self._started = int(time.time())
        self.metrics = GatewayMetrics()
        self.counts = Counts()
        self.is_open = True
        """Whether requests can reach this gateway: a port that gateways share is opened once there is who answers."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors_in_openai_shape])
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["model"])
        return web.json_response(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {"id": self._serving.served_name, "object": "model", "created": self._started, "owned_by": "moerator"}

    def _check_model(self, name: str) -> None:
        if name != self._serving.served_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this service serves {self._serving.served_name!r}",
                param="model",
                code="model_not_found",
            )

    async def _health(self, _: web.Request) -> web.Response:
        """200 only while requests reach this gateway and an active rank of a committed epoch can take them."""
        usable = self._directory.usable()
        body = {
            "status": "ok" if self.is_open and usable and self._directory.epoch else "unavailable",
            "epoch": self._directory.epoch,
            "ranks": sorted(k.rank for k in usable),
            "experts_covered": self._directory.covered,
            "experts_total": self._directory.total,
        }
        return web.json_response(body, status=200 if body["status"] == "ok" else 503)

    async def _healthz(self, _: web.Request) -> web.Response:
        """For a liveness probe: this process answers, whatever became of the ranks."""
        return web.json_response({"ok": True})

    async def _metrics(self, _: web.Request) -> web.Response:
        self.metrics.epoch.set(self._directory.epoch)
        self.metrics.ranks.set(len(self._directory.usable()))
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        asked = api.parse_completion(await request.read())
        self._check_model(asked.model)
        prompts = [self._encode(p) for p in asked.prompts]
        self._check_length(prompts, asked)
        completion_id = f"cmpl-{secrets.token_hex(12)}"
        seed = asked.seed if asked.seed is not None else secrets.randbits(48)
        answers = [
            _Answer(index=i * asked.n + j, prompt_tokens=len(prompt))
            for i, prompt in enumerate(prompts)
            for j in range(asked.n)
        ]
        sources = [
            self._choice(answer, prompts[answer.index // asked.n], asked, f"{completion_id}-{answer.index}",
                         seed + answer.index % asked.n)
            for answer in answers
        ]  # fmt: skip
        outcome = "failed"
        with self.metrics.in_flight.track_inprogress():
            try:
                write = self._stream if asked.stream else self._whole
                response = await write(request, asked, completion_id, answers, sources)
                outcome = "ok"
                return response
            except (ConnectionResetError, asyncio.CancelledError):
                outcome = "cancelled"
                raise
            finally:
                self._count(outcome, answers)

    def _count(self, outcome: str, answers: list[_Answer]) -> None:
        self.metrics.requests.labels(outcome).inc()
        self.counts.ok += outcome == "ok"
        self.counts.failed += outcome == "failed"
        self.counts.replayed += any(a.trace.replays for a in answers)
        for answer in answers:
            for cause in answer.trace.replays:
                self.metrics.replays.labels(cause).inc()

    def _encode(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        token_ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not token_ids:
            raise ApiError(400, "prompt holds no token", param="prompt")
        limit = self._tokenizer.vocabulary_size
        if limit is not None and max(token_ids) >= limit:
            raise ApiError(
                400, f"prompt holds token {max(token_ids)}; the vocabulary ends at {limit - 1}", param="prompt"
            )
        return token_ids

    def _check_length(self, prompts: list[tuple[int, ...]], asked: CompletionRequest) -> None:
        longest = max(len(p) for p in prompts)
        if longest + asked.max_tokens > self._serving.max_context:
            raise ApiError(
                400,
                f"this model's maximum context length is {self._serving.max_context} tokens, however you requested "
                f"{longest + asked.max_tokens} tokens ({longest} in the prompt, {asked.max_tokens} for the completion)",
                param="max_tokens",
                code="context_length_exceeded",
            )

    async def _choice(
        self, answer: _Answer, prompt: tuple[int, ...], asked: CompletionRequest, sequence_id: str, seed: int
    ) -> AsyncIterator[str]:
        """Text of one choice as it becomes certain; sets the answer's finish_reason at the end."""
        sampling = Sampling(
            asked.max_tokens, asked.temperature, asked.top_p, seed, frozenset(self._tokenizer.end_token_ids)
        )
        decoder, stops = self._tokenizer.stream(), StopStrings(asked.stops)
        tokens = generate(
            self._directory,
            self._client,
            sequence_id=sequence_id,
            prompt=prompt,
            sampling=sampling,
            trace=answer.trace,
        )
        async with contextlib.aclosing(tokens):
            async for token_ids in tokens:
                answer.completion_tokens += len(token_ids)
                self.counts.tokens_out += len(token_ids)
                self.metrics.tokens_out.inc(len(token_ids))
                text = stops.push(decoder.push(token_ids))
                if text:
                    answer.text += text
                    yield text
                if stops.is_found:
                    answer.finish_reason = "stop"
                    return
        rest = stops.push(decoder.finish()) + stops.finish()
        answer.finish_reason = "stop" if stops.is_found else answer.trace.finish_reason
        if rest:
            answer.text += rest
            yield rest

    async def _whole(
        self,
        _: web.Request,
        asked: CompletionRequest,
        completion_id: str,
        answers: list[_Answer],
        sources: list[AsyncIterator[str]],
    ) -> web.StreamResponse:
        async def drain(source: AsyncIterator[str]) -> None:
            async for _ in source:
                pass

        try:
            async with asyncio.TaskGroup() as group:
                for source in sources:
                    group.create_task(drain(source))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # of several the first; whatever it is, the middleware knows its shape
        body = api.completion(
            completion_id=completion_id,
            created=int(time.time()),
            model=asked.model,
            choices=[api.choice(a.index, a.text, a.finish_reason) for a in answers],
            usage=_usage(answers, asked),
            moerator=_marks(answers),
        )
        return web.json_response(body, headers=_mark_headers(answers))

    async def _stream(
        self,
        request: web.Request,
        asked: CompletionRequest,
        completion_id: str,
        answers: list[_Answer],
        sources: list[AsyncIterator[str]],
    ) -> web.StreamResponse:
        created = int(time.time())
        pieces: asyncio.Queue[tuple[_Answer, str | None]] = asyncio.Queue()

        async def pump(answer: _Answer, source: AsyncIterator[str]) -> None:
            try:
                async for text in source:
                    pieces.put_nowait((answer, text))
            finally:
                pieces.put_nowait((answer, None))

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        request[_STREAM] = response
        pumps = {a.index: asyncio.create_task(pump(a, s)) for a, s in zip(answers, sources, strict=True)}
        try:
            open_choices = len(answers)
            while open_choices:
                answer, text = await pieces.get()
                if text is None:
                    await pumps[answer.index]  # raises what ended it
                if not response.prepared:
                    await response.prepare(request)
                finish = answer.finish_reason if text is None else None
                open_choices -= text is None
                chunk = api.choice(answer.index, text or "", finish)
                more: dict[str, Any] = {"moerator": _marks(answers)} if text is None else {}
                await response.write(
                    api.event(
                        api.completion(
                            completion_id=completion_id, created=created, model=asked.model, choices=[chunk], **more
                        )
                    )
                )
            if asked.include_usage:
                await response.write(
                    api.event(
                        api.completion(
                            completion_id=completion_id,
                            created=created,
                            model=asked.model,
                            choices=[],
                            usage=_usage(answers, asked),
                        )
                    )
                )
            await response.write(api.DONE_EVENT)
            await response.write_eof()
        finally:
            for task in pumps.values():
                task.cancel()
            await asyncio.gather(*pumps.values(), return_exceptions=True)
        return response


@web.middleware
async def _errors_in_openai_shape(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        answer: web.StreamResponse = await handler(request)
        return answer
    except (ApiError, AllBusy, RequestRefused, NoRankLeft, web.HTTPException) as error:
        return await _tell(request, _as_api_error(error, request))
    except ConnectionResetError:  # nobody is there to be told
        raise
    except Exception:
        await _tell(request, ApiError(500, "the gateway made a mistake; its log says which", code="internal"))
        raise  # the server logs it, and closes the connection


async def _tell(request: web.Request, error: ApiError) -> web.StreamResponse:
    """Sends it: as an answer, or as the last event of the one that has begun."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    begun: web.StreamResponse | None = request.get(_STREAM)
    if begun is not None and begun.prepared:
        with contextlib.suppress(ConnectionError):
            await begun.write(api.event(error.body()))
            await begun.write_eof()
        return begun
    answer = web.json_response(error.body(), status=error.status, headers=headers)
    with contextlib.suppress(ConnectionError):
        await answer.prepare(request)
        await answer.write_eof()
    return answer


def _as_api_error(error: Exception, request: web.Request) -> ApiError:
    match error:
        case ApiError():
            return error
        case AllBusy():
            return ApiError(429, f"every rank is busy: {error}", code="overloaded", retry_after_s=1)
        case RequestRefused(kind=kind):
            return ApiError(400 if kind == "too_long" else 503, str(error), code=kind)
        case web.HTTPException():
            return ApiError(error.status, f"{request.method} {request.path}: {error.reason}")
        case _:
            return ApiError(503, str(error), code="no_rank", retry_after_s=2)


def _usage(answers: list[_Answer], asked: CompletionRequest) -> dict[str, int]:
    """Prompt tokens count once per prompt, however many choices it has."""
    prompt_tokens = sum(a.prompt_tokens for a in answers if a.index % asked.n == 0)
    return api.usage(prompt_tokens, sum(a.completion_tokens for a in answers))


def _marks(answers: list[_Answer]) -> dict[str, Any]:
    degraded: dict[str, int] = {}
    for answer in answers:
        for reason, count in answer.trace.degraded.items():
            degraded[reason] = degraded.get(reason, 0) + count
    return {"degraded_tokens": degraded, "replays": sum(len(a.trace.replays) for a in answers)}


def _mark_headers(answers: list[_Answer]) -> dict[str, str]:
    marks = _marks(answers)
    return (
        {"X-Moerator-Degraded-Tokens": str(sum(marks["degraded_tokens"].values()))} if marks["degraded_tokens"] else {}
    )
