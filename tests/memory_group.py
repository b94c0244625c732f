"""A group of ranks that are threads of one process: what collectives exchange, without sockets or processes.

`together(task, num_ranks)` calls `task(group)` in a thread for each rank and returns the results by position.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from moe_runtime.errors import GroupFault
from moe_runtime.membership.all_to_all import Heard

T = TypeVar("T")
WAIT_S = 20.0


class _Meeting:
    """What the ranks bring to one collective after the other."""

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def meet(self, position: int, mine: Any) -> list[Any]:
        try:
            self.brought[position] = mine
            self.barrier.wait(WAIT_S)
            all_of_them = list(self.brought)
            self.barrier.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise GroupFault("a rank is gone") from None
        return all_of_them


class MemoryGroup:
    """One rank's side. Checks what a backend would only hang on: that all ranks call the same, with counts that fit."""

    def __init__(
        self, meeting: _Meeting, position: int, domains: Sequence[str] | None = None, *, tells: bool = False
    ) -> None:
        self._meeting, self.position = meeting, position
        self.size = len(meeting.brought)
        self.ranks = tuple(range(self.size))
        self.domains = None if domains is None else tuple(domains)
        self.sent_rows = [0] * self.size
        self.sent_bytes = [0] * self.size
        self.num_exchanges = 0
        self.tells = tells

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        assert len(send_counts) == len(receive_counts) == self.size
        assert sum(send_counts) == len(rows)
        mine = self._exchange("all_to_all", rows, send_counts)
        assert [len(part) for part in mine] == list(receive_counts), f"{[len(p) for p in mine]} {receive_counts}"
        return torch.cat(mine)

    def swap(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        parts = self._meeting.meet(self.position, ("swap", torch.split(rows.detach(), list(counts))))
        mine = [sent[self.position] for what, sent in parts if what == "swap"]
        assert [len(part) for part in mine] == list(counts), f"{[len(p) for p in mine]} {counts}"
        return torch.cat(mine)

    def _exchange(self, name: str, rows: torch.Tensor, send_counts: Sequence[int]) -> list[torch.Tensor]:
        parts = self._meeting.meet(self.position, (name, torch.split(rows.detach(), list(send_counts))))
        assert {what for what, _ in parts} == {name}
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        self.num_exchanges += 1
        for position, count in enumerate(send_counts):
            self.sent_rows[position] += count
            self.sent_bytes[position] += count * row_bytes
        return [sent[self.position] for _, sent in parts]

    def post_all_to_all(
        self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> "_Posted[torch.Tensor]":
        return _Posted(self.all_to_all(rows, send_counts, receive_counts))

    def post_telling(self, rows: torch.Tensor, send_counts: Sequence[int], told_GC: torch.Tensor) -> "_Posted[Heard]":
        assert self.tells
        mine = self._exchange("tell", rows, send_counts)
        told = self._meeting.meet(self.position, ("told", told_GC))
        assert {what for what, _ in told} == {"told"}
        heard_GC = torch.stack([told_GC[self.position] for _, told_GC in told])
        return _Posted(Heard(torch.cat(mine), [len(part) for part in mine], heard_GC))

    def all_gather_ints(self, row: Sequence[int], *, timeout_ms: int | None = None) -> list[list[int]]:
        rows = self._meeting.meet(self.position, ("all_gather", list(row)))
        assert {what for what, _ in rows} == {"all_gather"}
        return [list(given) for _, given in rows]

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        given = self._meeting.meet(self.position, ("all_reduce", tensor.clone()))
        tensor.copy_(torch.stack([one for _, one in given]).sum(0))


class _Posted(Generic[T]):
    def __init__(self, received: T) -> None:
        self._received = received

    def wait(self) -> T:
        return self._received


def together(
    task: Callable[[MemoryGroup], T], num_ranks: int, *, domains: Sequence[str] | None = None, tells: bool = False
) -> list[T]:
    """Raises what a rank raised first."""
    meeting = _Meeting(num_ranks)
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(position: int) -> None:
        try:
            results[position] = task(MemoryGroup(meeting, position, domains, tells=tells))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's own thread
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(position,), daemon=True) for position in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    if errors:
        raise next((error for error in errors if not isinstance(error, GroupFault)), errors[0])
    return results
