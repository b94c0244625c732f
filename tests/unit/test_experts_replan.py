"""Replanning where it is plain what is best: speeds, a lost rank, links that cost, a load that is drawn again."""

import numpy as np
import pytest

from moe_core.experts.align import slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.replan import Prices, replan
from moe_core.outcome import InvalidInput

FREE = Prices()


def popular(num_layers: int = 4, num_experts: int = 256) -> tuple[FloatArray, FloatArray]:
    """Two draws of the same popularity."""
    rng = np.random.default_rng(0)
    chance = rng.lognormal(0, 1, (num_layers, num_experts))
    chance /= chance.sum(1, keepdims=True)
    first, second = (np.stack([rng.multinomial(524_288, row) for row in chance]).astype(float) for _ in range(2))
    return first, second


@pytest.mark.parametrize("rows", [[(0, 1, 2)], [(0, 1, 2, 3), (0, 1, 2)]])
def test_a_layer_of_another_length_is_named(rows: list[tuple[int, ...]]) -> None:
    with pytest.raises(InvalidInput, match=rf"current\[{len(rows) - 1}\] must have 4 slots, got 3"):
        slots_on_ranks(rows, Fleet((2, 2)), num_experts=4)


def test_copies_share_by_the_speed_of_their_ranks_and_nothing_moves() -> None:
    fleet = Fleet((1, 1), speed_of_rank=(1.0, 3.0))
    planned = replan(np.asarray([[100.0]]), fleet, [[0, 0]], prices=FREE)
    slow, fast = planned.share_of_slot[0]
    assert fast == pytest.approx(3 * slow, rel=1e-3)
    assert planned.moves == 0
    assert "no moves: other shares" in planned.reason


def test_even_shares_go_unsaid() -> None:
    planned = replan(np.asarray([[100.0]]), Fleet((1, 1)), [[0, 0]], prices=FREE)
    assert planned.share_of_slot == ()
    assert planned.reason == "stays: no other assignment is more even"


def test_an_empty_slot_of_a_layer_that_stays_has_no_share_beside_one_that_is_split() -> None:
    load = np.asarray([[0.0, 0.0], [1.0, 1.0]])
    planned = replan(load, Fleet((1, 3)), [[0, 0, 1, -1], [0, 0, 1, -1]], prices=FREE)
    assert [row[3] for row in planned.share_of_slot] == [0, 0]


def test_shares_that_were_given_are_what_staying_means() -> None:
    load = np.asarray([[100.0]])
    planned = replan(load, Fleet((1, 1)), [[0, 0]], prices=FREE, current_shares=[[3, 1]])
    assert planned.worst_before == (75.0,)
    assert planned.worst_after == (50.0,)
    assert planned.share_of_slot == ()


def test_a_hot_expert_whose_rank_is_lost_is_carried_by_those_that_are_left() -> None:
    load = np.asarray([[90.0, 10.0, 10.0, 10.0]])
    fleet = Fleet((0, 2, 2, 2))
    planned = replan(load, fleet, [[0, 1, 2, 3, 3, 2]], prices=FREE)
    assert planned.worst_before == (100.0,)
    assert planned.worst_after[0] == pytest.approx(40, rel=1e-3)
    assert planned.moves <= 3


def test_the_last_rank_keeps_everything() -> None:
    planned = replan(np.asarray([[5.0, 1.0]]), Fleet((0, 2, 0)), [[1, 0]], prices=FREE)
    assert planned.logical_of_slot == ((1, 0),)


def test_a_new_sample_of_the_same_load_is_met_with_few_moves() -> None:
    first, second = popular()
    fleet = Fleet.even(288, 32)
    start, best = pack_anew(first, fleet).rows(), pack_anew(second, fleet).load_LR.max(1)
    planned = replan(second, fleet, start, prices=Prices(most_moves=round(0.05 * 288 * len(first))))
    gain = np.asarray(planned.worst_before) - np.asarray(planned.worst_after)
    assert gain.sum() >= 0.95 * (np.asarray(planned.worst_before) - best).sum()


def test_without_a_move_new_shares_win_part_of_it() -> None:
    first, second = popular()
    fleet = Fleet.even(288, 32)
    planned = replan(second, fleet, pack_anew(first, fleet).rows(), prices=Prices(most_moves=0))
    assert planned.moves == 0
    assert planned.worst_after < planned.worst_before


def links(fleet: Fleet, seconds_per_byte: float) -> FloatArray:
    """Dear between domains, free within."""
    return np.asarray(fleet.domain_R[:, None] != fleet.domain_R[None, :]) * seconds_per_byte


def test_experts_go_where_they_are_asked_for_if_links_are_dear() -> None:
    fleet = Fleet.even(8, 4, num_domains=2)
    load, source = np.full((1, 8), 10.0), np.zeros((1, 8, 2))
    source[0, :4, 1] = source[0, 4:, 0] = 10  # each half is asked for by the other domain
    together = np.zeros((1, 8, 8))
    current = [list(range(8))]
    prices = Prices(seconds_per_pick=1e-6, bytes_per_pick=1000)
    near, far = (
        replan(
            load,
            fleet,
            current,
            prices=prices,
            links_RR=links(fleet, cost),
            together_LEE=together,
            from_LEG=source,
        )
        for cost in (1e-6, 0.0)
    )
    assert (near.crossed_before, near.crossed_after) == (80_000, 0)
    assert far.moves == 0


def test_dear_links_do_not_move_what_is_asked_for_alike_everywhere() -> None:
    fleet = Fleet.even(8, 4, num_domains=2)
    planned = replan(np.full((1, 8), 10.0), fleet, [list(range(8))], prices=FREE, links_RR=links(fleet, 1.0))
    assert planned.moves == 0
    assert planned.crossed_after == 40


def test_tables_of_another_shape_are_refused() -> None:
    load, fleet = np.ones((1, 2)), Fleet((1, 1))
    with pytest.raises(InvalidInput, match=r"links must have the shape \[2, 2\], got \[1, 1\]"):
        replan(load, fleet, [[0, 1]], prices=FREE, links_RR=np.zeros((1, 1)))
    with pytest.raises(InvalidInput, match=r"from must have the shape \[1, 2, 2\], got \[1, 2, 1\]"):
        replan(load, fleet, [[0, 1]], prices=FREE, from_LEG=np.zeros((1, 2, 1)))
    with pytest.raises(InvalidInput, match="shares must have 1 layers of 2 slots, got 2 of"):
        replan(load, fleet, [[0, 1]], prices=FREE, current_shares=[[1, 1], [1, 1]])
