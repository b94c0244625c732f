"""Two operators, one Lease: whatever stops, hangs or dies, never two that apply.

The proof is the API server's own record. Its audit log holds every change of either operator, each under a user of its
own; resourceVersions put them all, the Lease's included, into one order. A change is in order when the write of the
Lease before it names its maker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.controlplane.api import Api, Object
from cluster.controlplane.start import ADMIN, ControlPlane, Settings, control_plane
from cluster.documents import job
from cluster.operators import REPOSITORY, Operator
from cluster.waiting import eventually
from cluster.world import World

pytestmark = pytest.mark.cluster

LEASE_S = 6.0
QUICK = {
    "MOERATOR_LEASE_DURATION_S": f"{LEASE_S:g}",
    "MOERATOR_REQUEST_TIMEOUT_S": "2",
    "MOERATOR_WATCH_TIMEOUT_S": "20",
}
USERS = {"operator-a": ["system:masters"], "operator-b": ["system:masters"]}
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "verbs": ["get", "list", "watch"]},
        {"level": "RequestResponse", "users": sorted(USERS)},
        {"level": "None"},
    ],
}
EXIT_LEASE_LOST = 70


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of our own, as its API server will be stopped; it keeps a record of what operators change."""
    home = tmp_path_factory.mktemp("audited")
    (home / "policy.json").write_text(json.dumps(POLICY))
    flags = [f"--audit-policy-file={home / 'policy.json'}", f"--audit-log-path={home / 'audit.log'}"]
    settings = Settings(users=USERS, apiserver_flags=flags, scheduler=False)
    with control_plane(settings, directory=home) as cluster:
        folder = str(REPOSITORY / "crds")
        cluster.kubectl("apply", "--server-side", "-f", folder)
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", folder)
        yield cluster


@dataclass
class Pair:
    """Two operators on one namespace; `a` is the leader when the test begins."""

    a: Operator
    b: Operator
    world: World


