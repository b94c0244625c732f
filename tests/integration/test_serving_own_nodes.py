"""Pods as a cluster has them, each with a Ray node of its own; and a service that loses its only rank."""

from pathlib import Path

import pytest

from integration.serving_pods import Pods, spread_map, until
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.runtime_config import ModelSource
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
WISH = RuntimeWish(generation=1, ranks=(0,), expert_map=spread_map(1, copies=1))


def test_a_request_waits_until_the_only_rank_is_replaced_and_a_drill_may_injure_it(tmp_path: Path) -> None:
    def is_whole(state: RuntimeState) -> bool:
        return state.wish_generation == 1

    source = ModelSource(path=str(write_checkpoint(tmp_path / "checkpoint")))
    with Pods(tmp_path / "run", num_ranks=1, source=source, shared_ray=False) as pods:
        pods.start_all()
        pods.put_wish(WISH)
        first = pods.wait_state("the rank is active", is_whole, within_s=180)
        until("the gateway has a rank", pods.healthy, within_s=60)
        expected = pods.complete("alone", max_tokens=20)["choices"][0]["text"]

        rank = pods.pods["rank-0"]
        fault = f'{{"pod_uid": "{rank.pod_uid}", "fault": "kill"}}'
        assert pods.call("POST", "/v1/faults", fault)[0] == 202
        assert rank.process.wait(20) == 1
        assert "its process ended" in rank.log
        assert not rank.below(), "its Ray node ends with it"
        until("the gateway says it has no rank", lambda: not pods.healthy(), within_s=20)

        pods.start("rank", "rank-0-1", rank=0)
        answer = pods.complete("alone", max_tokens=20, timeout=150)
        assert answer["choices"][0]["text"] == expected
        assert pods.wait_state("whole again", is_whole, within_s=60).epoch > first.epoch
