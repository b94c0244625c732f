"""Any number of marks become one reconcile, and one key is never reconciled twice at once."""

import asyncio

import pytest

from moe_operator.cluster.protocol import Key
from moe_operator.keys import DirtyKeys

A, B = Key("MoEJob", "default", "a"), Key("MoEJob", "default", "b")


class Work:
    """Counts runs; `gate` holds them open; `wake_in` is what each returns."""

    def __init__(self, wake_in: float | None = None) -> None:
        self.runs: list[Key] = []
        self.most_at_once = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._wake_in = wake_in
        self._running: list[Key] = []

    async def __call__(self, key: Key) -> float | None:
        self.runs.append(key)
        self._running.append(key)
        self.most_at_once = max(self.most_at_once, self._running.count(key))
        await self.gate.wait()
        self._running.remove(key)
        return self._wake_in


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_marks_that_come_together_become_one_run() -> None:
    work = Work()
    keys = DirtyKeys(work)
    for _ in range(5):
        keys.mark(A)
    await settle()
    assert work.runs == [A]
    await keys.close()


async def test_marks_during_a_run_lead_to_exactly_one_more() -> None:
    work = Work()
    work.gate.clear()
    keys = DirtyKeys(work)
    keys.mark(A)
    await settle()
    for _ in range(5):
        keys.mark(A)
    work.gate.set()
    await settle()
    assert work.runs == [A, A]
    assert work.most_at_once == 1
    await keys.close()


async def test_one_key_does_not_hold_up_another() -> None:
    work = Work()
    work.gate.clear()
    keys = DirtyKeys(work)
    keys.mark(A)
    keys.mark(B)
    await settle()
    assert work.runs == [A, B]
    await keys.close()


async def test_a_key_looks_again_when_it_asked_to() -> None:
    work = Work(wake_in=0.0)
    keys = DirtyKeys(work)
    keys.mark(A)
    await asyncio.wait_for(until(lambda: len(work.runs) > 2), timeout=1)
    assert set(work.runs) == {A}
    await keys.close()


async def test_a_forgotten_key_is_not_looked_at_again() -> None:
    work = Work(wake_in=0.0)
    keys = DirtyKeys(work)
    keys.mark(A)
    await asyncio.wait_for(until(lambda: bool(work.runs)), timeout=1)
    keys.forget(A)
    seen = len(work.runs)
    await settle()
    assert len(work.runs) == seen
    await keys.close()


async def test_a_key_may_forget_itself_and_be_marked_again() -> None:
    runs: list[Key] = []

    async def work(key: Key) -> None:
        runs.append(key)
        keys.forget(key)

    keys = DirtyKeys(work)
    keys.mark(A)
    await settle()
    keys.mark(A)
    await settle()
    assert runs == [A, A]
    await keys.close()


async def test_work_that_raises_is_told() -> None:
    async def work(key: Key) -> None:
        raise ValueError(str(key))

    keys = DirtyKeys(work)
    keys.mark(A)
    with pytest.raises(ValueError, match="MoEJob default/a"):
        await asyncio.wait_for(keys.failure, timeout=1)
    await keys.close()


async def until(seen: object) -> None:
    assert callable(seen)
    while not seen():
        await asyncio.sleep(0)
