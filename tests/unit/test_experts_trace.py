"""Routing traces: what is read, what is refused with its line, what is counted."""

import pytest

from moe_core.contract.trace import TraceRecord
from moe_core.experts.trace import Trace, read_lines
from moe_core.outcome import InvalidInput

LINE = (
    '{"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 1, "num_tokens": 2, "topk": 2,'
    ' "top_indices": [[0, 2], [2, 1]], "hs_offset": 0, "hs_bytes": 8, "hs_shape": [2, 2]}'
)


def record(step: int, layer: int, rank: int, *picks: tuple[int, int]) -> TraceRecord:
    return TraceRecord(
        step=step, layer=layer, rank=rank, num_tokens=len(picks), topk=2, top_indices=[list(p) for p in picks]
    )


def test_a_line_of_megatrons_tracer_is_read_and_written_back() -> None:
    (read,) = read_lines([LINE, "", "\n"])
    assert (read.layer_name, read.rank, read.top_indices) == (("decoder", -1, 3), 1, [[0, 2], [2, 1]])
    assert list(read_lines([read.line()])) == [read]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: not JSON"),
        (LINE.replace('"layer": 3', f'"layer": {"3" * 5000}'), "line 1: not JSON: Exceeds the limit"),
        ("[1]", r"line 1: must be a JSON object, got \[1\]"),
        (LINE.replace('"num_tokens": 2', '"num_tokens": 3'), "top_indices has 2 tokens, num_tokens says 3"),
        (LINE.replace('"topk": 2', '"topk": 1'), r"top_indices\[0\] has 2 picks, topk says 1"),
        (LINE.replace("[2, 1]", "[2, -2]"), r"top_indices\[1\] names expert -2"),
        (LINE.replace('"layer": 3', '"layer": "3"'), "line 1: layer: "),
        (LINE.replace('"layer": 3, ', ""), "line 1: layer: Field required"),
        (LINE.replace('"rank"', '"ranks"'), "line 1: ranks?: "),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_field(line: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        list(read_lines([line]))


def test_loads_are_counted_by_step_layer_and_source() -> None:
    trace = Trace.of(
        [record(0, 0, 0, (0, 1)), record(0, 0, 1, (1, 2)), record(1, 0, 1, (1, 2)), record(1, 4, 0, (2, 0))]
    )
    assert trace.layers == (("decoder", -1, 0), ("decoder", -1, 4))
    assert trace.load_of_steps().tolist() == [[[1, 2, 1], [0, 0, 0]], [[0, 1, 1], [1, 0, 1]]]
    assert trace.load_of_sources(2)[1].tolist() == [[0, 2, 2], [0, 0, 0]]


def test_a_rank_without_tokens_adds_nothing_to_the_load_of_its_step() -> None:
    trace = Trace.of([record(0, 0, 0), record(0, 0, 1, (0, 1))])
    assert trace.load_of_steps().tolist() == [[[1, 1]]]


def test_experts_chosen_by_the_same_token_are_counted_together() -> None:
    together = Trace.of([record(0, 0, 0, (0, 1), (1, 2), (0, 1))]).chosen_together()[0]
    assert together.tolist() == [[2, 2, 0], [2, 3, 1], [0, 1, 1]]


def test_picks_that_nobody_takes_count_nowhere() -> None:
    trace = Trace.of([record(0, 0, 0, (0, 1), (1, -1), (-1, -1))])
    assert trace.load_of_steps().tolist() == [[[1, 2]]]
    assert trace.chosen_together()[0].tolist() == [[1, 1], [1, 2]]


def test_an_expert_or_a_rank_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"names expert 2, the model has experts 0\.\.1"):
        Trace.of([record(0, 0, 0, (0, 2))], num_experts=2)
    with pytest.raises(InvalidInput, match=r"names rank 3, there are ranks 0\.\.1"):
        Trace.of([record(0, 0, 3, (0, 1))]).load_of_sources(2)
    with pytest.raises(InvalidInput, match="at least one record"):
        Trace.of([])


def test_an_expert_beyond_any_model_is_refused_before_arrays_are_made_for_it() -> None:
    with pytest.raises(InvalidInput, match=f"names expert {10**12}, models have up to 4096"):
        Trace.of([record(0, 0, 0, (0, 10**12))])
