"""Rows on the wire: what they weigh, what they lose, and that a lost number stays seen."""

import pytest
import torch

from moe_core.contract.dispatch import Wire, goes_by_node, gradient_wire, row_bytes, rows_between_nodes
from moe_runtime.dispatch.by_node import Relay
from moe_runtime.dispatch.wire import Leg, WireError, bytes_of_row, decode, encode

CODED: tuple[Wire, ...] = ("BFloat16", "Float8", "Int8")
WIRES: tuple[Wire, ...] = ("Float32", *CODED)
ROWS = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50).unsqueeze(1)


def through(rows: torch.Tensor, wire: Wire) -> torch.Tensor:
    return decode(encode(rows, wire), wire, dtype=rows.dtype)


@pytest.mark.parametrize("wire", WIRES)
def test_a_row_weighs_what_the_planner_counts(wire: Wire) -> None:
    assert encode(ROWS, wire).shape == (50, row_bytes(wire, 32))
    assert bytes_of_row(ROWS, wire) == row_bytes(wire, 32)


def test_float32_loses_nothing() -> None:
    assert torch.equal(through(ROWS, "Float32"), ROWS)


@pytest.mark.parametrize(("wire", "most"), [("BFloat16", 2**-8), ("Float8", 2**-4), ("Int8", 0.5 / 127)])
def test_no_number_is_further_off_than_its_format_allows(wire: Wire, most: float) -> None:
    """Floats: half of the last bit of the number itself; whole numbers: half of a step of the row's largest."""
    whole = ROWS.abs().amax(dim=1, keepdim=True) if wire == "Int8" else ROWS.abs()
    least_of_float8 = ROWS.abs().amax(dim=1, keepdim=True) * 2**-10 / 448  # below the smallest that it has
    allowed = whole * most * 1.001 + (least_of_float8 if wire == "Float8" else 0)
    assert bool(((through(ROWS, wire) - ROWS).abs() <= allowed).all())


@pytest.mark.parametrize("wire", CODED)
def test_rows_of_zeros_and_no_rows_arrive_as_they_are(wire: Wire) -> None:
    assert torch.equal(through(torch.zeros(2, 8), wire), torch.zeros(2, 8))
    assert through(torch.zeros(0, 8), wire).shape == (0, 8)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dim", [1, 3, 6])
def test_a_single_row_of_any_length_arrives_with_what_goes_with_it(wire: Wire, dim: int) -> None:
    row_1D, weight_1K, address_1K = ROWS[:1, :dim], torch.rand(1, 2), torch.tensor([[3, 4]], dtype=torch.int32)
    packed_1B = Leg(wire=wire).pack(row_1D, weight_1K, address_1K)
    beside = ((torch.float32, 2), (torch.int32, 2))
    arrived_1D, *others = Leg(wire=wire).unpack(packed_1B, dtype=torch.float32, beside=beside)
    assert torch.equal(arrived_1D, through(row_1D.repeat(2, 1), wire)[:1])
    assert [torch.equal(*pair) for pair in zip(others, (weight_1K, address_1K), strict=True)] == [True, True]


@pytest.mark.parametrize("wire", CODED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_holds_no_number_arrives_as_one_that_holds_none(wire: Wire, bad: float) -> None:
    rows = torch.ones(2, 8)
    rows[1, 3] = bad
    arrived = through(rows, wire)
    assert torch.isfinite(arrived[0]).all()
    assert not torch.isfinite(arrived[1]).all()


@pytest.mark.parametrize("wire", CODED)
def test_passing_a_row_on_loses_next_to_nothing_more(wire: Wire) -> None:
    once = through(ROWS, wire)
    assert torch.allclose(through(once, wire), once, rtol=1e-5, atol=0)


def test_gradients_keep_the_range_of_float32() -> None:
    assert [gradient_wire(wire) for wire in WIRES] == ["Float32", "BFloat16", "BFloat16", "BFloat16"]


def test_the_error_is_that_of_the_rows_that_were_sent_since_it_was_last_taken() -> None:
    error = WireError()
    error.note("dispatch", ROWS, "Int8")
    error.note("combine", ROWS, "Float32")
    lost = (through(ROWS, "Int8") - ROWS).norm() / ROWS.norm()
    assert error.take() == {"dispatch": pytest.approx(float(lost), rel=1e-4)}
    assert error.take() == {}


def test_a_sample_of_many_rows_says_what_all_of_them_lose() -> None:
    rows = torch.randn(5000, 16, generator=torch.Generator().manual_seed(1))
    error = WireError()
    error.note("combine", rows, "Float8")
    assert error.take()["combine"] == pytest.approx(
        float((through(rows, "Float8") - rows).norm() / rows.norm()), rel=0.1
    )


def test_auto_goes_by_node_where_tokens_have_several_picks_in_a_node() -> None:
    two_nodes = ["a"] * 4 + ["b"] * 4
    assert goes_by_node("Auto", two_nodes, top_k=8)
    assert not goes_by_node("Auto", two_nodes, top_k=1)
    assert not goes_by_node("Auto", ["a"] * 8, top_k=8)
    assert not goes_by_node("Auto", None, top_k=8)
    assert rows_between_nodes(two_nodes, top_k=8, by_node=True) < 1


def test_what_is_asked_for_is_done_where_nodes_are_known() -> None:
    assert goes_by_node("ByNode", ["a", "a"], top_k=1)
    assert not goes_by_node("ByNode", None, top_k=8)
    assert not goes_by_node("Flat", ["a", "b"], top_k=8)


def test_sources_are_dealt_over_the_gates_of_a_node_in_turn() -> None:
    """Ranks 0..3 on a, 4 and 5 on b."""
    gates = Relay.of("aaaabb", position=0).gate_RG.tolist()
    assert [of_rank[1] for of_rank in gates[:4]] == [4, 5, 4, 5]
    assert [of_rank[0] for of_rank in gates[4:]] == [0, 1]
    assert [of_rank[0] for of_rank in gates[:4]] == [0, 1, 2, 3]
