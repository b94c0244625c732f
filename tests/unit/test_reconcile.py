"""observe -> decide -> apply -> report on a small cluster in memory: order, refusals, back-off, and the lease."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_core.facts import (
    Action,
    ApplyObject,
    BindPod,
    Condition,
    CreatePod,
    Decision,
    DeleteObject,
    DeleteOwner,
    DeletePod,
    EnsureToken,
    Event,
    Facts,
    ReportMap,
    Wish,
)
from moe_core.outcome import Reason
from moe_operator.cluster.protocol import Conflict, Foreign, Key, Refused, RuntimeFace, Unavailable
from moe_operator.metrics import Metrics
from moe_operator.reconcile import LAST_RETRY_S, Reconciler, describe

KEY = Key("MoEJob", "default", "tiny")
WISH = Wish("MoEJob", "default", "tiny", "uid-1", generation=2, spec={})
READY = Condition("Ready", "True", Reason.ALL_ACTIVE, "4 of 4")


@dataclass
class FakeCluster:
    """Notes every verb; `faults` are raised by the next verbs of that name, in order."""

    wish: Wish | None = WISH
    facts: Facts = field(default_factory=Facts)
    done: list[str] = field(default_factory=list)
    faults: dict[str, list[Exception]] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    during: Callable[[str], None] = lambda verb: None
    most_at_once: int = 0
    _at_once: int = 0

    async def dirty(self) -> AsyncIterator[Key]:
        for key in self.keys:
            yield key
        await asyncio.Event().wait()

    async def observe(self, key: Key) -> tuple[Wish, Facts] | None:
        self.done.append("observe")
        return (self.wish, self.facts) if self.wish else None

    async def _verb(self, verb: str, name: str = "") -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        self.during(verb)
        await asyncio.sleep(0)
        self._at_once -= 1
        if self.faults.get(verb):
            raise self.faults[verb].pop(0)
        self.done.append(f"{verb} {name}".strip())

    async def apply_object(self, wish: Wish, action: ApplyObject) -> None:
        await self._verb("apply", action.name)

    async def ensure_token(self, wish: Wish, action: EnsureToken) -> None:
        await self._verb("token", action.name)

    async def create_pod(self, wish: Wish, action: CreatePod) -> None:
        await self._verb("create", action.name)

    async def bind_pod(self, wish: Wish, action: BindPod) -> None:
        await self._verb("bind", action.name)

    async def delete_pod(self, wish: Wish, action: DeletePod) -> None:
        await self._verb("delete", action.name)

    async def delete_object(self, wish: Wish, action: DeleteObject) -> None:
        await self._verb("delete-object", action.name)

    async def report_map(self, wish: Wish, action: ReportMap) -> None:
        await self._verb("report-map", action.name)

    async def delete_owner(self, wish: Wish) -> None:
        await self._verb("delete-owner")

    def runtime(self, wish: Wish) -> RuntimeFace:
        raise AssertionError("no decision of these tests talks to a coordinator")

    async def write_status(
        self, wish: Wish, *, conditions: Sequence[Mapping[str, Any]], status: Mapping[str, Any]
    ) -> None:
        await self._verb("status")
        self.wish = replace(wish, status={**status, "conditions": list(conditions)})

    async def emit(self, wish: Wish, event: Event) -> None:
        await self._verb("event", event.message)


def create(name: str) -> CreatePod:
    return CreatePod(name=name, role="rank", index=0, incarnation=1, gated=True, manifest={})


def reconciler(
    cluster: FakeCluster, *actions: Action, may_apply: Callable[[], bool] = lambda: True, **decision: Any
) -> Reconciler:
    return Reconciler(
        cluster,
        metrics=Metrics(),
        clock=lambda: 100.0,
        may_apply=may_apply,
        brain=lambda wish, facts, now: Decision(actions=actions, **decision),
    )


async def test_actions_come_in_order_then_events_then_one_status() -> None:
    cluster = FakeCluster()
    event = Event("Normal", Reason.PLACED, "placed")
    work = reconciler(cluster, EnsureToken("t"), create("p"), conditions=(READY,), status={"epoch": 1}, events=(event,))
    assert await work.reconcile(KEY) is None
    assert cluster.done == ["observe", "token t", "create p", "event placed", "status"]


async def test_a_status_that_says_the_same_is_not_written_again() -> None:
    cluster = FakeCluster()
    work = reconciler(cluster, conditions=(READY,), status={"epoch": 1})
    await work.reconcile(KEY)
    await work.reconcile(KEY)
    assert cluster.done == ["observe", "status", "observe"]


async def test_a_status_that_only_counts_on_is_written_now_and_then_and_any_other_at_once() -> None:
    cluster = FakeCluster()
    status: dict[str, Any] = {"epoch": 1, "training": {"step": 1}}
    work = Reconciler(
        cluster,
        metrics=Metrics(),
        clock=lambda: 0.0,
        may_apply=lambda: True,
        calm_s=60,
        brain=lambda wish, facts, now: Decision(conditions=(READY,), status=dict(status)),
    )
    await work.reconcile(KEY)
    status["training"] = {"step": 2}
    wake_in = await work.reconcile(KEY)
    assert wake_in is not None and 59 < wake_in <= 60
    assert cluster.done == ["observe", "status", "observe"]
    status["epoch"] = 2
    assert await work.reconcile(KEY) is None
    assert cluster.done[-1] == "status"
    assert cluster.wish is not None and cluster.wish.status["training"] == {"step": 2}


async def test_without_the_lease_nothing_is_even_observed() -> None:
    cluster = FakeCluster()
    wake_in = await reconciler(cluster, create("p"), may_apply=lambda: False).reconcile(KEY)
    assert cluster.done == []
    assert wake_in is not None


async def test_a_lease_lost_between_two_actions_stops_the_second() -> None:
    held = [True]
    cluster = FakeCluster(during=lambda verb: held.__setitem__(0, False))
    work = reconciler(cluster, create("p0"), create("p1"), conditions=(READY,), may_apply=lambda: held[0])
    assert await work.reconcile(KEY) is not None
    assert cluster.done == ["observe", "create p0"]


async def test_an_orderly_end_waits_for_the_request_under_way_and_for_no_other() -> None:
    begun, answered, held = asyncio.Event(), asyncio.Event(), [True]

    class Slow(FakeCluster):
        async def create_pod(self, wish: Wish, action: CreatePod) -> None:
            begun.set()
            await answered.wait()
            await super().create_pod(wish, action)

    cluster = Slow()
    work = reconciler(cluster, create("p0"), create("p1"), conditions=(READY,), may_apply=lambda: held[0])
    cycle = asyncio.create_task(work.reconcile(KEY))
    await begun.wait()
    held[0] = False
    rest = asyncio.create_task(work.at_rest(within_s=5))
    await asyncio.sleep(0)
    assert not rest.done()
    answered.set()
    await rest
    await cycle
    assert cluster.done == ["observe", "create p0"]


async def test_bindings_are_decided_again_under_the_lock() -> None:
    cluster = FakeCluster()
    await reconciler(cluster, BindPod("p", "uid", "node")).reconcile(KEY)
    assert cluster.done == ["observe", "observe", "bind p"]


async def test_two_gangs_are_never_bound_at_the_same_time() -> None:
    cluster = FakeCluster()
    work = reconciler(cluster, BindPod("p", "uid", "a"), BindPod("q", "uid", "b"))
    await asyncio.gather(work.reconcile(KEY), work.reconcile(Key("MoEJob", "default", "other")))
    assert cluster.most_at_once == 1
    assert cluster.done.count("bind p") == 2


async def test_pods_are_created_side_by_side_where_that_is_wanted_and_all_are_finished_before_a_failure_counts() -> (
    None
):
    cluster = FakeCluster(faults={"create": [Conflict("taken")]})
    actions = tuple(create(f"p{number}") for number in range(4))
    work = Reconciler(
        cluster,
        metrics=Metrics(),
        clock=lambda: 0.0,
        may_apply=lambda: True,
        at_once=2,
        brain=lambda wish, facts, now: Decision(actions=(*actions, EnsureToken("t"))),
    )
    await work.reconcile(KEY)
    assert cluster.most_at_once == 2
    assert cluster.done == ["observe", "create p1"]


async def test_an_absent_server_is_waited_for_as_long_as_it_said_and_marks_do_not_shorten_that() -> None:
    cluster = FakeCluster(faults={"create": [Unavailable("too many", retry_after=7.0)]})
    work = reconciler(cluster, create("p"))
    assert await work.reconcile(KEY) == 7.0
    again = await work.reconcile(KEY)
    assert again is not None and 6.0 < again <= 7.0
    assert cluster.done == ["observe"]


async def test_waiting_grows_with_failures_to_a_bound_and_starts_anew_after_progress() -> None:
    waits: list[float] = []
    cluster = FakeCluster(faults={"create": [Refused("no")] * 12})
    work = reconciler(cluster, create("p"))
    for _ in range(12):
        waits.append(await retried(work))
    assert waits == sorted(waits) and waits[0] < 1 and waits[-1] == LAST_RETRY_S
    cluster.faults = {"status": [Refused("no")]}
    work = reconciler(cluster, create("p"), conditions=(READY,))
    assert await retried(work) == waits[0]


async def retried(work: Reconciler) -> float:
    """One more try, as if the time to wait had passed."""
    work._not_before.clear()
    wait = await work.reconcile(KEY)
    assert wait is not None
    return wait


async def test_what_is_refused_is_decided_on_again_and_reported() -> None:
    told: list[tuple[str, int, str]] = []

    def brain(wish: Wish, facts: Facts, now: float) -> Decision:
        told.extend((describe(one.action), one.code, one.message) for one in facts.refused)
        conditions = (Condition("Progressing", "False", Reason.REFUSED, "quota"),) if facts.refused else ()
        return Decision(actions=(create("p"), EnsureToken("t"), BindPod("q", "uid", "a")), conditions=conditions)

    refused = Refused("POST /pods: 403 exceeded quota", code=403, said="exceeded quota")
    cluster = FakeCluster(faults={"create": [refused]})
    work = Reconciler(cluster, metrics=Metrics(), clock=lambda: 0.0, may_apply=lambda: True, brain=brain)
    assert await retried(work) > 0
    assert told == [("CreatePod p", 403, "exceeded quota")]
    assert cluster.done == ["observe", "observe", "token t", "status"], "no pod is touched behind a refused one"
    assert cluster.wish is not None and cluster.wish.status["conditions"][0]["reason"] == "Refused"


async def test_an_object_of_somebody_else_is_a_fact_too() -> None:
    seen: list[bool] = []

    def brain(wish: Wish, facts: Facts, now: float) -> Decision:
        seen.extend(one.is_foreign for one in facts.refused)
        return Decision(actions=(EnsureToken("t"), create("p")))

    cluster = FakeCluster(faults={"token": [Foreign("Secret t exists and has no owner")]})
    work = Reconciler(cluster, metrics=Metrics(), clock=lambda: 0.0, may_apply=lambda: True, brain=brain)
    await retried(work)
    assert seen == [True]
    assert cluster.done == ["observe"], "no pod mounts somebody else's Secret"


async def test_an_event_that_could_not_be_told_is_told_again_and_one_that_is_refused_stops_no_status() -> None:
    event = Event("Normal", Reason.PLACED, "placed")
    cluster = FakeCluster(faults={"event": [Unavailable("too many"), Refused("no right")]})
    work = reconciler(cluster, conditions=(READY,), status={"epoch": 1}, events=(event,))
    await retried(work)
    assert cluster.done == ["observe"]
    work._not_before.clear()
    await work.reconcile(KEY)
    assert cluster.done == ["observe", "observe", "status"]


async def test_an_owner_whose_deletion_is_refused_says_so() -> None:
    cluster = FakeCluster(faults={"delete-owner": [Refused("a finalizer")]})
    await retried(reconciler(cluster, DeleteOwner("uid-1"), conditions=(READY,)))
    assert cluster.done == ["observe", "status"]


async def test_an_object_that_breaks_the_brain_is_counted_and_tried_again() -> None:
    cluster = FakeCluster()
    metrics = Metrics()

    def broken(wish: Wish, facts: Facts, now: float) -> Decision:
        raise ZeroDivisionError

    work = Reconciler(cluster, metrics=metrics, clock=lambda: 0.0, may_apply=lambda: True, brain=broken)
    assert await work.reconcile(KEY) is not None
    assert 'moerator_reconcile_errors_total{kind="MoEJob"} 1.0' in metrics.exposition().decode()


async def test_an_owner_that_is_to_go_gets_no_last_status() -> None:
    cluster = FakeCluster()
    await reconciler(cluster, DeleteOwner("uid-1"), conditions=(READY,)).reconcile(KEY)
    assert cluster.done == ["observe", "delete-owner"]


async def test_a_key_whose_object_is_gone_is_forgotten() -> None:
    cluster = FakeCluster(wish=None, keys=[KEY])
    running = asyncio.create_task(reconciler(cluster).run())
    while not cluster.done:
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert cluster.done == ["observe"]
