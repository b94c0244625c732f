"""Chances of coverage, against counting by hand."""

import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.survival import survival
from moe_core.outcome import InvalidInput


def placed(*ranks: tuple[int, ...], experts: int) -> ExpertMap:
    """One layer; each tuple is what a rank holds."""
    return ExpertMap(
        generation=1,
        num_logical_experts=experts,
        slots_of_rank=tuple(len(held) for held in ranks),
        logical_of_slot=(tuple(e for held in ranks for e in held),),
    )


def test_one_copy_each_survives_no_failure() -> None:
    assert survival(placed((0,), (1,), experts=2), failures=1).chance == 0.0
    assert survival(placed((0,), (1,), experts=2), failures=0).chance == 1.0


def test_pairs_of_ranks_that_hold_the_same_lose_only_with_the_pair() -> None:
    paired = placed((0, 1), (0, 1), (2, 3), (2, 3), experts=4)
    assert survival(paired, failures=1).chance == 1.0
    assert survival(paired, failures=2).chance == pytest.approx(4 / 6)
    scattered = placed((0, 1), (0, 2), (1, 3), (2, 3), experts=4)
    assert survival(scattered, failures=2).chance == pytest.approx(2 / 6)


def test_a_domain_that_holds_both_copies_fails_as_one() -> None:
    paired = placed((0, 1), (0, 1), (2, 3), (2, 3), experts=4)
    assert survival(paired, failures=1, unit_of_rank=(0, 0, 1, 1)).chance == 0.0
    assert survival(paired, failures=1, unit_of_rank=(0, 1, 0, 1)).chance == 1.0


def test_many_units_are_sampled_and_the_error_is_told() -> None:
    ranks = tuple((rank // 2,) for rank in range(200))
    found = survival(placed(*ranks, experts=100), failures=4)
    exact = 1 - 100 * (198 * 197 / 2) / (200 * 199 * 198 * 197 / 24)
    assert found.error > 0
    assert found.chance == pytest.approx(exact, abs=5 * found.error)


def test_more_failures_than_units_are_refused() -> None:
    with pytest.raises(InvalidInput, match="failures must be between 0 and the 2 units, got 3"):
        survival(placed((0,), (1,), experts=2), failures=3)
