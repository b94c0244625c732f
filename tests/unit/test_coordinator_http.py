"""The coordinator's HTTP face: who may ask, what is refused, how news travels."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from moe_core.contract.exchange import FaultRequest, RuntimeWish
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.membership import Member, Membership
from moe_runtime.coordinator import face
from moe_runtime.coordinator.book import Book
from moe_runtime.coordinator.face import CoordinatorFace
from moe_runtime.coordinator.head_copies import HeadCopies
from moe_runtime.host.pod_env import PodEnv
from moe_runtime.registration import Directive, GatewayReport, MembersView, RankReport
from serving_config import serving_config

TOKEN = "the-token-of-this-test"
WISH = RuntimeWish(
    generation=2,
    ranks=(0,),
    expert_map=ExpertMap(generation=1, num_logical_experts=2, slots_of_rank=(2,), logical_of_slot=((0, 1),)),
)
REPORT = RankReport(member=Member(rank=0, pod_uid="p0", address="h:1", guard_address="h:2"), phase="Loading")


def environment(*, faults_enabled: bool) -> PodEnv:
    config = serving_config(faults_enabled=faults_enabled)
    return PodEnv(
        role="coordinator",
        rank=None,
        pod_name="c",
        pod_uid="c",
        pod_ip="127.0.0.1",
        token=TOKEN,
        state_dir=Path("/nowhere"),
        shared_ray=False,
        config_path=Path("/nowhere"),
        token_path=Path("/nowhere"),
        config=config,
    )


@pytest.fixture
async def client() -> AsyncIterator[TestClient[Any, Any]]:
    async with client_of(faults_enabled=True) as client:
        yield client


def client_of(*, faults_enabled: bool) -> TestClient[Any, Any]:
    book, copies = Book(lambda: 1000.0, is_serving=True), HeadCopies(Path("/nowhere"))  # whose clock stands still
    face = CoordinatorFace(environment(faults_enabled=faults_enabled), book, copies)
    return TestClient(TestServer(face.app()), headers={"Authorization": f"Bearer {TOKEN}"})


async def test_without_the_token_only_health_and_metrics_answer(client: TestClient[Any, Any]) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    for method, path in [("PUT", "/v1/wish"), ("GET", "/v1/state"), ("POST", "/v1/register"), ("POST", "/v1/gateways")]:
        assert (await client.request(method, path, headers=wrong)).status == 401
    assert (await client.get("/healthz", headers=wrong)).status == 200
    assert (await client.get("/metrics", headers=wrong)).status == 200


async def test_a_wish_is_taken_shown_and_an_older_one_refused(client: TestClient[Any, Any]) -> None:
    assert (await client.put("/v1/wish", data=WISH.canonical())).status == 204
    assert (await (await client.get("/v1/state")).json())["wish_put"] == 2
    older = WISH.model_copy(update={"generation": 1})
    assert (await client.put("/v1/wish", data=older.canonical())).status == 409


@pytest.mark.parametrize("body", ["", "[]", '{"generation": -1}', '{"generation": 1, "rank": []}'])
async def test_a_bad_wish_is_refused_with_its_field(client: TestClient[Any, Any], body: str) -> None:
    answer = await client.put("/v1/wish", data=body)
    assert answer.status == 400
    assert "RuntimeWish" in (await answer.json())["error"]


@pytest.mark.parametrize("path", ["/v1/register", "/v1/gateways"])
async def test_a_bad_report_is_refused(client: TestClient[Any, Any], path: str) -> None:
    assert (await client.post(path, data='{"phase": "Dancing"}')).status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [("load", [[1, 2], [3]]), ("load", [[-1]]), ("load", [[2**63]]), ("expert_seconds", float("nan"))],
)
async def test_a_load_that_nobody_can_have_counted_is_refused_with_its_field(
    client: TestClient[Any, Any], field: str, value: object
) -> None:
    body = json.dumps({**json.loads(REPORT.canonical()), field: value})
    answer = await client.post("/v1/register", data=body)
    assert answer.status == 400
    assert f"RankReport.{field}" in (await answer.json())["error"]


async def test_a_waiting_operator_hears_of_a_rank_at_once(client: TestClient[Any, Any]) -> None:
    version = (await (await client.get("/v1/state")).json())["version"]
    waiting = asyncio.create_task(client.get(f"/v1/state?after={version}&wait_s=20"))
    await asyncio.sleep(0)
    await client.post("/v1/register", data=REPORT.canonical())
    state = await (await asyncio.wait_for(waiting, 5)).json()
    assert [rank["phase"] for rank in state["ranks"]] == ["Loading"]


async def test_a_waiting_rank_hears_of_a_wish_at_once(client: TestClient[Any, Any]) -> None:
    report = REPORT.model_copy(update={"directive_seen": Directive().seal, "wait_s": 20.0})
    waiting = asyncio.create_task(client.post("/v1/register", data=report.canonical()))
    await asyncio.sleep(0)
    await client.put("/v1/wish", data=WISH.canonical())
    directive = Directive.parse(await (await asyncio.wait_for(waiting, 5)).read())
    assert directive.expert_map == WISH.expert_map


async def test_without_news_a_report_is_answered_by_nothing(client: TestClient[Any, Any]) -> None:
    report = REPORT.model_copy(update={"directive_seen": Directive().seal})
    assert (await client.post("/v1/register", data=report.canonical())).status == 204


async def test_a_gateway_reports_its_counts_and_gets_the_members(client: TestClient[Any, Any]) -> None:
    answer = await client.post("/v1/gateways", data=GatewayReport(pod_uid="g", requests_ok=4).canonical())
    assert MembersView.parse(await answer.read()).ranks == ()
    assert (await (await client.get("/v1/state")).json())["serving"]["requests_ok"] == 4


async def test_faults_are_forbidden_unless_enabled() -> None:
    fault = FaultRequest(pod_uid="p0", fault="kill").canonical()
    async with client_of(faults_enabled=False) as client:
        assert (await client.post("/v1/faults", data=fault)).status == 403


async def test_a_fault_goes_to_the_guard_of_its_pod(
    client: TestClient[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected: list[tuple[str, str]] = []
    monkeypatch.setattr(face, "inject_fault", lambda address, fault, *, token: injected.append((address, fault.fault)))
    fault = FaultRequest(pod_uid="p0", fault="hang").canonical()
    assert (await client.post("/v1/faults", data=fault)).status == 404
    await client.post("/v1/register", data=REPORT.canonical())
    assert (await client.post("/v1/faults", data=fault)).status == 202
    assert injected == [("h:2", "hang")]


@pytest.mark.parametrize("query", ["after=x", "wait_s=soon"])
async def test_a_bad_query_is_refused(client: TestClient[Any, Any], query: str) -> None:
    answer = await client.get(f"/v1/state?{query}")
    assert answer.status == 400
    assert "numbers" in json.loads(await answer.text())["error"]


async def test_metrics_tell_epoch_and_active_ranks(client: TestClient[Any, Any]) -> None:
    both = Membership(epoch=3, members=(REPORT.member,), map_digest=WISH.expert_map.digest)
    active = REPORT.model_copy(update={"phase": "Active", "membership": both})
    await client.put("/v1/wish", data=WISH.canonical())
    await client.post("/v1/register", data=active.canonical())
    lines = (await (await client.get("/metrics")).text()).splitlines()
    assert "moe_active_ranks 1.0" in lines
    assert "moe_epoch 3.0" in lines


async def test_a_report_without_news_wakes_nobody(
    client: TestClient[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rung: list[str] = []
    await client.post("/v1/register", data=REPORT.canonical())
    monkeypatch.setattr(face._Bell, "ring", lambda _: rung.append("once"))
    await client.post("/v1/register", data=REPORT.model_copy(update={"tokens": 5, "memory_bytes": 7}).canonical())
    assert rung == []
    await client.post("/v1/register", data=REPORT.model_copy(update={"phase": "Ready"}).canonical())
    assert rung != []
