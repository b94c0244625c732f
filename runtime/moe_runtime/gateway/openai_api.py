"""The OpenAI completions API as far as it is served: requests parsed at the border, answers and errors in its shapes.

What is not served is refused by name (400, `unsupported_parameter`), never taken and ignored. Formats follow
https://platform.openai.com/docs/api-reference/completions; `moerator` in an answer is ours, clients ignore it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_STOPS = 4
_MAX_CHOICES = 128
"""Of one request, over all of its prompts: each is a sequence of its own."""
_DEFAULT_MAX_TOKENS = 16
_KNOWN = frozenset({
    "model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "stream_options", "user",
    "echo", "logprobs", "best_of", "presence_penalty", "frequency_penalty", "logit_bias", "suffix",
})  # fmt: skip
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "logprobs": (None,),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
"""Parameters that are not served: only the value that asks for nothing is taken."""


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    >>> ApiError(400, "n must be at least 1", param="n").body()["error"]["param"]
    'n'
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """prompts: texts or token ids; every prompt gets n choices. max_tokens 0 is not served."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises ApiError (400) that names the parameter."""
    try:
        raw = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name in raw:
        if name not in _KNOWN:
            raise ApiError(400, f"unrecognized request argument: {name}", param=name, code="unknown_parameter")
    for name, neutral in _NEUTRAL.items():
        if raw.get(name) not in neutral:
            raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    n = _integer(raw, "n", default=1, low=1, high=_MAX_CHOICES)
    if raw.get("best_of") not in (None, n):
        raise ApiError(400, "best_of is not supported here", param="best_of", code="unsupported_parameter")
    prompts = _prompts(raw.get("prompt"))
    if len(prompts) * n > _MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts of {n} choices are more than {_MAX_CHOICES}", param="prompt")
    model = raw.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "you must provide a model parameter", param="model")
    stream = _boolean(raw, "stream")
    return CompletionRequest(
        model=model,
        prompts=prompts,
        max_tokens=_integer(raw, "max_tokens", default=_DEFAULT_MAX_TOKENS, low=1, high=1 << 24),
        temperature=_number(raw, "temperature", default=1.0, low=0.0, high=2.0),
        top_p=_number(raw, "top_p", default=1.0, low=0.0, high=1.0),
        seed=None if raw.get("seed") is None else _integer(raw, "seed", default=0, low=-(1 << 63), high=(1 << 63) - 1),
        stops=_stops(raw.get("stop")),
        n=n,
        stream=stream,
        include_usage=_include_usage(raw.get("stream_options"), stream),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(raw: Mapping[str, Any], name: str, *, default: int, low: int, high: int) -> int:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}, got {value!r:.40}", param=name)
    return value


def _number(raw: Mapping[str, Any], name: str, *, default: float, low: float, high: float) -> float:
    value = raw.get(name)
    if value is None:
        return default
    if not _is_number(value) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}, got {value!r:.40}", param=name)
    return float(value)


def _boolean(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, got {value!r:.40}", param=name)
    return bool(value)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    if not isinstance(options, dict) or any(key not in ("include_usage", "include_obfuscation") for key in options):
        raise ApiError(400, f"stream_options may hold include_usage only, got {options!r:.80}", param="stream_options")
    return _boolean(options, "include_usage")


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    )


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str) and value:
        return (value,)
    if _is_tokens(value):
        return (tuple(value),)
    if isinstance(value, list) and value:
        if all(isinstance(v, str) and v for v in value):
            return tuple(value)
        if all(_is_tokens(v) for v in value):
            return tuple(tuple(v) for v in value)
    raise ApiError(400, "prompt must be a string, a list of strings, or token ids, and not empty", param="prompt")


def _stops(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if (
        not isinstance(stops, (list, tuple))
        or len(stops) > _MAX_STOPS
        or any(not isinstance(stop, str) or not stop for stop in stops)
    ):
        raise ApiError(400, f"stop must be a string or up to {_MAX_STOPS} strings, none empty", param="stop")
    return tuple(stops)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def completion(
    *, completion_id: str, created: int, model: str, choices: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """A whole answer, or one chunk of a stream."""
    return {
        "id": completion_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": list(choices),
        **more,
    }


def event(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


DONE_EVENT = b"data: [DONE]\n\n"
