"""A service of EP groups side by side gets one group more and one less: answers stay token-exact through both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.serving_pods import Pods, in_force, spread_map, until
from moe_core.contract.exchange import RuntimeWish
from moe_core.contract.runtime_config import DispatchConfig, ModelSource
from moe_core.experts.tiers import side_by_side
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
PROMPT, NUM_TOKENS = "one group more", 60


def wish(generation: int, num_groups: int) -> RuntimeWish:
    """Groups of one rank, which hold every expert."""
    expert_map = side_by_side(spread_map(1, copies=1, generation=generation), num_groups)
    return RuntimeWish(generation=generation, ranks=tuple(range(num_groups)), expert_map=expert_map)


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    folder: Path = tmp_path_factory.mktemp("groups")
    source = ModelSource(path=str(write_checkpoint(folder / "checkpoint")))
    with Pods(folder / "run", num_ranks=2, source=source, dispatch=DispatchConfig(group_ranks=1)) as pods:
        pods.start_all(gateways=1)
        pods.put_wish(wish(1, 2))
        pods.wait_state("two groups are active", lambda s: in_force(1, s), within_s=180)
        until("the gateway has ranks", pods.healthy, within_s=20)
        yield pods


def test_a_group_comes_and_goes_while_requests_are_answered(pods: Pods) -> None:
    expected = str(pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"])
    pods.start("rank", "rank-2", rank=2)
    for generation, num_groups in ((2, 3), (3, 2)):
        pods.put_wish(wish(generation, num_groups))
        for _ in range(400):
            assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected
            state = pods.state()
            if state is not None and in_force(generation, state):
                break
        assert state is not None
        assert [r.rank for r in state.ranks if r.phase == "Active"] == list(range(num_groups)), pods.logs()
        assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected
