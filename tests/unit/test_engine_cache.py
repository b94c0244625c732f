"""The slot cache: rows at their own lengths, padding that leaves no trace, steps that can be thrown away."""

import pytest
import torch

from moe_core.outcome import InvalidInput
from moe_runtime.engine.attention import attention_masks
from moe_runtime.engine.cache import OwnStateCache, SlotKVCache


def keys(value: float, *, rows: int, queries: int) -> torch.Tensor:
    return torch.full((rows, 1, queries, 2), value)


def write(cache: SlotKVCache, rows: list[int], positions: list[list[int]], value: float) -> torch.Tensor:
    positions_BQ = torch.tensor(positions)
    cache.begin(rows, positions_BQ)
    states = keys(value, rows=len(rows), queries=positions_BQ.shape[1])
    seen: torch.Tensor = cache.update(states, states, 0)[0]
    return seen


def new_cache() -> SlotKVCache:
    return SlotKVCache(num_layers=1, num_rows=3, max_length=8)


def test_rows_grow_only_when_the_step_commits() -> None:
    cache = new_cache()
    write(cache, [0, 2], [[0, 1, 2], [0, 1, -1]], 1.0)
    assert cache.lengths == [0, 0, 0]
    cache.commit()
    assert cache.lengths == [3, 0, 2]


def test_a_repeated_step_overwrites_what_the_failed_one_wrote() -> None:
    cache = new_cache()
    write(cache, [1], [[0, 1]], 1.0)
    cache.commit()
    write(cache, [1], [[2, 3]], 9.0)
    cache.rollback()
    assert cache.lengths[1] == 2
    seen = write(cache, [1], [[2, -1]], 2.0)
    assert seen[0, 0, :, 0].tolist() == [1.0, 1.0, 2.0]


def test_padding_is_written_where_no_query_looks() -> None:
    cache = new_cache()
    write(cache, [0], [[0, 1]], 1.0)
    cache.commit()
    seen = write(cache, [0], [[-1, 2]], 5.0)
    assert seen[0, 0, :, 0].tolist() == [1.0, 1.0, 5.0]


def test_rows_out_of_order_are_read_in_the_steps_order() -> None:
    cache = new_cache()
    write(cache, [2], [[0]], 2.0)
    write(cache, [0], [[0]], 7.0)
    seen = write(cache, [2, 0], [[0], [0]], 0.0)
    assert seen.shape == (2, 1, 1, 2)
    assert cache.layers[0].keys[2, 0, 0, 0] == 0.0


@pytest.mark.parametrize("positions", [[[8]], [[1]], [[0, 9]]], ids=["past_the_end", "hole", "last_past_the_end"])
def test_positions_that_leave_a_hole_or_the_row_are_refused(positions: list[list[int]]) -> None:
    with pytest.raises(InvalidInput, match="row 0 holds 0 of 8 tokens"):
        new_cache().begin([0], torch.tensor(positions))


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"row must be 0\.\.2, got 3"):
        new_cache().begin([3], torch.tensor([[0]]))


def test_a_freed_row_starts_anew() -> None:
    cache = new_cache()
    write(cache, [0], [[0, 1, 2]], 1.0)
    cache.commit()
    cache.free(0)
    assert write(cache, [0], [[0]], 4.0)[0, 0, :, 0].tolist() == [4.0]


def test_masks_follow_each_rows_own_position_and_window() -> None:
    cache = new_cache()
    cache.lengths = [5, 0, 2]
    cache.begin([0, 2], torch.tensor([[5], [2]]))
    masks = attention_masks(cache, {"full_attention": None, "sliding_attention": 3}, additive=None)
    assert isinstance(masks, dict)
    assert masks["full_attention"].int()[:, 0, 0].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert masks["sliding_attention"].int()[:, 0, 0].tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]


def test_an_additive_mask_is_zero_where_seen() -> None:
    cache = new_cache()
    cache.begin([0], torch.tensor([[0, 1]]))
    mask = attention_masks(cache, {"full_attention": None}, additive=torch.float32)
    assert isinstance(mask, torch.Tensor)
    assert mask[0, 0, 0, 0] == 0.0
    assert mask[0, 0, 0, 1] == torch.finfo(torch.float32).min


def test_an_idle_rank_writes_into_the_spare_row_only() -> None:
    cache = new_cache()
    write(cache, [0], [[0]], 1.0)
    cache.commit()
    cache.begin_idle("cpu")
    cache.update(keys(3.0, rows=1, queries=1), keys(3.0, rows=1, queries=1), 0)
    cache.commit()
    assert cache.lengths == [1, 0, 0]
    assert cache.layers[0].keys[:3, 0, 0, 0].tolist() == [1.0, 0.0, 0.0]


def own_state_step(cache: OwnStateCache, row: int, positions: list[int]) -> list[int]:
    """A family whose state is the positions that it has read."""
    cache.begin([row], torch.tensor([positions]))
    state = cache.take(row, first_position=positions[0]) or []
    state += positions
    cache.put(row, state)
    return list(state)


def test_a_familys_own_state_is_kept_by_a_commit_and_untouched_by_a_rollback() -> None:
    cache = OwnStateCache(num_rows=2, max_length=8)
    own_state_step(cache, 1, [0, 1])
    cache.commit()
    assert own_state_step(cache, 1, [2]) == [0, 1, 2]
    cache.rollback()
    assert cache.lengths == [0, 2]
    assert own_state_step(cache, 1, [2, 3]) == [0, 1, 2, 3]
    cache.commit()
    assert cache.lengths == [0, 4]


def test_a_freed_row_takes_no_state_of_the_sequence_before() -> None:
    cache = OwnStateCache(num_rows=1, max_length=8)
    own_state_step(cache, 0, [0, 1])
    cache.commit()
    cache.free(0)
    assert own_state_step(cache, 0, [0]) == [0]


def test_state_that_cannot_be_cropped_cannot_go_back() -> None:
    cache = OwnStateCache(num_rows=1, max_length=8)
    own_state_step(cache, 0, [0, 1, 2])
    cache.commit()
    with pytest.raises(InvalidInput, match="row 0 holds 3 tokens and cannot go back to position 1"):
        cache.begin([0], torch.tensor([[1]]))
