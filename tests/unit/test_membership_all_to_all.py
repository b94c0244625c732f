"""What an all-to-all sends when some members read each other's memory: threads stand in for ranks and their backend."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_group import MemoryGroup, together
from moe_runtime.membership import near_memory
from moe_runtime.membership.all_to_all import AllToAll, Exchange
from moe_runtime.membership.near_memory import LEAST_BYTES, NearMemory

LARGE = LEAST_BYTES // 16 + 1
"""Rows of four floats that are more than what goes with a message."""


class Member:
    """One rank: real memory files, messages through the group of threads."""

    def __init__(self, group: MemoryGroup, near: NearMemory | None) -> None:
        self.group, self.near = group, near
        self.exchanges = AllToAll(position=group.position, near=near)
        self.sent_bytes = 0

    @classmethod
    def of(cls, group: MemoryGroup) -> "Member":
        return cls(group, NearMemory.meet(group.all_gather_ints, position=group.position, size=group.size))

    def begin(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> tuple[Exchange, torch.Tensor]:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        exchange = self.exchanges.prepare(out, rows, receive, send)
        self.sent_bytes += exchange.sent.nbytes
        # in bytes: one end of a pair may send rows of bytes where the other expects rows of floats
        sent = exchange.sent.clone().view(-1).view(torch.uint8)
        received = exchange.received.view(-1).view(torch.uint8)
        width = 1 if exchange.received.dtype == torch.uint8 else 16
        unit = 1 if exchange.sent.dtype == torch.uint8 else 16
        came = self.group.all_to_all(
            sent, [n * unit for n in exchange.send_counts], [n * width for n in exchange.receive_counts]
        )
        received.copy_(came)
        return exchange, out

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        exchange, out = self.begin(rows, send, receive)
        exchange.end()
        return out


def table(size: int, seed: int, most: int) -> list[list[int]]:
    """[sender][receiver] rows."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (size, size), generator=numbers).tolist()


def rows_of(counts: list[int], sender: int) -> torch.Tensor:
    """Every row says who sent it, to whom, and as what."""
    return torch.tensor([(sender, to, i, 7) for to, n in enumerate(counts) for i in range(n)]).float().view(-1, 4)


def expected(counts: list[list[int]], receiver: int) -> torch.Tensor:
    rows = [(sender, receiver, i, 7) for sender, row in enumerate(counts) for i in range(row[receiver])]
    return torch.tensor(rows).float().view(-1, 4)


@pytest.mark.parametrize("most", [3, 2 * LARGE], ids=["with_the_message", "through_memory"])
def test_every_row_comes_to_its_place_over_many_exchanges(most: int) -> None:
    def task(group: MemoryGroup) -> None:
        member = Member.of(group)
        for turn in range(6):
            counts = table(group.size, turn, most)
            mine = counts[group.position]
            came = member.all_to_all(
                rows_of(mine, group.position), mine, [counts[s][group.position] for s in range(group.size)]
            )
            assert torch.equal(came, expected(counts, group.position))

    together(task, 3)


def test_rows_through_memory_are_no_message() -> None:
    def task(group: MemoryGroup) -> int:
        member = Member.of(group)
        member.all_to_all(torch.zeros(2 * LARGE, 4), [LARGE, LARGE], [LARGE, LARGE])
        return member.sent_bytes

    assert max(together(task, 2)) < 100


def test_rows_of_an_exchange_under_way_stay_while_the_next_begin() -> None:
    def task(group: MemoryGroup) -> None:
        member = Member.of(group)
        counts = [LARGE, LARGE]
        begun = [member.begin(torch.full((2 * LARGE, 4), float(turn)), counts, counts) for turn in range(3)]
        for turn, (exchange, out) in enumerate(begun):
            exchange.end()
            assert (out == turn).all()

    together(task, 2)


def test_memory_is_used_again() -> None:
    def task(group: MemoryGroup) -> int:
        member = Member.of(group)
        for _ in range(20):
            member.all_to_all(torch.zeros(2 * LARGE, 4), [LARGE, LARGE], [LARGE, LARGE])
        assert member.near is not None
        return max(end for _, end in member.near._own._held.values())

    assert max(together(task, 2)) < 4 * LARGE * 16


def test_a_member_whose_memory_nobody_sees_gets_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    real = near_memory._OwnFile
    made: list[Any] = []

    def only_two() -> Any:
        with lock:
            if len(made) == 2:
                raise OSError("no memory files here")
            made.append(real())
            return made[-1]

    monkeypatch.setattr(near_memory, "_OwnFile", only_two)

    def task(group: MemoryGroup) -> int:
        member = Member.of(group)
        counts = [[LARGE] * 3] * 3
        came = member.all_to_all(rows_of(counts[0], group.position), counts[0], counts[0])
        assert torch.equal(came, expected(counts, group.position))
        return member.sent_bytes

    assert max(together(task, 3)) > LARGE * 16


def test_a_file_that_holds_another_secret_is_not_read() -> None:
    own = near_memory._OwnFile()
    pid, fd, first, second = own.address

    assert near_memory._open((pid, fd, first, second)) is not None
    assert near_memory._open((pid, fd, first, second ^ 1)) is None


def test_what_is_no_memory_file_is_not_opened() -> None:
    with Path(os.devnull).open() as other:
        assert near_memory._open((os.getpid(), other.fileno(), 1, 2)) is None
    assert near_memory._open((0, 0, 0, 0)) is None
