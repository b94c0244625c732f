"""Waiting for what a cluster will show sooner or later, with what was last seen in the failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    look: Callable[[], Awaitable[T]], until: Callable[[T], bool], *, timeout_s: float = 30.0, what: str = "it"
) -> T:
    """Look again and again until it is so; what was seen then.

    Raises:
        AssertionError: not within `timeout_s`; carries what was seen last.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        seen = await look()
        if until(seen):
            return seen
        assert time.monotonic() < deadline, f"{what} was not seen within {timeout_s:.0f} s; last: {seen!r}"
        await asyncio.sleep(0.05)
