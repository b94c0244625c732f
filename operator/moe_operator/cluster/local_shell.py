"""A whole local shell: the cluster of processes, the reconcile that drives it, and the door for other commands."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_operator.cluster.local import POD_PROGRAM, LocalCluster
from moe_operator.cluster.local_face import LocalFace
from moe_operator.cluster.local_runs import KEEP_FILE, LOG_FILE, remove_dead_runs
from moe_operator.cluster.protocol import Key
from moe_operator.metrics import Metrics


class LocalShell:
    """`async with LocalShell() as shell`: whatever ends it, no process stays.

    Inside it SIGTERM acts as Ctrl-C does: the task that entered is cancelled.
    """

    def __init__(self, *, keep: bool = False, program: Sequence[str] = POD_PROGRAM) -> None:
        self._keep = keep
        self._program = program
        self._stack = contextlib.AsyncExitStack()
        self._reconcile: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "LocalShell":
        from moe_operator.reconcile import Reconciler

        remove_dead_runs()
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        async with contextlib.AsyncExitStack() as stack:
            self.cluster = await stack.enter_async_context(LocalCluster(program=self._program, keep=self._keep))
            if self._keep:
                (self.cluster.folder / KEEP_FILE).touch()
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    loop.add_signal_handler(number, task.cancel)
                    stack.callback(loop.remove_signal_handler, number)
            stack.callback(_log_to(self.cluster.folder / LOG_FILE))
            face = LocalFace(self.cluster)
            await face.start()
            stack.push_async_callback(face.close)
            reconciler = Reconciler(self.cluster, metrics=Metrics(), clock=time.time, may_apply=lambda: True)
            self._reconcile = asyncio.create_task(reconciler.run(), name="reconcile")
            stack.push_async_callback(_end, self._reconcile)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def apply(self, document: Mapping[str, Any]) -> Key:
        return self.cluster.apply(document)

    async def changed(self) -> None:
        """Wait until anything changes. Raises what ended the reconcile, if it ended."""
        assert self._reconcile is not None
        change = asyncio.ensure_future(self.cluster.changed())
        try:
            await asyncio.wait({change, self._reconcile}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        if self._reconcile.done():
            self._reconcile.result()
            raise AssertionError("the reconcile ended although nobody ended it")


def _log_to(path: Path) -> Callable[[], None]:
    """Send our own logs to the run folder; returns what undoes it."""
    logger, handler = logging.getLogger("moe_operator"), logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def undo() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()

    return undo


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
