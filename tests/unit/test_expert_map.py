"""An ExpertMap as a value: equal by what it says, whatever was worked out of it."""

from moe_core.contract.expert_map import ExpertMap


def test_maps_are_equal_by_their_fields_though_arrays_were_made_of_both() -> None:
    one = ExpertMap(generation=1, num_logical_experts=3, slots_of_rank=(2, 2), logical_of_slot=((0, 1, 2, 0),))
    same, other = ExpertMap.parse(one.canonical()), one.model_copy(update={"generation": 2})
    for expert_map in (one, same, other):
        assert expert_map.share_LS.sum() == 4
    assert one == same
    assert one != other
    assert len({one, same, other}) == 2
