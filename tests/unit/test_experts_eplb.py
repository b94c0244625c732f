"""DeepSeek's published example, to the digit."""

import numpy as np
import pytest

from moe_core.experts.eplb import rebalance_experts
from moe_core.outcome import InvalidInput

# https://github.com/deepseek-ai/EPLB, README: two layers, 12 experts, 16 slots, 4 groups, 2 nodes, 8 GPUs
README_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example_of_eplb_comes_out_to_the_digit() -> None:
    phy2log, log2phy, logcnt = rebalance_experts(
        np.array(README_LOAD), num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8
    )
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert logcnt.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    for layer in range(2):
        for logical in range(12):
            slots = [int(s) for s in log2phy[layer, logical] if s >= 0]
            assert len(slots) == logcnt[layer, logical]
            assert all(phy2log[layer, s] == logical for s in slots)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_replicas": 8}, "num_replicas must hold every expert: 8 slots for 12 experts"),
        ({"num_replicas": 15}, "num_replicas must be a multiple of num_gpus: 15 over 8"),
        ({"num_groups": 10, "num_nodes": 2}, "experts must divide into num_groups: 12 over 10"),
        ({"num_gpus": 0}, "num_gpus must be at least 1"),
    ],
)
def test_what_eplb_would_assert_is_refused_with_its_numbers(arguments: dict[str, int], named: str) -> None:
    given = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8} | arguments
    with pytest.raises(InvalidInput) as caught:
        rebalance_experts(README_LOAD, **given)
    assert named.split(" must", maxsplit=1)[0] in str(caught.value)
