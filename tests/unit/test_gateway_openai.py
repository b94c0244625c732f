"""The OpenAI face: what is taken, what is refused and how, stop strings, bytes that are half a character."""

import json
from typing import Any

import pytest

from moe_runtime.gateway.openai_api import ApiError, parse_completion
from moe_runtime.gateway.stop_strings import StopStrings
from moe_runtime.gateway.tokenizer import ByteTokenizer


def parse(**body: Any) -> Any:
    return parse_completion(json.dumps({"model": "m", "prompt": "p", **body}).encode())


def test_defaults_are_openais() -> None:
    asked = parse()
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.n, asked.stream) == (16, 1.0, 1.0, 1, False)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompts_may_be_text_texts_tokens_or_lists_of_tokens(prompt: Any, prompts: Any) -> None:
    assert parse(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1]] * 129}, "prompt"),
        ({"prompt": ["a", "b"], "n": 65}, "prompt"),
        ({"model": ""}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_is_wrong_or_not_served_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**body)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["param"] == param
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


def test_parameters_that_ask_for_nothing_are_taken() -> None:
    assert parse(echo=False, logprobs=None, best_of=1, presence_penalty=0, suffix=None, user="u").n == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"'])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_completion(body)


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder = StopStrings(stops)
    text = "".join(finder.push(piece) for piece in pieces) + finder.finish()
    return text, finder.is_found


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_is_found_however_the_text_is_cut(size: int) -> None:
    text = "one two ## three"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert shown(["##"], pieces) == ("one two ", True)
    assert shown(["nothing"], pieces) == (text, False)


def test_the_earliest_of_several_stops_wins_and_an_unfinished_one_is_shown() -> None:
    assert shown(["b", "abc"], ["a", "bc"]) == ("", True)
    assert shown(["abc"], ["xab"]) == ("xab", False)


def test_half_a_character_is_held_back() -> None:
    stream = ByteTokenizer().stream()
    first, second = "é".encode()
    assert (stream.push([first]), stream.push([second]), stream.push([300]), stream.finish()) == ("", "é", "\ufffd", "")
