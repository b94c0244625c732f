"""The communication budget against bytes counted by hand."""

import numpy as np
import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.traffic import StepShape, picks_between, traffic_by_pick, traffic_by_token
from moe_core.outcome import InvalidInput

# rank 0 | rank 1 | rank 2: expert 0 is on ranks 0 and 1, the others have one copy
MAP = ExpertMap(generation=1, num_logical_experts=4, slots_of_rank=(2, 2, 1), logical_of_slot=((0, 1, 0, 2, 3),))
LOAD = [[4, 2, 1, 1]]
SHAPE = StepShape(tokens_per_rank=10, hidden_size=8, top_k=2, bytes_per_number=4)


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
        StepShape(tokens_per_rank=tokens, hidden_size=8, top_k=2, bytes_per_number=4)


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
