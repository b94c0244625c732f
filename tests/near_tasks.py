"""What rank processes do in the tests of rows that go through memory."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gloo_ranks import join_group
from moe_runtime.errors import GroupFault
from moe_runtime.membership.group import EpochGroup
from moe_runtime.membership.near_words import NearWords, Word

ROWS = 2000
"""To each member: of 16 floats."""
STEPS = 150


def exchange_often(
    rank: int, store_path: str, *, size: int, turns: int, far: Sequence[tuple[int, int]] = ()
) -> tuple[int, list[int]]:
    """(rows that came wrong, bytes sent by position). far: ranks that do not see each other."""
    _part(rank, far)
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        return sum(_wrong(group, rank, turn) for turn in range(turns)), list(group.sent_bytes)


def _part(rank: int, far: Sequence[tuple[int, int]]) -> None:
    real = NearWords.open

    def opened(words: NearWords, position: int, **told: Any) -> bool:
        return not {(rank, position), (position, rank)} & set(far) and real(words, position, **told)

    NearWords.open = opened  # type: ignore[method-assign, assignment]


def _wrong(group: EpochGroup, rank: int, turn: int) -> int:
    """Rows that came wrong in one exchange; every third tells how many come."""
    size = group.size
    rows = torch.tensor([rank, turn]).float().repeat(ROWS * size, 8)
    counts = [ROWS] * size
    if turn % 3 == 0:
        came = group.all_to_all(rows, counts, counts)
    elif turn % 3 == 1 or not group.tells:
        came = group.post_all_to_all(rows, counts, counts).wait()
    else:
        heard = group.post_telling(rows, counts, torch.full((size, 1), rank)).wait()
        came = heard.rows
        assert heard.told_GC.view(-1).tolist() == list(group.ranks)
    senders = torch.tensor(group.ranks).repeat_interleave(ROWS)
    return int((came[:, 0] != senders).sum() + (came[:, 1] != turn).sum())


def exchange_anything(rank: int, store_path: str, *, size: int, seed: int, far: Sequence[tuple[int, int]] = ()) -> int:
    """Any exchanges of any numbers of rows, several under way and ended in any order, gathers and sums between them.

    Exchanges made. Raises AssertionError where anything comes wrong.
    """
    _part(rank, far)
    numbers, waits = random.Random(seed), list[Callable[[], None]]()
    with join_group(store_path, ranks=range(size), rank=rank) as group:
        for step in range(STEPS):
            kind = numbers.choice(("now", "later", "told", "end", "sum", "gather"))
            counts = [[numbers.choice((0, 0, 1, 3, numbers.randrange(2000))) for _ in range(size)] for _ in range(size)]
            if kind in {"now", "later", "told"} and len(waits) < 5:
                waits.append(_begun(group, kind, counts, step))
                if kind == "now":
                    waits.pop()()
            elif kind == "end" and waits:
                waits.pop(numbers.randrange(len(waits)))()
            elif kind == "sum":
                total = torch.full((numbers.randrange(1, 2000),), float(rank + step))
                group.all_reduce_sum(total)
                assert (total == sum(range(size)) + size * step).all()
            elif kind == "gather":
                assert group.all_gather_ints([rank, step]) == [[p, step] for p in range(size)]
        for wait in waits:
            wait()
    return STEPS


def _begun(group: EpochGroup, kind: str, counts: list[list[int]], step: int) -> Callable[[], None]:
    """An exchange; what ends it checks what came."""
    me, size = group.position, group.size

    def rows_of(pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Every row says who sent it, to whom, in which step and as what."""
        rows = [(p, q, step, i) for p, q in pairs for i in range(counts[p][q])]
        return torch.tensor(rows, dtype=torch.float32).view(-1, 4)

    sent, column = rows_of([(me, q) for q in range(size)]), [counts[p][me] for p in range(size)]
    expected = rows_of([(p, me) for p in range(size)])
    if kind == "told" and group.tells:
        told = group.post_telling(sent, counts[me], torch.tensor([[me, q, step] for q in range(size)]))

        def wait_told() -> None:
            heard = told.wait()
            assert torch.equal(heard.rows, expected)
            assert (heard.counts, heard.told_GC.tolist()) == (column, [[p, me, step] for p in range(size)])

        return wait_told
    if kind == "now":
        came = group.all_to_all(sent, counts[me], column)
        return lambda: _same(came, expected)
    posted = group.post_all_to_all(sent, counts[me], column)
    return lambda: _same(posted.wait(), expected)


def _same(came: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(came, expected)


def meet_a_silent_one(
    rank: int, store_path: str, *, size: int, silent: int, number: int, timeout_ms: int, after_words: int
) -> dict[str, Any]:
    """`silent` is hit by a signal once it has said that many words, between two members of one exchange; the others go
    on in an epoch of their own. What each of them saw."""
    group = join_group(store_path, ranks=range(size), rank=rank, timeout_ms=timeout_ms)
    group.all_gather_ints((rank,))
    if rank == silent:
        _hit(after_words, number)
    began, wrong, turn = time.monotonic(), 0, 0
    try:
        while True:
            wrong += _wrong(group, rank, turn)
            turn += 1
    except GroupFault as fault:
        seconds, reason = time.monotonic() - began, str(fault)
    group.destroy()
    living = [r for r in range(size) if r != silent]
    with join_group(store_path, ranks=living, rank=rank, epoch=2) as group:
        wrong += sum(_wrong(group, rank, turn) for turn in range(6))
    return {"seconds": seconds, "reason": reason, "wrong": wrong}


def _hit(after_words: int, number: int) -> None:
    say, said = NearWords.say, 0

    def say_and_stop(words: NearWords, position: int, word: Word) -> None:
        nonlocal said
        said += 1
        if said > after_words:
            os.kill(os.getpid(), number)
        say(words, position, word)

    NearWords.say = say_and_stop  # type: ignore[method-assign, assignment]


def live_through_epochs(rank: int, store_path: str, *, size: int, epochs: int) -> tuple[list[int], int]:
    """(descriptors open after each epoch, maps of memory files that are left)."""
    found = []
    for epoch in range(1, epochs + 1):
        group = join_group(store_path, ranks=range(size), rank=rank, epoch=epoch)
        for turn in range(3):
            _wrong(group, rank, turn)
        group.destroy()
        del group
        found.append(len(list(Path("/proc/self/fd").iterdir())))
    return found, Path("/proc/self/maps").read_text().count("moerator-rows")


KILLED, STOPPED = int(signal.SIGKILL), int(signal.SIGSTOP)
