"""Dirty keys: any number of marks become one reconcile, and one key is never reconciled twice at once.

Not a queue of events: an event is only a hint that facts may have changed; they are read when the key's turn comes.
"""

import asyncio
from collections.abc import Awaitable, Callable

from moe_operator.cluster.protocol import Key

Work = Callable[[Key], Awaitable[float | None]]
"""Reconciles one key; returns the seconds after which to look again, None for never."""


class DirtyKeys:
    """Runs `work` for every marked key, one task per key.

    A mark that arrives while the key is being worked on leads to exactly one more run.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._marks: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def mark(self, key: Key) -> None:
        if key not in self._tasks:
            self._marks[key] = asyncio.Event()
            task = asyncio.create_task(self._follow(key), name=str(key))
            task.add_done_callback(self._note_failure)
            self._tasks[key] = task
        self._marks[key].set()

    def forget(self, key: Key) -> None:
        """The object is gone: end its task. Called from within its own work as well."""
        task = self._tasks.pop(key, None)
        self._marks.pop(key, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, key: Key) -> None:
        mark, wake_in = self._marks[key], None
        while self._marks.get(key) is mark:
            try:
                async with asyncio.timeout(wake_in):
                    await mark.wait()
            except TimeoutError:
                pass  # the time to look again has come
            mark.clear()
            wake_in = await self._work(key)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.failure.done():
            self.failure.set_exception(error)
