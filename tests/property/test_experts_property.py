"""What holds for every assignment."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.experts.assign import assign
from moe_core.experts.measure import copies_of_logical


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    num_logical = draw(st.integers(1, 12))
    slots = draw(st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(lambda s: sum(s) >= num_logical))
    return num_logical, tuple(slots)


@st.composite
def loads(draw: st.DrawFn, num_logical: int) -> list[list[int]] | None:
    row = st.lists(st.integers(0, 1000), min_size=num_logical, max_size=num_logical)
    return draw(st.none() | st.lists(row, min_size=2, max_size=2))


def ranks_of(expert_map: ExpertMap, layer_idx: int, logical: int) -> list[int]:
    return [expert_map.rank_of_slot[s] for s in expert_map.slots_of_logical(layer_idx)[logical]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_linear_covers_every_expert_and_never_repeats_one_on_a_rank(data: st.DataObject) -> None:
    num_logical, slots = data.draw(shapes())
    load = data.draw(loads(num_logical))
    expert_map = assign("linear", num_layers=2, num_logical_experts=num_logical, slots_of_rank=slots, load=load)
    for layer_idx in range(2):
        for logical in range(num_logical):
            ranks = ranks_of(expert_map, layer_idx, logical)
            assert ranks
            if all(count <= num_logical for count in slots):
                assert len(ranks) == len(set(ranks))


@settings(max_examples=150, deadline=None)
@given(shapes())
def test_linear_without_load_leaves_a_slot_empty_only_when_no_expert_could_use_it(
    shape: tuple[int, tuple[int, ...]],
) -> None:
    num_logical, slots = shape
    expert_map = assign("linear", num_layers=1, num_logical_experts=num_logical, slots_of_rank=slots)
    filled = sum(1 for e in expert_map.logical_of_slot[0] if e != EMPTY_SLOT)
    assert filled == sum(min(count, num_logical) for count in slots)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6))
def test_linear_with_equal_slots_gives_copies_that_differ_by_at_most_one(
    num_logical: int, num_ranks: int, extra: int
) -> None:
    per_rank = min(-(-num_logical // num_ranks) + extra, num_logical)
    expert_map = assign("linear", num_layers=1, num_logical_experts=num_logical, slots_of_rank=(per_rank,) * num_ranks)
    copies = copies_of_logical(expert_map)[0]
    assert copies.max() - copies.min() <= 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_deepseek_separates_copies_whenever_a_swap_can(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(2, 5))
    per_rank = data.draw(st.integers(1, 4))
    num_logical = data.draw(st.integers(max(per_rank, num_ranks * per_rank - 4), num_ranks * per_rank))
    load = data.draw(loads(num_logical))
    expert_map = assign(
        "deepseek", num_layers=2, num_logical_experts=num_logical, slots_of_rank=(per_rank,) * num_ranks, load=load
    )
    copies = copies_of_logical(expert_map)
    assert (copies >= 1).all()
    assert copies.sum() == 2 * num_ranks * per_rank
