"""The elector against a Lease in memory and a clock that tests move: never two that may apply."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from moe_operator.cluster.protocol import Conflict, Unavailable
from moe_operator.elector import NOBODY, Elector, LeaseRecord

DURATION_S, RENEW_S, RETRY_S, HOLD_OFF_S = 15.0, 10.0, 2.0, 5.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Store:
    """One Lease; `away` refuses to answer, `loses` takes the next write and loses its answer."""

    def __init__(self) -> None:
        self.record: LeaseRecord | None = None
        self.away = False
        self.loses = 0
        self._version = 0

    async def read(self) -> LeaseRecord | None:
        self._answer()
        return self.record

    async def create(self, record: LeaseRecord) -> LeaseRecord:
        self._answer()
        if self.record is not None:
            raise Conflict("exists")
        return self._write(record)

    async def replace(self, record: LeaseRecord) -> LeaseRecord:
        self._answer()
        if self.record is None or record.version != self.record.version:
            raise Conflict("changed")
        return self._write(record)

    def _answer(self) -> None:
        if self.away:
            raise Unavailable("nobody answers")

    def _write(self, record: LeaseRecord) -> LeaseRecord:
        self._version += 1
        self.record = replace(record, version=str(self._version))
        if self.loses:
            self.loses -= 1
            raise Unavailable("the answer was lost")
        return self.record


@dataclass
class Candidate:
    elector: Elector
    lost: list[str]

    async def step(self) -> None:
        await self.elector.step()

    @property
    def may_apply(self) -> bool:
        return self.elector.may_apply()


def candidate(store: Store, clock: Clock, name: str) -> Candidate:
    lost: list[str] = []
    elector = Elector(
        store,
        identity=name,
        duration_s=DURATION_S,
        renew_deadline_s=RENEW_S,
        retry_s=RETRY_S,
        hold_off_s=HOLD_OFF_S,
        on_lost=lost.append,
        clock=clock,
    )
    return Candidate(elector, lost)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_the_first_to_come_may_apply_at_once(store: Store, clock: Clock) -> None:
    a, b = candidate(store, clock, "a"), candidate(store, clock, "b")
    await a.step()
    await b.step()
    assert (a.may_apply, b.may_apply) == (True, False)
    assert a.elector.remaining_s() == RENEW_S


async def test_a_leader_that_was_stopped_may_not_apply_when_it_wakes(store: Store, clock: Clock) -> None:
    a = candidate(store, clock, "a")
    await a.step()
    clock.now += RENEW_S
    assert not a.may_apply, "before any other code of it ran"
    await a.step()
    assert a.lost == ["the lease could not be renewed in time"]


async def test_a_standby_waits_for_the_whole_lease_and_then_for_what_may_be_under_way(
    store: Store, clock: Clock
) -> None:
    a, b = candidate(store, clock, "a"), candidate(store, clock, "b")
    await a.step()
    await b.step()
    clock.now += DURATION_S - 0.1
    await b.step()
    assert not b.elector.holds_lease
    clock.now += 0.1
    await b.step()
    assert b.elector.holds_lease and not b.may_apply
    clock.now += HOLD_OFF_S
    assert b.may_apply and not a.may_apply


async def test_a_renewal_seen_late_starts_the_wait_anew(store: Store, clock: Clock) -> None:
    a, b = candidate(store, clock, "a"), candidate(store, clock, "b")
    await a.step()
    await b.step()
    store.away = True  # for b only: a renewed just before
    store.away = False
    clock.now += 9
    await a.step()
    clock.now += DURATION_S - 9
    await b.step()
    assert not b.elector.holds_lease, "the version is new to b"


async def test_a_given_back_lease_is_taken_at_once(store: Store, clock: Clock) -> None:
    a, b = candidate(store, clock, "a"), candidate(store, clock, "b")
    await a.step()
    await b.step()
    await a.elector.release()
    assert store.record is not None and store.record.holder == NOBODY
    await b.step()
    assert b.may_apply and not a.may_apply
    assert a.lost == []


async def test_an_absent_server_ends_the_leader_in_time_and_elects_nobody(store: Store, clock: Clock) -> None:
    a, b = candidate(store, clock, "a"), candidate(store, clock, "b")
    await a.step()
    await b.step()
    store.away = True
    for _ in range(8):
        clock.now += RETRY_S
        await a.step()
        await b.step()
        assert not b.may_apply
    assert a.lost and not a.may_apply


async def test_a_renewal_whose_answer_was_lost_does_not_cost_the_lease(store: Store, clock: Clock) -> None:
    a = candidate(store, clock, "a")
    await a.step()
    store.loses = 1
    clock.now += RETRY_S
    await a.step()
    clock.now += RETRY_S
    await a.step()  # refused: the version moved; it finds itself to be the holder
    clock.now += RETRY_S
    await a.step()
    assert a.lost == [] and a.elector.remaining_s() == RENEW_S


async def test_a_lease_that_was_taken_away_is_noticed_at_the_next_renewal(store: Store, clock: Clock) -> None:
    a = candidate(store, clock, "a")
    await a.step()
    assert store.record is not None
    store.record = replace(store.record, holder="somebody", version="99")
    clock.now += RETRY_S
    await a.step()
    assert a.lost == ["the lease is held by somebody"] and not a.may_apply


async def test_a_deleted_lease_ends_its_holder(store: Store, clock: Clock) -> None:
    a = candidate(store, clock, "a")
    await a.step()
    store.record = None
    clock.now += RETRY_S
    await a.step()
    assert a.lost == ["the lease is held by nobody"]


@pytest.mark.parametrize("seed", range(60))
async def test_never_two_may_apply_whatever_stops_and_fails(seed: int) -> None:
    draw = random.Random(seed)
    store, clock = Store(), Clock()
    candidates = [candidate(store, clock, name) for name in "abc"]
    stopped_until = dict.fromkeys(range(3), 0.0)
    applied = 0
    for _ in range(400):
        clock.now += draw.choice((0.1, 0.5, 1.0, RETRY_S, RETRY_S, 7.0))
        store.away = draw.random() < 0.15
        store.loses = int(draw.random() < 0.1)
        for index, each in enumerate(candidates):
            if draw.random() < 0.03:
                stopped_until[index] = clock.now + draw.choice((1.0, 9.0, 30.0))
            if clock.now >= stopped_until[index]:
                await each.step()
                if each.lost:
                    candidates[index] = candidate(store, clock, f"{'abc'[index]}{clock.now}")
        allowed = [each for each in candidates if each.may_apply]
        assert len(allowed) <= 1
        applied += len(allowed)
    assert applied > 0, "somebody did get to work"
