"""Something asynchronous that lives on a thread of its own while a `with` block lasts.

A test that blocks its event loop must not stop nodes from sending heartbeats, nor a proxy from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def in_background(live: Callable[[], AbstractAsyncContextManager[T]], *, name: str) -> Iterator[T]:
    """Enter `live()` on a new thread's event loop, yield what it gives, leave it at the end of the block.

    Raises:
        whatever `live()` raised when it was entered or left.
    """
    is_up = threading.Event()
    given: list[T] = []
    errors: list[BaseException] = []
    stop: list[Callable[[], object]] = []

    async def main() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        async with live() as value:
            given.append(value)
            is_up.set()
            await ended.wait()
        await asyncio.sleep(0.1)  # closed TLS connections end in callbacks after this; the loop must still be there

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for it
            errors.append(error)
        finally:
            is_up.set()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    is_up.wait()
    try:
        if given:
            yield given[0]
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended already: its error is raised below
            stop[0]()
        thread.join(timeout=30)
    if errors:
        raise errors[0]
