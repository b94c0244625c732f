"""A service of three ranks and two gateways, injured in every way, while requests run: real processes, Ray, Gloo.

One group of pods for the whole module: its start costs more than what is done to it. Each test leaves it whole.
"""

import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.serving_pods import Pods, is_over, spread_map, until
from moe_core.contract.exchange import RuntimeState, RuntimeWish
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.gateway.pod import SILENCE_S
from tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
NUM_RANKS = 3
PROMPTS = ("first things", "second", "a third prompt that is longer than the others")
NUM_TOKENS = 160


class Service:
    """The pods, and what an undisturbed run has answered."""

    def __init__(self, pods: Pods) -> None:
        self.pods = pods
        self.wish = RuntimeWish(generation=1, ranks=tuple(range(NUM_RANKS)), expert_map=spread_map(NUM_RANKS))
        self.expected: dict[str, str] = {}
        self._replacements = 0

    def rank_pod_of(self, rank: int) -> str:
        """Name of the running pod of a rank."""
        names = [n for n, p in self.pods.pods.items() if n.startswith(f"rank-{rank}") and p.process.poll() is None]
        return names[-1]

    def replace(self, rank: int) -> None:
        """What the operator does: another pod for the same rank."""
        self._replacements += 1
        self.pods.start("rank", f"rank-{rank}-{self._replacements}", rank=rank)

    def is_whole(self, state: RuntimeState) -> bool:
        return state.wish_generation == 1 and state.coverage is not None and state.coverage.is_full

    def wait_whole(self) -> RuntimeState:
        return self.pods.wait_state("all ranks are active", self.is_whole, within_s=180)


class Stream(threading.Thread):
    """One streamed completion in the background."""

    def __init__(self, pods: Pods, prompt: str, *, max_tokens: int = NUM_TOKENS) -> None:
        super().__init__(daemon=True)
        self._pods, self._prompt, self._max_tokens = pods, prompt, max_tokens
        self.text, self.chunks, self.marks, self.finish = "", 0, {}, None  # type: ignore[var-annotated]
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for chunk in self._pods.stream(self._prompt, max_tokens=self._max_tokens):
                self.text += chunk["choices"][0]["text"]
                self.finish = chunk["choices"][0]["finish_reason"] or self.finish
                self.marks = chunk.get("moerator", self.marks)
                self.chunks += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test that waits for it
            self.error = error

    def result(self) -> str:
        self.join(90)
        assert not self.is_alive(), f"stream of {self._prompt!r} stands at {self.chunks} chunks\n{self._pods.logs()}"
        assert self.error is None, f"{self.error!r}\n{self._pods.logs()}"
        return self.text


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("serving")
    source = ModelSource(path=str(write_checkpoint(folder / "checkpoint")))
    with Pods(folder / "run", num_ranks=NUM_RANKS, source=source) as pods:
        service = Service(pods)
        pods.start_all(gateways=2)
        pods.put_wish(service.wish)
        service.wait_whole()
        until("the gateway has ranks", pods.healthy, within_s=20)
        for prompt in PROMPTS:
            service.expected[prompt] = pods.complete(prompt, max_tokens=NUM_TOKENS)["choices"][0]["text"]
        yield service


def disturbed(service: Service, fault: Callable[[], None]) -> list[Stream]:
    """Streams of every prompt that are under way when the fault strikes; returns them when all are through."""
    streams = [Stream(service.pods, prompt) for prompt in PROMPTS]
    until("all streams are under way", lambda: all(s.chunks >= 5 for s in streams), within_s=30)
    assert all(s.is_alive() for s in streams), "streams ended before the fault; make them longer"
    fault()
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert stream.result() == service.expected[prompt]
        assert stream.finish == "length"
    return streams


def replays(streams: list[Stream]) -> int:
    return sum(s.marks["replays"] for s in streams)


def test_streams_give_what_whole_answers_give(service: Service) -> None:
    assert replays(disturbed(service, lambda: None)) == 0


def samples(text: bytes) -> dict[str, float]:
    """Name with labels -> value, as Prometheus reads it."""
    families = text_string_to_metric_families(text.decode())
    return {".".join((s.name, *(v for _, v in sorted(s.labels.items())))): s.value for f in families for s in f.samples}


