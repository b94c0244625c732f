"""Which resources have to be looked at again, and who waits for anything to change."""

import asyncio
from collections.abc import AsyncIterator

from moe_operator.cluster.protocol import Key

REST_S = 0.15
"""Ranks report many times a second; looking at each report would take a tenth of a core from them."""


class DirtyKeys:
    """Keys by the order of their first mark, each once."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}
        self._marked = asyncio.Event()
        self._changed = asyncio.Event()

    def add(self, *keys: Key) -> None:
        self._keys.update(dict.fromkeys(keys))
        self._marked.set()
        self.pulse()

    def pulse(self) -> None:
        """Something changed that no resource has to be looked at for."""
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    async def changed(self) -> None:
        """Wait until anything changes."""
        await self._changed.wait()

    async def taken(self) -> AsyncIterator[Key]:
        """Every marked key, no oftener than once in `REST_S`."""
        loop = asyncio.get_running_loop()
        looked_at = 0.0
        while True:
            await self._marked.wait()
            await asyncio.sleep(looked_at + REST_S - loop.time())
            looked_at = loop.time()
            self._marked.clear()
            keys, self._keys = list(self._keys), {}
            for key in keys:
                yield key
