"""A service grows, shrinks, and loses its lowest rank while it is small: answers stay token-exact through all of it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.serving_pods import Pods, in_force, spread_map, until
from moe_core.contract.exchange import RuntimeWish
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
PROMPT, NUM_TOKENS = "grow and shrink", 120


def shrunk_map() -> ExpertMap:
    """Two ranks again; rank 2 keeps its number and has no slot."""
    two = spread_map(2, generation=3)
    return two.model_copy(update={"slots_of_rank": (*two.slots_of_rank, 0)})


WISHES = {
    1: RuntimeWish(generation=1, ranks=(0, 1), expert_map=spread_map(2)),
    2: RuntimeWish(generation=2, ranks=(0, 1, 2), expert_map=spread_map(3, generation=2)),
    3: RuntimeWish(generation=3, ranks=(0, 1), expert_map=shrunk_map()),
}


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    folder: Path = tmp_path_factory.mktemp("resize")
    source = ModelSource(path=str(write_checkpoint(folder / "checkpoint")))
    with Pods(folder / "run", num_ranks=2, source=source) as pods:
        pods.start_all(gateways=1)
        pods.put_wish(WISHES[1])
        pods.wait_state("two ranks are active", lambda s: in_force(1, s), within_s=180)
        until("the gateway has ranks", pods.healthy, within_s=20)
        yield pods


@pytest.fixture(scope="module")
def expected(pods: Pods) -> str:
    return str(pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"])


def answers_until_in_force(pods: Pods, expected: str, generation: int) -> None:
    """Completions one after the other while the change comes: every one must be right."""
    answered = 0
    while True:
        assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected
        answered += 1
        state = pods.state()
        if state is not None and in_force(generation, state):
            break
        assert answered < 400, f"generation {generation} never came in force: {state}\n{pods.logs()}"
    assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected


def test_a_third_rank_joins_with_its_own_share_of_the_experts(pods: Pods, expected: str) -> None:
    pods.start("rank", "rank-2", rank=2)
    pods.put_wish(WISHES[2])
    answers_until_in_force(pods, expected, 2)
    state = pods.state()
    assert state is not None
    assert state.map_digest == WISHES[2].expert_map.digest
    assert [r.rank for r in state.ranks if r.phase == "Active"] == [0, 1, 2]


def test_the_third_rank_leaves_and_says_so_before_its_pod_may_go(pods: Pods, expected: str) -> None:
    pods.put_wish(WISHES[3])
    answers_until_in_force(pods, expected, 3)
    pods.wait_state("rank 2 has left", lambda s: [r.phase for r in s.ranks if r.rank == 2] == ["Left"], within_s=10)
    pods.pods["rank-2"].kill_whole()
    assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected


def test_half_without_the_lowest_rank_waits_until_its_death_is_vouched_for(pods: Pods, expected: str) -> None:
    lost = pods.pods["rank-0"]
    os.kill(lost.rank_pid, signal.SIGKILL)
    assert lost.process.wait(10) != 0
    wish = WISHES[3].model_copy(update={"dead_pod_uids": (lost.pod_uid,)})
    pods.put_wish(wish)
    state = pods.wait_state("rank 1 goes on alone", lambda s: bool(s.recoveries), within_s=40)
    assert state.recoveries[-1].lost_ranks == (0,)
    assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected
    pods.start("rank", "rank-0-1", rank=0)
    pods.wait_state("rank 0 is back", lambda s: in_force(3, s), within_s=180)
    assert pods.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"][0]["text"] == expected
