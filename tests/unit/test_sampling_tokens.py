"""Sampling: the same on every rank, and what temperature and top_p promise."""

from collections import Counter

import pytest
import torch

from moe_runtime.engine.sampling import NoNumbers, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def draw(position: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 3) -> int:
    return sample(LOGITS, temperature=temperature, top_p=top_p, seed=seed, position=position)


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    assert sample(torch.tensor([1.0, 5.0, 5.0]), temperature=0.0, top_p=1.0, seed=1, position=0) == 1


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    assert [draw(p) for p in range(50)] == [draw(p) for p in range(50)]
    assert [draw(p) for p in range(50)] != [draw(p, seed=4) for p in range(50)]


def test_draws_follow_the_probabilities() -> None:
    counts = Counter(draw(position) for position in range(4000))
    expected = torch.softmax(LOGITS, dim=-1)
    for token_id, probability in enumerate(expected.tolist()):
        assert counts[token_id] / 4000 == pytest.approx(probability, abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert {draw(p, top_p=0.7) for p in range(300)} == {0, 1}
    assert {draw(p, top_p=0.0) for p in range(300)} == {0}


def test_uniform_numbers_stay_below_one_and_spread() -> None:
    numbers = [uniform(7, position) for position in range(2000)]
    assert min(numbers) >= 0.0 and max(numbers) < 1.0
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_no_token(broken: float, temperature: float) -> None:
    logits_V = LOGITS.clone()
    logits_V[2] = broken
    with pytest.raises(NoNumbers, match=f"the highest logit at position 9 is {broken}"):
        sample(logits_V, temperature=temperature, top_p=1.0, seed=1, position=9)


def test_tokens_may_be_excluded_but_not_all() -> None:
    logits_V = torch.tensor([float("-inf"), 0.0, 0.0])
    assert {sample(logits_V, temperature=1.0, top_p=1.0, seed=1, position=p) for p in range(50)} == {1, 2}
    with pytest.raises(NoNumbers, match="is -inf"):
        sample(logits_V[:1], temperature=0.0, top_p=1.0, seed=1, position=0)


def test_the_smallest_temperature_is_greedy() -> None:
    assert {draw(position, temperature=5e-324) for position in range(50)} == {0}
