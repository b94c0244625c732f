"""A map survives its objects: what is rendered is what is read, and nothing half written passes for a map."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_core.contract.expert_map import EMPTY_SLOT, MAX_SHARE, ExpertMap
from moe_core.manifests import map_slices
from moe_core.manifests.map_slices import MAX_SLICE_BYTES, map_of_mixed_slices, map_of_slices, slices_of
from moe_core.outcome import InvalidInput


@st.composite
def maps(draw: st.DrawFn, min_layers: int = 0) -> ExpertMap:
    num_logical = draw(st.integers(1, 5))
    slots_of_rank = draw(st.lists(st.integers(0, 3), max_size=4))
    num_layers, num_slots = draw(st.integers(min_layers, 6)), sum(slots_of_rank)

    def rows(values: st.SearchStrategy[int]) -> list[list[int]]:
        row = st.lists(values, min_size=num_slots, max_size=num_slots)
        return draw(st.lists(row, min_size=num_layers, max_size=num_layers))

    logical = rows(st.integers(EMPTY_SLOT, num_logical - 1))
    shares = rows(st.integers(0, MAX_SHARE)) if draw(st.booleans()) else []
    return ExpertMap.model_validate(
        {
            "generation": draw(st.integers(0, 3)),
            "num_logical_experts": num_logical,
            "slots_of_rank": slots_of_rank,
            "logical_of_slot": logical,
            "share_of_slot": [
                [share if expert != EMPTY_SLOT else 0 for share, expert in zip(*pair, strict=True)]
                for pair in zip(shares, logical, strict=False)
            ],
        }
    )


def written(expert_map: ExpertMap) -> list[dict[str, Any]]:
    return [
        part.model_dump(mode="json", by_alias=True, exclude_none=True) for part in slices_of(expert_map, policy="p")
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_map_is_read_back_from_its_slices_in_any_order(data: st.DataObject) -> None:
    expert_map = data.draw(maps())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_slices, "MAX_SLICE_BYTES", data.draw(st.integers(1, 300)))
        specs = data.draw(st.permutations(written(expert_map)))
    read = map_of_slices(specs)
    assert read == expert_map
    assert read is not None and read.digest == expert_map.digest


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_slice_that_is_missing_or_of_another_map_is_told(data: st.DataObject) -> None:
    before, after = data.draw(maps(min_layers=2)), data.draw(maps(min_layers=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_slices, "MAX_SLICE_BYTES", 1)
        old, new = written(before), written(after)
    at = data.draw(st.integers(0, len(new) - 1))
    with pytest.raises(InvalidInput):
        map_of_slices(new[:at] + new[at + 1 :])
    if at < len(old) and old[at] != new[at]:
        with pytest.raises(InvalidInput):
            map_of_slices([*new[:at], old[at], *new[at + 1 :]])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_map_that_was_half_written_over_another_keeps_each_layer_of_one_of_them(data: st.DataObject) -> None:
    before = data.draw(maps(min_layers=2))
    mirrored = tuple(row[::-1] for row in before.logical_of_slot)
    shares = data.draw(st.sampled_from([(), tuple(tuple(int(e >= 0) * 7 for e in row) for row in mirrored)]))
    after = before.model_copy(
        update={"logical_of_slot": mirrored, "share_of_slot": shares, "generation": before.generation + 1}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_slices, "MAX_SLICE_BYTES", 1)
        old, new = written(before), written(after)
    if before.digest == after.digest:
        return
    num_new = data.draw(st.integers(1, len(new) - 1))
    glued = map_of_mixed_slices(data.draw(st.permutations([*new[:num_new], *old[num_new:]])))
    assert glued.generation == after.generation + 1
    assert glued.logical_of_slot == after.logical_of_slot[:num_new] + before.logical_of_slot[num_new:]
    assert glued.share_LS.tolist() == [*after.share_LS[:num_new].tolist(), *before.share_LS[num_new:].tolist()]


@pytest.mark.parametrize("keep", [slice(0, 1), slice(1, 4)])
def test_layers_that_nothing_is_left_of_are_made_up_by_nobody(keep: slice) -> None:
    plain = ExpertMap(generation=3, num_logical_experts=2, slots_of_rank=(2,), logical_of_slot=((0, 1),) * 4)
    other = plain.model_copy(update={"logical_of_slot": ((1, 0),) * 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_slices, "MAX_SLICE_BYTES", 1)
        old, new = written(plain)[keep], written(other)[2:3]
    with pytest.raises(InvalidInput, match=r"layer \d is in no slice"):
        map_of_mixed_slices([*old, *new])


def test_an_edited_slice_that_begins_far_beyond_any_model_is_refused_at_once() -> None:
    plain = ExpertMap(generation=3, num_logical_experts=2, slots_of_rank=(2,), logical_of_slot=((0, 1),) * 2)
    other = plain.model_copy(update={"logical_of_slot": ((1, 0),) * 2})
    far = [{**spec, "firstLayer": 10**15} for spec in written(other)]
    with pytest.raises(InvalidInput, match="layer 2 is in no slice"):
        map_of_mixed_slices([*written(plain), *far])


@settings(max_examples=50, deadline=None)
@given(maps())
def test_what_goes_over_the_wire_is_the_same_map(expert_map: ExpertMap) -> None:
    assert ExpertMap.parse(expert_map.canonical()) == expert_map


def test_no_slices_are_no_map() -> None:
    assert map_of_slices([]) is None


def test_even_shares_that_go_unsaid_leave_the_digest_as_it_was_before_there_were_shares() -> None:
    plain = ExpertMap(generation=3, num_logical_experts=2, slots_of_rank=(1, 1), logical_of_slot=((0, 1),))
    assert plain.digest == "72d1fe9d85ed678c"
    assert plain.model_copy(update={"share_of_slot": ((1, 1),)}).digest != "72d1fe9d85ed678c"


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (((1, 1, 0), (1, 1, 0)), "has 2 layers, logical_of_slot 1"),
        (((1, 1),), "has 2 slots, ranks own 3"),
        (((1, -1, 0),), r"\[0\]\[1\] must be in 0..1000000, got -1"),
        (((1, 1, 1),), r"\[0\]\[2\] is 1, and the slot is empty"),
    ],
)
def test_shares_that_are_none_are_refused(shares: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ExpertMap(
            generation=0,
            num_logical_experts=2,
            slots_of_rank=(2, 1),
            logical_of_slot=((0, 1, EMPTY_SLOT),),
            share_of_slot=shares,
        )


def test_slices_with_shares_of_many_digits_fit_into_an_object_too() -> None:
    num_slots = 16_000
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=9_999,
        slots_of_rank=(num_slots,),
        logical_of_slot=((9_998,) * num_slots,) * 3,
        share_of_slot=((MAX_SHARE,) * num_slots,) * 3,
    )
    for spec in written(expert_map):
        assert len(json.dumps(spec, separators=(",", ":"))) < MAX_SLICE_BYTES * 1.25
