"""Packed experts from the custom resource: what ranks and people are told, what is refused, what they weigh."""

from typing import Any

import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.packing import Packing
from moe_core.decide.accept import Accepted, Refusal, accept
from moe_core.facts import Facts, ModelFact, Wish
from moe_core.preview.size import size_of_config
from simcluster import running, service_spec

INT4 = Packing.of("Int4", 32)


def accepted(expert_packing: dict[str, Any] | None, *, in_checkpoint: Packing | None = None) -> Accepted | Refusal:
    spec = service_spec()
    if expert_packing is not None:
        spec["model"]["expertPacking"] = expert_packing
    wish = Wish(kind="MoEService", namespace="d", name="tiny", uid="u", generation=1, spec=spec)
    return accept(wish, Facts(model=ModelFact(16, 4, "mixtral", packing=in_checkpoint)))


@pytest.mark.parametrize(
    ("asked", "packing"),
    [
        ({"precision": "Int4"}, Packing.of("Int4", 64)),
        ({"precision": "Int4", "groupSize": 32}, INT4),
        ({"precision": "Float8"}, Packing.of("Float8", 0)),
        ({"precision": "BFloat16"}, Packing.of("BFloat16")),
        (None, None),
    ],
)
def test_ranks_are_told_how_to_keep_experts(asked: dict[str, Any] | None, packing: Packing | None) -> None:
    found = accepted(asked)
    assert isinstance(found, Accepted)
    assert found.plan.config.model.packing == packing


def test_people_are_told_where_the_packing_comes_from() -> None:
    while_loading, in_checkpoint = accepted({"precision": "Int8"}), accepted(None, in_checkpoint=INT4)
    assert isinstance(while_loading, Accepted) and isinstance(in_checkpoint, Accepted)
    assert while_loading.note.endswith("; experts are packed as Int8 by row while they are loaded")
    assert in_checkpoint.note.endswith("; experts are packed as Int4 in groups of 32 in the checkpoint")


def test_the_packing_of_the_checkpoint_may_be_named_but_not_changed() -> None:
    assert isinstance(accepted({"precision": "Int4", "groupSize": 32}, in_checkpoint=INT4), Accepted)
    found = accepted({"precision": "Int8"}, in_checkpoint=INT4)
    assert isinstance(found, Refusal)
    assert found.message == (
        "spec.model.expertPacking: the checkpoint at /model is packed as Int4 in groups of 32 (got Int8 by row); "
        "give the one that it was packed from, or leave expertPacking out"
    )


def test_groups_without_scales_are_refused() -> None:
    found = accepted({"precision": "BFloat16", "groupSize": 32})
    assert isinstance(found, Refusal)
    assert "BFloat16 has no scales: leave groupSize out" in found.message


def test_what_ranks_hold_is_told_when_they_are_ready() -> None:
    sim = running()
    assert "experts are kept" not in sim.message("Ready")
    sim.expert_packing = str(INT4)
    sim.settle()
    assert sim.message("Ready").endswith("; experts are kept as Int4 in groups of 32, 1000 bytes each")


def test_packed_experts_weigh_what_their_codes_and_scales_do() -> None:
    config = {
        "hidden_size": 128,
        "moe_intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 256,
    }
    expert_map = ExpertMap(generation=0, num_logical_experts=2, slots_of_rank=(1, 1), logical_of_slot=((0, 1), (1, 0)))
    full, packed = size_of_config(config), size_of_config(config, packing=INT4)
    assert full.expert_bytes == 4 * 3 * 128 * 96
    # 4 bits a number and 2 bytes for each 32 of them
    assert packed.expert_bytes == 3 * 128 * 96 // 2 + 2 * 3 * 128 * 96 // 32
    saved = [a - b for a, b in zip(full.rank_bytes(expert_map), packed.rank_bytes(expert_map), strict=True)]
    assert saved == [2 * (full.expert_bytes - packed.expert_bytes)] * 2
