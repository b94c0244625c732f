"""The communication budget against bytes counted by hand."""

import numpy as np
import pytest

from moe_core.contract.dispatch import Wire
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.relayed import traffic_by_node
from moe_core.experts.traffic import StepShape, picks_between, traffic_by_pick, traffic_by_token
from moe_core.outcome import InvalidInput

# rank 0 | rank 1 | rank 2: expert 0 is on ranks 0 and 1, the others have one copy
MAP = ExpertMap(generation=1, num_logical_experts=4, slots_of_rank=(2, 2, 1), logical_of_slot=((0, 1, 0, 2, 3),))
LOAD = [[4, 2, 1, 1]]
SHAPE = StepShape(tokens_per_rank=10, hidden_size=8, top_k=2)


def test_a_source_with_a_copy_keeps_its_picks_and_the_others_send_them() -> None:
    picks_RR = picks_between(MAP, LOAD, SHAPE)[0]
    # 20 picks a rank: 10 to expert 0, 5 to expert 1, 2.5 each to experts 2 and 3
    assert picks_RR[0].tolist() == [15.0, 2.5, 2.5]
    assert picks_RR[1].tolist() == [5.0, 12.5, 2.5]
    assert picks_RR[2, 2] == 2.5
    assert picks_RR.sum(1).tolist() == [20.0, 20.0, 20.0]


def test_by_pick_rows_travel_there_and_back_and_counts_before_them() -> None:
    traffic = traffic_by_pick(MAP, LOAD, SHAPE)
    assert traffic.dispatch_RR[0, 1] == 2.5 * 8 * 4 + 2 * 8
    assert traffic.combine_RR[1, 0] == 2.5 * 8 * 4
    assert traffic.sent_bytes == pytest.approx((60 - 15 - 12.5 - 2.5) * 32 * 2 + 6 * 16)


def test_a_step_that_trains_sends_its_gradients_the_same_ways_and_no_more_counts() -> None:
    forward, both = traffic_by_pick(MAP, LOAD, SHAPE), traffic_by_pick(MAP, LOAD, SHAPE, trains=True)
    np.testing.assert_allclose(both.combine_RR, 2 * forward.combine_RR)
    assert both.dispatch_RR[0, 1] == 2 * 2.5 * 8 * 4 + 2 * 8


def test_a_rank_that_is_alone_exchanges_nothing() -> None:
    alone = ExpertMap(generation=1, num_logical_experts=2, slots_of_rank=(2, 0), logical_of_slot=((0, 1),))
    for traffic in (traffic_by_pick(alone, [[1, 1]], SHAPE), traffic_by_token(alone, SHAPE)):
        assert not traffic.total_RR.any()


def test_by_token_every_rank_gets_every_token_whatever_the_load() -> None:
    traffic = traffic_by_token(MAP, SHAPE)
    assert traffic.dispatch_RR[0, 2] == 10 * (8 * 4 + 2 * 8)
    assert traffic.combine_RR[2, 0] == 10 * 8 * 4


def test_each_source_may_have_a_load_of_its_own() -> None:
    load_RLE = np.asarray([[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 0, 0]]])
    picks_RR = picks_between(MAP, load_RLE, SHAPE)[0]
    assert picks_RR.tolist()[:2] == [[20.0, 0.0, 0.0], [20.0, 0.0, 0.0]]
    assert picks_RR[2, 2] == 5.0  # without load: even
    with pytest.raises(InvalidInput, match="load must be that of 3 source ranks, got 2"):
        picks_between(MAP, load_RLE[:2], SHAPE)


