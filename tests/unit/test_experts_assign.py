"""Assignment, its measures and what is left of it when ranks are lost."""

import math

import numpy as np
import pytest

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.assign import assign, even_slots
from moe_core.experts.degrade import Answer, degrade
from moe_core.experts.measure import balance, copies_of_logical, coverage
from moe_core.outcome import InvalidInput


def demo_map(policy: str = "linear") -> ExpertMap:
    """The demo's shape: 16 experts over 4 ranks, two redundant experts per rank."""
    return assign(policy, num_layers=4, num_logical_experts=16, slots_of_rank=(6, 6, 6, 6))  # type: ignore[arg-type]


def held_by(expert_map: ExpertMap, rank: int, layer_idx: int = 0) -> list[int]:
    return [expert_map.logical_of_slot[layer_idx][s] for s in expert_map.slot_range(rank)]


def test_without_copies_linear_deals_experts_in_order() -> None:
    expert_map = assign("linear", num_layers=1, num_logical_experts=5, slots_of_rank=(3, 2))
    assert expert_map.logical_of_slot == ((0, 1, 2, 3, 4),)


def test_without_load_every_rank_holds_copied_and_uncopied_experts() -> None:
    copies = copies_of_logical(demo_map())[0]
    for rank in range(4):
        of_rank = {int(copies[e]) for e in held_by(demo_map(), rank)}
        assert of_rank == {1, 2}, f"rank {rank} holds {held_by(demo_map(), rank)}"


@pytest.mark.parametrize("policy", ["linear", "deepseek"])
def test_an_empty_load_does_not_heap_the_spares_on_one_expert(policy: str) -> None:
    copies = copies_of_logical(demo_map(policy))
    assert copies.max() == 2
    with_zeros = assign(
        policy,  # type: ignore[arg-type]
        num_layers=4,
        num_logical_experts=16,
        slots_of_rank=(6, 6, 6, 6),
        load=np.zeros((4, 16)),
    )
    assert with_zeros == demo_map(policy)


@pytest.mark.parametrize("policy", ["linear", "deepseek"])
def test_the_hottest_expert_gets_the_copies(policy: str) -> None:
    load = np.ones((1, 8))
    load[0, 3] = 1000
    expert_map = assign(policy, num_layers=1, num_logical_experts=8, slots_of_rank=(3, 3, 3, 3), load=load)  # type: ignore[arg-type]
    assert copies_of_logical(expert_map)[0, 3] >= 4
    assert balance(expert_map, load).balancedness > 0.9


def test_slots_that_could_only_repeat_an_expert_on_its_rank_stay_empty() -> None:
    expert_map = assign("linear", num_layers=1, num_logical_experts=2, slots_of_rank=(4,))
    assert expert_map.logical_of_slot == ((0, 1, EMPTY_SLOT, EMPTY_SLOT),)


def test_a_rank_that_left_has_no_slots_and_keeps_its_number() -> None:
    for policy in ("linear", "deepseek"):
        expert_map = assign(policy, num_layers=1, num_logical_experts=4, slots_of_rank=(2, 0, 2))
        assert held_by(expert_map, 1) == []
        assert sorted(held_by(expert_map, 0) + held_by(expert_map, 2)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"slots_of_rank": (2, 1)}, "3 slots for 4 experts"),
        ({"slots_of_rank": ()}, "at least one rank"),
        ({"slots_of_rank": (5, -1)}, "slots_of_rank[1] must not be negative, got -1"),
        ({"load": [[1, 2, 3]]}, "[1, 4], got [1, 3]"),
        ({"load": [[1, math.nan, 3, 4]]}, "load[0][1] must be finite and not negative, got nan"),
        ({"load": [[1, 2, -3, 4]]}, "load[0][2] must be finite and not negative, got -3"),
        ({"load": [[1, 2, 3, math.inf]]}, "got inf"),
        ({"load": [1, 2, 3, 4]}, "shape [layers, experts], got [4]"),
        ({"load": [[1, 2], [3]]}, "rectangle"),
        ({"policy": "Linear"}, "got 'Linear'"),
        ({"policy": "deepseek", "slots_of_rank": (3, 2)}, "equal for policy deepseek, got [3, 2]"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(bad: dict[str, object], named: str) -> None:
    given: dict[str, object] = {"policy": "linear", "num_layers": 1, "num_logical_experts": 4, "slots_of_rank": (2, 2)}
    given |= bad
    policy = given.pop("policy")
    with pytest.raises(InvalidInput) as caught:
        assign(policy, **given)  # type: ignore[arg-type]
    assert named in str(caught.value)


def test_the_three_balance_numbers_differ_as_defined() -> None:
    expert_map = assign("linear", num_layers=2, num_logical_experts=2, slots_of_rank=(1, 1))
    numbers = balance(expert_map, [[10, 10], [300, 100]])
    assert numbers.balancedness == pytest.approx((1 + 200 / 300) / 2)
    assert numbers.balancedness_min == pytest.approx(200 / 300)
    assert numbers.balancedness_tokens == pytest.approx((10 + 200) / (10 + 300))


def test_a_lost_rank_leaves_copies_where_there_are_any_and_generalists_elsewhere() -> None:
    expert_map = demo_map()
    answers = degrade(expert_map, [0, 1, 3])
    copies = copies_of_logical(expert_map)[0]
    for logical in held_by(expert_map, 2):
        wanted = Answer.COPY if copies[logical] > 1 else Answer.GENERALIST
        assert answers.answer_LE[0, logical] == wanted
    assert coverage(expert_map, [0, 1, 3]).covered == 64 - answers.num_lost
    assert coverage(expert_map, range(4)).is_full


def test_without_a_calibrated_generalist_the_expert_is_dropped() -> None:
    has = np.ones((4, 16), dtype=bool)
    lost = np.flatnonzero(degrade(demo_map(), [0, 1, 3]).copies_LE[0] == 0)
    has[0, lost[0]] = False
    answers = degrade(demo_map(), [0, 1, 3], has_generalist_LE=has)
    assert answers.answer_LE[0, lost[0]] == Answer.DROP
    assert answers.answer_LE[0, lost[1]] == Answer.GENERALIST


def test_refuse_says_so_for_every_lost_expert() -> None:
    answers = degrade(demo_map(), [0], fallback="Refuse")
    assert set(answers.answer_LE[answers.copies_LE == 0].tolist()) == {int(Answer.REFUSE)}


def test_uneven_shares_go_to_the_first_ranks() -> None:
    assert even_slots(10, 4, redundant_per_rank=1) == (4, 4, 3, 3)
