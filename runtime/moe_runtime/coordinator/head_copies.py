"""The coordinator's side of the copies of its Ray head's store: hands them out, and takes one back in a new pod.

Not in the way of anything else: the coordinator's face answers from its first moment on, only Ray's head waits.
"""

import asyncio
import contextlib
import time
from pathlib import Path

from aiohttp import web

from moe_runtime.host.head_store import (
    BadCopy,
    CopyTooLarge,
    Listing,
    has_store,
    label_of,
    listing,
    newest,
    pack,
    read_quiet,
    restore,
)

LOOK_EVERY_S = 0.25
"""A node or actor that came after the last copy is a stranger to a head that starts from it, and begins anew."""
RECOVER_WITHIN_S = 60.0
"""An offer came after 0.1 s (one node, behind its Service). Far more than that: steps go on meanwhile, and a head that
starts empty ends every node that lives."""
EMPTY_HANDED_S = 20.0
"""Pods that have no copy ask already: there was none yet, or those that had one are gone."""
_SETTLE_S = 1.0
"""After the first offer: others may hold a newer copy."""
_MAX_HOLD_S = 10.0
_MAX_KEEPERS = 32
"""Copies in as many pods survive whatever leaves a group to go on; more only cost the network."""
_FORGET_KEEPER_S = 30.0


class HeadCopies:
    """The newest copy of the store in `folder`, and the offers of a recovery while one runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copy, self._seal, self._sequence = b"", "", 0
        self._offers: dict[str, bytes] | None = None  # by seal: most pods hold the same
        self._keepers: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._offered = asyncio.Event()
        self._first_empty: float | None = None

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/head-store", self._get)
        app.router.add_put("/v1/head-store", self._put)

    async def recover(self, *, within_s: float = RECOVER_WITHIN_S, settle_s: float = _SETTLE_S) -> bool:
        """Ask the pods of the group for the store, unless there is one; False when none offers a whole copy in time."""
        if has_store(self._folder):
            return True
        self._offers, began = {}, time.monotonic()
        self._wake()
        while not self._offers and not self._in_vain(began + within_s):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._offered.wait(), 0.2)
        if self._offers:
            await asyncio.sleep(settle_s)
        offers, self._offers = self._offers, None
        found = await asyncio.to_thread(newest, offers.values())
        took = time.monotonic() - began
        if found is None:
            print(f"moe-pod: no copy of the Ray head's store in {took:.1f} s: it starts empty, ranks anew", flush=True)
            return False
        label, files = found
        await asyncio.to_thread(restore, files, self._folder)
        self._sequence = label.sequence
        print(f"moe-pod: the Ray head's store is copy {label.sequence}, taken over after {took:.1f} s", flush=True)
        return True

    def _in_vain(self, deadline: float) -> bool:
        now = time.monotonic()
        return now > deadline or (self._first_empty is not None and now > self._first_empty + EMPTY_HANDED_S)

    async def watch(self) -> None:
        """Make a copy whenever the store has changed. Runs until cancelled."""
        copied: Listing = {}
        while True:
            now = await asyncio.to_thread(listing, self._folder)
            if now and now != copied and await self._renew(now):
                copied = now
            await asyncio.sleep(LOOK_EVERY_S)

    async def _renew(self, now: Listing) -> bool:
        """False when the store was written to meanwhile."""
        sequence = max(self._sequence + 1, int(time.time() * 1000))
        try:
            files = await asyncio.to_thread(read_quiet, self._folder, now)
            if files is None:
                return False
            label, copy = await asyncio.to_thread(pack, files, sequence=sequence)
        except CopyTooLarge as error:
            print(f"moe-pod: {error}; a new coordinator's pod would take an older one", flush=True)
            return True
        self._copy, self._seal, self._sequence = copy, label.seal, sequence
        self._wake()
        return True

    async def _get(self, request: web.Request) -> web.Response:
        try:
            wait_s = min(float(request.query.get("wait_s", "0")), _MAX_HOLD_S)
        except ValueError as error:
            return web.json_response({"error": f"wait_s must be a number: {error}"}, status=400)
        have, is_keeper = request.query.get("have", ""), self._is_keeper(request.query.get("pod", ""))
        deadline = time.monotonic() + wait_s
        while not (is_keeper and self._seal not in ("", have)):
            if self._offers is not None and have:
                return web.json_response({"error": "no store here yet: offer yours"}, status=404)
            if self._offers is not None and self._first_empty is None:
                self._first_empty = time.monotonic()
            left = deadline - time.monotonic()
            if left <= 0:
                return web.Response(status=204)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return web.Response(body=self._copy)

    async def _put(self, request: web.Request) -> web.Response:
        if self._offers is None:
            return web.json_response({"error": "no copy is asked for"}, status=409)
        body = await request.read()
        try:
            label = await asyncio.to_thread(label_of, body)
        except BadCopy as error:
            return web.json_response({"error": str(error)}, status=400)
        if self._offers is not None and len(self._offers) < _MAX_KEEPERS:
            self._offers[label.seal] = body
            self._offered.set()
        return web.Response(status=204)

    def _is_keeper(self, pod: str) -> bool:
        now = time.monotonic()
        self._keepers = {uid: heard for uid, heard in self._keepers.items() if now - heard < _FORGET_KEEPER_S}
        if pod in self._keepers or len(self._keepers) < _MAX_KEEPERS:
            self._keepers[pod] = now
            return True
        return False

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
