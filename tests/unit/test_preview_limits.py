"""What `moerator plan` plans for a load stays within what the resource promises and allows, as in the operator."""

import pytest

from moe_core.contract.trace import TraceRecord
from moe_core.experts.trace import Trace
from moe_core.facts import Facts
from moe_core.preview.outlook import Outlook, look_ahead
from simcluster import make, service_spec

HOT = Trace.of(
    [
        TraceRecord(
            step=0, layer=layer, rank=0, num_tokens=400, topk=2, top_indices=[[3, token % 3] for token in range(400)]
        )
        for layer in range(4)
    ]
)


def planned_for(experts: dict[str, object]) -> Outlook:
    found = look_ahead(make("MoEService", {**service_spec(), "experts": experts}).wish, Facts(), trace=HOT)
    assert isinstance(found, Outlook), found
    return found


@pytest.mark.parametrize("percent", [0, 5, 100])
def test_no_more_slots_move_than_the_resource_allows(percent: int) -> None:
    found = planned_for({"redundantPerRank": 2, "rebalance": {"maxMovedPercent": percent}})
    assert found.planned is not None
    assert found.planned.moves <= percent * 24 * 4 // 100


def test_as_many_slots_move_as_pay_where_the_resource_allows_it() -> None:
    found = planned_for({"redundantPerRank": 2, "rebalance": {"maxMovedPercent": 100}})
    assert found.planned is not None
    assert found.planned.moves > 5 * 24 * 4 // 100


def test_promised_copies_are_kept() -> None:
    found = planned_for({"redundantPerRank": 5, "minCopies": 2, "rebalance": {"maxMovedPercent": 100}})
    assert found.planned is not None
    assert min(row.count(expert) for row in found.planned.logical_of_slot for expert in range(16)) == 2


def test_ranks_without_slots_are_no_part_of_the_mean() -> None:
    spec = service_spec(ranks=6, redundant=0, model={"path": "/model", "numExperts": 4, "numMoeLayers": 4})
    found = look_ahead(make("MoEService", spec).wish, Facts())
    assert isinstance(found, Outlook), found
    assert (found.balance.balancedness, found.bound) == (1.0, 1.0)
