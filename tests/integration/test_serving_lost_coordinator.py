"""The coordinator's pod is lost with its folder, and a rank with it, under requests: pods as a cluster has them.

Each has a Ray node of its own. The new coordinator's pod knows nothing: its head's store comes from the other pods.
"""

import shutil
import threading
import time
from pathlib import Path

import pytest

from integration.serving_pods import Pods, spread_map, until
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.host.head_store import label_of
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(290)]
WISH = RuntimeWish(generation=1, ranks=(0, 1, 2), expert_map=spread_map(3))
NUM_TOKENS = 120


def is_whole(state: RuntimeState) -> bool:
    return state.wish_generation == 1 and state.coverage is not None and state.coverage.is_full


class SteadyRequests:
    """Clients that ask one after the other until told to stop, and keep every answer."""

    def __init__(self, pods: Pods, prompt: str, *, clients: int) -> None:
        self._pods, self._prompt = pods, prompt
        self._stop = threading.Event()
        self.answers: list[str] = []
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._pods.complete(self._prompt, max_tokens=NUM_TOKENS, timeout=60)
                self.answers.append(answer["choices"][0]["text"])
            except OSError as error:
                self.errors.append(repr(error))

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)
            assert not thread.is_alive(), "a request never ended"


def copied(pods: Pods) -> bool:
    """Whether the coordinator has made a copy of its head's store."""
    status, body = pods.call("GET", "/v1/head-store?pod=test")
    return status == 200 and label_of(body).sequence > 0


def test_a_coordinators_pod_and_a_rank_lost_together_cost_no_request_and_no_other_pod(tmp_path: Path) -> None:
    source = ModelSource(path=str(write_checkpoint(tmp_path / "checkpoint")))
    with Pods(tmp_path / "run", num_ranks=3, source=source, shared_ray=False) as pods:
        pods.start_all()
        pods.put_wish(WISH)
        first = pods.wait_state("the ranks are active", is_whole, within_s=200)
        until("the gateway has ranks", pods.healthy, within_s=60)
        expected = pods.complete("lost", max_tokens=NUM_TOKENS)["choices"][0]["text"]
        until(
            "the head's store is copied and quiet", lambda: copied(pods) and copied(pods) == copied(pods), within_s=20
        )
        kept = {name: (pods.pods[name], pods.pods[name].below()) for name in ("rank-0", "rank-2", "gateway-0")}

        requests = SteadyRequests(pods, "lost", clients=3)
        until("requests are answered", lambda: len(requests.answers) > 3, within_s=30)
        pods.pods["coordinator"].kill_whole()
        pods.pods["rank-1"].kill_whole()
        shutil.rmtree(pods.pods["coordinator"].folder)
        lost_at = time.monotonic()
        before = len(requests.answers)
        until("the survivors answer", lambda: len(requests.answers) > before + 6, within_s=30)

        began = time.monotonic()
        coordinator = pods.start("coordinator", "coordinator-2", reattach=True)
        replacement = pods.start("rank", "rank-1-1", rank=1)
        pods.put_wish(WISH)
        head_log = coordinator.folder / "ray-node.log"
        until("the new head is up", lambda: head_log.exists() and "is up" in head_log.read_text(), within_s=60)
        head_s = time.monotonic() - began
        second = pods.wait_state("all ranks are active again", is_whole, within_s=150)
        whole_s = time.monotonic() - lost_at

        def replacement_works() -> bool:
            state = pods.state()
            return state is not None and any(r.pod_uid == replacement.pod_uid and r.tokens > 0 for r in state.ranks)

        until("requests reach the new rank, which its gateway found at the new head", replacement_works, within_s=60)
        requests.end()
        print(f"head back {head_s:.1f} s after its pod's start, whole {whole_s:.1f} s after the loss;", end=" ")
        print(f"{len(requests.answers)} requests answered, {len(requests.errors)} failed;", coordinator.log)

        assert requests.errors == [], pods.logs()
        assert set(requests.answers) == {expected}, "every expert had a live copy, so every answer is exact"
        assert "the Ray head's store is copy" in coordinator.log
        assert second.epoch > first.epoch
        for name, (pod, below) in kept.items():
            assert pod.process.poll() is None, f"{name} ended:\n{pod.log}"
            assert set(below) <= set(pod.below()), f"processes of {name} ended"
