"""What rank processes do in the tests of rows that go through memory."""

import os
import signal
import time

import torch

from gloo_ranks import join_group
from moe_runtime.errors import GroupFault
from moe_runtime.membership.near_memory import LEAST_BYTES

ROWS = LEAST_BYTES // 64 + 1
"""To each member: of 16 floats, more than goes with a message."""


def exchange_often(rank: int, store_path: str, *, size: int, turns: int) -> tuple[int, list[int]]:
    """(rows that came wrong, bytes sent by position)."""
    wrong = 0
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        for turn in range(turns):
            rows = torch.tensor([rank, turn]).float().repeat(ROWS * size, 8)
            if turn % 2:
                came = group.post_all_to_all(rows, [ROWS] * size, [ROWS] * size).wait()
            else:
                came = group.all_to_all(rows, [ROWS] * size, [ROWS] * size)
            senders = torch.arange(size).repeat_interleave(ROWS)
            wrong += int((came[:, 0] != senders).sum() + (came[:, 1] != turn).sum())
        return wrong, list(group.sent_bytes)


def meet_a_silent_one(rank: int, store_path: str, *, size: int, silent: int, number: int, timeout_ms: int) -> float:
    """Seconds from the signal to the fault, as this rank saw them."""
    with join_group(store_path, ranks=range(size), rank=rank, timeout_ms=timeout_ms) as group:
        rows = torch.zeros(ROWS * size, 16)
        group.all_to_all(rows, [ROWS] * size, [ROWS] * size)
        began = time.monotonic()
        if rank == silent:
            os.kill(os.getpid(), number)
        try:
            while True:
                group.all_to_all(rows, [ROWS] * size, [ROWS] * size)
        except GroupFault:
            return time.monotonic() - began


KILLED, STOPPED = int(signal.SIGKILL), int(signal.SIGSTOP)
