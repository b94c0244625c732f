"""A served load moves experts: real ranks count, the brain plans, slots change under requests, answers stay exact."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from integration.serving_pods import free_port
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.measure import balance
from moe_core.manifests.map_slices import map_of_slices
from moe_operator.cli_run import condition
from moe_operator.cluster.local_shell import LocalShell
from moe_operator.cluster.protocol import Key
from tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(280)]
PROMPT, NUM_TOKENS = "one prompt again and again makes some experts popular", 60
SERVICE = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "MoEService",
    "metadata": {"name": "skew", "namespace": "default"},
    "spec": {
        "parallelism": {"expert": 3},
        "experts": {
            "redundantPerRank": 1,
            "rebalance": {"windowSeconds": 5, "horizonSeconds": 3600, "maxMovedPercent": 100},
        },
        "gateway": {"replicas": 1},
        "template": {"spec": {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}},
    },
}


@pytest.fixture
async def shell() -> AsyncIterator[LocalShell]:
    async with LocalShell() as shell:
        yield shell


def map_of(shell: LocalShell) -> ExpertMap:
    found = map_of_slices([thing["spec"] for thing in shell.cluster.objects("ExpertMap")])
    assert found is not None
    return found


async def condition_is(shell: LocalShell, key: Key, kind: str, *statuses: str, within_s: float) -> dict[str, Any]:
    """The condition once its status is one of these."""
    async with asyncio.timeout(within_s):
        while True:
            thing = shell.cluster.resource(key)
            assert thing is not None
            if (seen := condition(thing, kind)).get("status") in statuses:
                return dict(seen)
            await shell.changed()


async def complete(port: int) -> str:
    body = {"model": "skew", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=60).read())
    return str(json.loads(answer)["choices"][0]["text"])


async def metrics(shell: LocalShell, key: Key) -> dict[str, float]:
    url = f"http://127.0.0.1:{shell.cluster.port_of(key, 'coordinator')}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def test_a_skewed_load_moves_experts_while_answers_stay_the_same(shell: LocalShell, tmp_path: Path) -> None:
    model = {"path": str(write_checkpoint(tmp_path / "checkpoint"))}
    spec: dict[str, Any] = {**SERVICE["spec"], "model": model, "gateway": {"replicas": 1, "port": free_port()}}  # type: ignore[dict-item]
    key = shell.apply({**SERVICE, "spec": spec})
    await condition_is(shell, key, "Ready", "True", within_s=180)
    port = shell.cluster.port_of(key, "gateway")
    first_map, expected = map_of(shell), await complete(port)

    async with asyncio.timeout(90):
        while map_of(shell).digest == first_map.digest:
            answers = await asyncio.gather(*(complete(port) for _ in range(4)))
            assert set(answers) == {expected}
    new_map = map_of(shell)
    async with asyncio.timeout(60):
        while (
            (face := shell.cluster.state_of(key)) is None
            or face.state is None
            or (face.state.map_digest != new_map.digest)
        ):
            assert await complete(port) == expected
    for _ in range(4):
        assert await complete(port) == expected

    told = await condition_is(shell, key, "Balanced", "True", "False", within_s=10)
    assert "balancedness" in told["message"]
    load = face.state.load
    assert balance(new_map, load).balancedness > balance(first_map, load).balancedness
    assert (await metrics(shell, key))["moe_rebalance_moved_bytes_total"] > 0
    assert (await metrics(shell, key))["moe_digest_mismatches_total"] == 0