def test_what_coordinator_and_gateway_measure_can_be_scraped(service: Service) -> None:
    pods = service.pods
    coordinator = samples(pods.call("GET", "/metrics", token="none")[1])
    assert coordinator["moe_active_ranks"] == NUM_RANKS
    assert coordinator["moe_experts_covered"] == coordinator["moe_experts_total"] == NUM_LAYERS * NUM_EXPERTS
    # Each of two gateways begins with the first rank, so three streams need not reach the last one.
    tokens = [coordinator[f"moe_rank_tokens_total.{rank}"] for rank in range(NUM_RANKS)]
    assert sum(tokens) >= len(PROMPTS) * NUM_TOKENS
    assert coordinator["moe_dispatch_bytes_total.host"] > coordinator["moe_dispatch_bytes_total.self"] > 0
    assert coordinator["moe_digest_mismatches_total"] == 0
    assert 0 < coordinator["moe_balancedness_min"] <= coordinator["moe_balancedness"] <= 1
    assert not any(name.startswith("moe_expert_tokens") for name in coordinator)
    asked = samples(pods.call("GET", "/metrics?experts=1", token="none")[1])
    picks = [value for name, value in asked.items() if name.startswith("moe_expert_tokens_total.")]
    assert len(picks) == NUM_LAYERS * NUM_EXPERTS
    with urllib.request.urlopen(f"{pods.base_url}/metrics", timeout=5) as response:
        gateway = samples(response.read())
    assert gateway["moe_gateway_ranks"] == NUM_RANKS
    assert gateway["moe_requests_in_flight"] == 0


def test_killed_rank_costs_no_token_and_its_replacement_joins(service: Service) -> None:
    pod = service.pods.pods[service.rank_pod_of(1)]
    began = time.time()
    streams = disturbed(service, lambda: os.kill(pod.rank_pid, signal.SIGKILL))
    assert replays(streams) >= 1
    assert pod.process.wait(10) != 0, "the pod of a dead rank ends"
    state = service.pods.wait_state("two ranks go on", lambda s: len(s.recoveries) > 0, within_s=10)
    recovery = state.recoveries[-1]
    assert recovery.lost_ranks == (1,)
    assert recovery.resumed_at - began < 10
    service.replace(1)
    assert service.wait_whole().epoch > recovery.epoch


def test_stopped_rank_is_fenced_and_costs_no_token(service: Service) -> None:
    pod = service.pods.pods[service.rank_pod_of(2)]
    disturbed(service, lambda: os.kill(pod.rank_pid, signal.SIGSTOP))
    assert pod.process.wait(15) != 0, "the guard ends a rank that hangs"
    service.replace(2)
    service.wait_whole()


def test_coordinator_and_ray_head_may_die_with_requests_running(service: Service) -> None:
    pods = service.pods
    streams = disturbed(service, pods.pods["coordinator"].kill_whole)
    assert replays(streams) == 0, "no step needs the coordinator"
    prompt = PROMPTS[0]
    assert pods.complete(prompt, max_tokens=NUM_TOKENS)["choices"][0]["text"] == service.expected[prompt]
    pods.start("coordinator", "coordinator")
    pods.put_wish(service.wish)
    service.wait_whole()


def test_coordinator_and_a_rank_may_be_lost_together_with_the_coordinators_folder(service: Service) -> None:
    pods, pod = service.pods, service.pods.pods[service.rank_pod_of(0)]

    def both() -> None:
        pods.pods["coordinator"].kill_whole()
        os.kill(pod.rank_pid, signal.SIGKILL)
        shutil.rmtree(pods.pods["coordinator"].folder)

    assert replays(disturbed(service, both)) >= 1
    coordinator = pods.start("coordinator", "coordinator", reattach=True)
    pods.put_wish(service.wish)
    service.replace(0)
    service.wait_whole()
    assert "the Ray head's store is copy" in coordinator.log, "the shared node had kept it"


def test_stopped_gateway_loses_no_connection_that_it_had_not_taken(service: Service) -> None:
    pods, guard = service.pods, service.pods.pods["gateway-0"]
    (stopped,) = guard.below()
    os.kill(stopped, signal.SIGSTOP)
    # The kernel gives a half of them to the stopped one; they are its successor's. Nobody tries twice.
    streams = [Stream(pods, "x", max_tokens=2) for _ in range(12)]
    for stream in streams:
        stream.result()
    assert f"killed by SIGKILL (fenced: silent for {SILENCE_S:.1f}" in guard.log
    assert guard.process.poll() is None
    until("the gateway is back", lambda: guard.log.count("gateway on port") == 2, within_s=30)
    assert stopped not in guard.below()


def test_killed_gateway_pod_leaves_the_other_one_at_work(service: Service) -> None:
    pod = service.pods.pods["gateway-0"]
    served = pod.below()
    pod.kill_whole()
    until("its processes have closed their ports", lambda: all(is_over(pid) for pid in served), within_s=5)
    assert service.pods.complete("x", max_tokens=2)["usage"]["completion_tokens"] == 2