@pytest.mark.parametrize("tokens", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_of_no_tokens_is_refused(tokens: float) -> None:
    with pytest.raises(InvalidInput, match="tokens_per_rank must be a positive number"):
        StepShape(tokens_per_rank=tokens, hidden_size=8, top_k=2)


def test_a_layer_without_load_counts_as_even() -> None:
    np.testing.assert_allclose(picks_between(MAP, [[0, 0, 0, 0]], SHAPE), picks_between(MAP, [[7, 7, 7, 7]], SHAPE))


def test_bytes_are_told_by_the_narrowest_level_that_holds_both_ends() -> None:
    traffic = traffic_by_token(MAP, SHAPE)
    pair = float(traffic.dispatch_RR[0, 1] + traffic.combine_RR[0, 1])
    paths = [("r0", "h0"), ("r0", "h0"), ("r0", "h1")]
    assert traffic.by_scope(paths, ("rack", "host")) == {
        "rank": 3 * pair,
        "host": 2 * pair,
        "rack": 4 * pair,
        "across": 0.0,
    }
    # a host that bears the same name in another rack is another host
    paths = [("r0", "h0"), ("r1", "h0"), ("r1", "h0")]
    assert traffic.by_scope(paths, ("rack", "host"))["across"] == 4 * pair


def test_a_path_of_another_length_is_refused_by_rank() -> None:
    with pytest.raises(InvalidInput, match=r"path_of_rank\[1\] must name a domain of \['rack'\]"):
        traffic_by_token(MAP, SHAPE).by_scope([("r0",), (), ("r0",)], ("rack",))


@pytest.mark.parametrize(("wire", "row"), [("Float32", 32), ("BFloat16", 16), ("Float8", 8 + 4), ("Int8", 8 + 4)])
def test_rows_weigh_what_they_travel_as_and_gradients_no_less_than_sixteen_bits(wire: Wire, row: int) -> None:
    shape = StepShape(tokens_per_rank=10, hidden_size=8, top_k=2, wire=wire)
    gradient = 32 if wire == "Float32" else 16
    traffic = traffic_by_pick(MAP, LOAD, shape, trains=True)
    assert traffic.dispatch_RR[0, 1] == 2.5 * (row + 32) + 2 * 8  # results travel as they are, their gradients too
    assert traffic.combine_RR[1, 0] == 2.5 * (32 + gradient)


# 4 experts of equal load, one on each of ranks 0 and 1 of node a, two on rank 2 of node b
NODES_MAP = ExpertMap(generation=1, num_logical_experts=4, slots_of_rank=(1, 1, 2), logical_of_slot=((0, 1, 2, 3),))
EVEN = [[1, 1, 1, 1]]


def test_by_node_a_token_crosses_once_to_the_gate_and_is_passed_on_once_to_each_rank() -> None:
    traffic = traffic_by_node(NODES_MAP, EVEN, SHAPE, node_of_rank=("a", "a", "b"))
    there, back, counts = 8 * 4 + 2 * 8, 8 * 4, 16
    # two of four experts: 5 pairs of 6 have one on either node, 3 of 6 one of any two experts' ranks
    assert traffic.dispatch_RR[0, 2] == pytest.approx(10 * 5 / 6 * there + counts)
    assert traffic.combine_RR[2, 0] == pytest.approx(10 * 5 / 6 * back)
    # rank 2's tokens cross to rank 0, the gate of its first source, and half of them end on rank 1
    assert traffic.dispatch_RR[2, 0] == pytest.approx(10 * 5 / 6 * there + counts)
    assert traffic.dispatch_RR[2, 1] == counts
    assert traffic.dispatch_RR[0, 1] == pytest.approx((10 * 3 / 6 + 10 * 3 / 6) * there + counts)


def test_by_node_gradients_go_the_same_ways_with_those_of_the_weights() -> None:
    once, both = (
        traffic_by_node(NODES_MAP, EVEN, SHAPE, node_of_rank=("a", "a", "b"), trains=trains) for trains in (False, True)
    )
    rows = 10 * 5 / 6
    assert both.dispatch_RR[0, 2] - once.dispatch_RR[0, 2] == pytest.approx(rows * 8 * 4)
    assert both.combine_RR[2, 0] - once.combine_RR[2, 0] == pytest.approx(rows * (8 * 4 + 2 * 4))


def test_on_one_node_nothing_crosses_and_a_token_goes_to_a_rank_once() -> None:
    traffic = traffic_by_node(NODES_MAP, EVEN, SHAPE, node_of_rank=("a", "a", "a"))
    assert traffic.dispatch_RR[0, 2] == pytest.approx(10 * 5 / 6 * (8 * 4 + 2 * 8) + 16)