@pytest.fixture
async def pair(audited: ControlPlane, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    namespace = f"elector-{next(_numbers)}"
    audited.kubectl("create", "namespace", namespace)
    audited.kubectl("wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=30s")
    a, b = (
        Operator(audited, [namespace], name=user, kubeconfig=audited.kubeconfig_of(user), **QUICK)
        for user in sorted(USERS)
    )
    async with Api(audited.url, audited.tokens[ADMIN], audited.ca_file) as api:
        try:
            await asyncio.to_thread(a.start)
            await eventually(lambda: asyncio.to_thread(lambda: a.is_leader), bool, what="a leads")
            await asyncio.to_thread(b.start)
            yield Pair(a, b, World(api, namespace))
        finally:
            for process in (a.process, b.process):
                process.kill()


_numbers = itertools.count()


@contextlib.asynccontextmanager
async def churn(world: World) -> AsyncIterator[None]:
    """New jobs all the time, so that whoever leads always has changes to make."""

    stopped = asyncio.Event()

    async def apply() -> None:
        for number in itertools.count():
            with contextlib.suppress(OSError, TimeoutError):  # the API server is stopped now and then
                await world.apply(job(f"j{number}", ranks=3))
            await asyncio.sleep(0.2)
            if stopped.is_set():
                break

    working = asyncio.create_task(apply())
    try:
        yield
    finally:
        stopped.set()  # not cancelled: a request broken off in its TLS handshake leaves its socket to the collector
        await working


async def leads(operator: Operator, *, timeout_s: float = 40) -> None:
    await eventually(
        lambda: asyncio.to_thread(lambda: operator.is_leader),
        bool,
        what=f"{operator.process.name} leads",
        timeout_s=timeout_s,
    )


async def works(world: World, user: str, audit: Path) -> None:
    """Until this user's changes are in the record."""
    before = len([c for c in changes(audit) if c.user == user])
    await eventually(
        lambda: asyncio.to_thread(lambda: len([c for c in changes(audit) if c.user == user])),
        lambda count: count > before + 5,
        what=f"changes by {user}",
        timeout_s=40,
    )


async def ends(operator: Operator) -> int:
    await eventually(
        lambda: asyncio.sleep(0, operator.process.is_running), lambda up: not up, what=f"{operator.process.name} ends"
    )
    return operator.process.terminate()


@dataclass(frozen=True)
class Change:
    version: int
    user: str
    what: str
    holder: str = ""
    """For a write of the Lease: who holds it from then on."""


def changes(audit: Path, namespace: str = "") -> list[Change]:
    """Every change that took effect, in the order in which the store took them."""
    found: dict[tuple[str, int], Change] = {}
    *lines, _unfinished = audit.read_text().split("\n")
    for line in lines:
        event: Object = json.loads(line)
        answer = event.get("responseObject") or {}
        ref = event.get("objectRef", {})
        if event["responseStatus"].get("code", 500) >= 400 or namespace not in ("", ref.get("namespace")):
            continue
        metadata = answer.get("metadata", {})
        if "uid" not in metadata:
            continue
        version = int(metadata["resourceVersion"])
        what = f"{event['verb']} {ref['resource']}/{ref.get('name') or metadata['name']}"
        holder = answer.get("spec", {}).get("holderIdentity", "nobody") if ref["resource"] == "leases" else ""
        # The same version again is an apply that changed nothing.
        found.setdefault((metadata["uid"], version), Change(version, event["user"]["username"], what, holder))
    return sorted(found.values(), key=lambda change: change.version)


def assert_never_two(audit: Path, namespace: str) -> list[str]:
    """Every change was made by the holder of the Lease at that moment; the users in order of their terms."""
    record = changes(audit, namespace)
    terms: list[tuple[str, str]] = []
    for change in record:
        if change.holder:
            if not terms or terms[-1][0] != change.holder:
                terms.append((change.holder, change.user))
        else:
            assert terms, f"{change} before anybody held the lease"
            assert terms[-1][1] == change.user, f"{change} while the lease was held by {terms[-1][1]}"
            assert terms[-1][0] != "nobody", f"{change} while nobody held the lease"
    return [user for holder, user in terms if holder != "nobody"]


async def test_a_stopped_leader_applies_nothing_once_it_wakes(audited: ControlPlane, pair: Pair) -> None:
    audit = audited.directory / "audit.log"
    async with churn(pair.world):
        await works(pair.world, "operator-a", audit)
        pair.a.process.pause()
        await leads(pair.b)
        await works(pair.world, "operator-b", audit)
        pair.a.process.resume()
        assert await ends(pair.a) == EXIT_LEASE_LOST
        await works(pair.world, "operator-b", audit)
    assert assert_never_two(audit, pair.world.namespace) == ["operator-a", "operator-b"]
    assert pair.b.get("/healthz")[0] == 200


async def test_a_leader_stopped_for_a_moment_stays_the_leader(audited: ControlPlane, pair: Pair) -> None:
    audit = audited.directory / "audit.log"
    async with churn(pair.world):
        await works(pair.world, "operator-a", audit)
        pair.a.process.pause()
        await asyncio.sleep(LEASE_S / 4)
        pair.a.process.resume()
        await works(pair.world, "operator-a", audit)
    assert assert_never_two(audit, pair.world.namespace) == ["operator-a"]


async def test_an_api_server_that_hangs_leaves_at_most_one_that_applies(audited: ControlPlane, pair: Pair) -> None:
    audit = audited.directory / "audit.log"
    async with churn(pair.world):
        await works(pair.world, "operator-a", audit)
        with audited.paused("kube-apiserver"):
            assert await ends(pair.a) == EXIT_LEASE_LOST, "a leader that cannot renew ends"
            assert not pair.b.is_leader
        await leads(pair.b)
        await works(pair.world, "operator-b", audit)
        pair.a.process.start()  # as its Deployment would
        await works(pair.world, "operator-b", audit)
        assert not pair.a.is_leader
    assert assert_never_two(audit, pair.world.namespace) == ["operator-a", "operator-b"]


async def test_a_hang_shorter_than_the_lease_changes_nothing(audited: ControlPlane, pair: Pair) -> None:
    audit = audited.directory / "audit.log"
    async with churn(pair.world):
        await works(pair.world, "operator-a", audit)
        with audited.paused("kube-apiserver"):
            await asyncio.sleep(LEASE_S / 4)
        await works(pair.world, "operator-a", audit)
    assert assert_never_two(audit, pair.world.namespace) == ["operator-a"]


async def test_a_leader_that_is_told_to_go_hands_over_at_once(audited: ControlPlane, pair: Pair) -> None:
    audit = audited.directory / "audit.log"
    async with churn(pair.world):
        await works(pair.world, "operator-a", audit)
        assert await asyncio.to_thread(pair.a.process.terminate) == 0
        await leads(pair.b, timeout_s=LEASE_S - 1)
        await works(pair.world, "operator-b", audit)
    assert assert_never_two(audit, pair.world.namespace) == ["operator-a", "operator-b"]


async def test_a_killed_leader_is_followed_after_its_lease(audited: ControlPlane, pair: Pair) -> None:
    audit = audited.directory / "audit.log"
    async with churn(pair.world):
        await works(pair.world, "operator-a", audit)
        pair.a.process.kill()
        await leads(pair.b, timeout_s=5 * LEASE_S)
        await works(pair.world, "operator-b", audit)
    assert assert_never_two(audit, pair.world.namespace) == ["operator-a", "operator-b"]
