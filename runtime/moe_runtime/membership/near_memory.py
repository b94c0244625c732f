"""Rows between ranks of one machine go through memory that both see, and only word of them through the group.

Gloo knows nothing but sockets, also inside a machine: each byte is copied into the kernel and out of it. Here a sender
copies rows into a memory file of its own, its message says where, and the receiver copies them out. The message is
still an exchange of the epoch's group, so deadlines, faults and order are the group's: a peer that dies or hangs is
seen there, and whoever has the message has the rows.

A place in the file is used again once every reader is known to have taken what lay there. A message of exchange m says
so of all that were over when m began, since all members begin and end the same exchanges in the same order.

Memory files (memfd) have no name that could be left behind; readers open them through /proc, check that they hold the
secret they were told, and map them for reading only. Ranks in pods of their own see each other's not, and send as ever.
"""

import contextlib
import mmap
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

RESERVED_BYTES = 1 << 34
"""Of address space for one member's rows. Memory is taken as it is needed."""
LEAST_BYTES = 64 << 10
"""Between two members in one exchange: less goes with the message itself, which then takes no longer."""
_HEAD_BYTES = 64
_ALIGNED = 64
_NAME = "moerator-rows"

Gather = Callable[[Sequence[int]], list[list[int]]]


class NearMemory:
    """One member's file and its view of the others'. `readers` read mine."""

    def __init__(self, own: "_OwnFile", views: dict[int, torch.Tensor], readers: frozenset[int], *, size: int) -> None:
        self._own, self._views, self.readers = own, views, readers
        self._most_bytes = RESERVED_BYTES // 8 // size

    @classmethod
    def meet(cls, gather: Gather, *, position: int, size: int) -> "NearMemory | None":
        """All members call this together. None: no other member reads this one's memory or is read by it."""
        own = None
        with contextlib.suppress(OSError, ValueError):  # no memory files here, or no address space: sockets do as well
            own = _OwnFile()
        told = gather(own.address if own is not None else (0, 0, 0, 0))
        others = [p for p in range(size) if p != position and own is not None]  # who has no file reads none either
        views = {p: view for p in others if (view := _open(told[p])) is not None}
        reads = gather([int(p in views) for p in range(size)])
        readers = frozenset(p for p in range(size) if p != position and reads[p][position])
        if own is None or not (readers or views):
            return None
        return cls(own, views, readers, size=size)

    def carries_any_to(self, bytes_of: Sequence[int]) -> bool:
        return any(self.carries_to(p, n) for p, n in enumerate(bytes_of))

    def carries_any_from(self, bytes_of: Sequence[int]) -> bool:
        return any(self.carries_from(p, n) for p, n in enumerate(bytes_of))

    def carries_to(self, position: int, num_bytes: int) -> bool:
        return position in self.readers and LEAST_BYTES < num_bytes <= self._most_bytes

    def carries_from(self, position: int, num_bytes: int) -> bool:
        return position in self._views and LEAST_BYTES < num_bytes <= self._most_bytes

    def lay(self, number: int, rows_of: Sequence[torch.Tensor]) -> list[int]:
        """Copy bytes [n] of exchange `number` into the file; where each begins."""
        sizes = [-(-len(part) // _ALIGNED) * _ALIGNED for part in rows_of]
        start = self._own.take(number, sum(sizes))
        places = []
        for part, taken in zip(rows_of, sizes, strict=True):
            self._own.bytes[start : start + len(part)].copy_(part)
            places.append(start)
            start += taken
        return places

    def view(self, position: int, place: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] of a member's file: to be read before this exchange ends."""
        return self._views[position][place : place + num_bytes]

    def forget(self, before: int) -> None:
        """Exchanges numbered below have been read by all."""
        self._own.free(before)


class _OwnFile:
    """Raises OSError where there are no such files, ValueError where its address space is not to be had."""

    def __init__(self) -> None:
        self._fd = os.memfd_create(_NAME)
        try:
            os.ftruncate(self._fd, RESERVED_BYTES)
            self._map = mmap.mmap(self._fd, RESERVED_BYTES)
        except BaseException:
            os.close(self._fd)
            raise
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._secret = secrets.token_bytes(16)
        self._map[:16] = self._secret
        self._held: dict[int, tuple[int, int]] = {}  # by number of exchange: first byte and the one past the last

    @property
    def address(self) -> tuple[int, ...]:
        halves = (int.from_bytes(self._secret[i : i + 8], "little", signed=True) for i in (0, 8))
        return os.getpid(), self._fd, *halves

    def take(self, number: int, num_bytes: int) -> int:
        """The first gap that is large enough."""
        start = _HEAD_BYTES
        for first, end in sorted(self._held.values()):
            if first - start >= num_bytes:
                break
            start = max(start, end)
        if start + num_bytes > RESERVED_BYTES:
            raise MemoryError(f"{num_bytes} bytes of rows do not fit behind {len(self._held)} exchanges under way")
        self._held[number] = (start, start + num_bytes)
        return start

    def free(self, before: int) -> None:
        for number in [number for number in self._held if number < before]:
            del self._held[number]

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._fd)


def _open(told: Sequence[int]) -> torch.Tensor | None:
    """The bytes of a member's file, None where this process cannot see it."""
    pid, fd, *halves = told
    path = f"/proc/{pid}/fd/{fd}"
    with contextlib.suppress(OSError, ValueError):
        if pid <= 0 or not str(Path(path).readlink()).startswith(f"/memfd:{_NAME}"):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            view = mmap.mmap(handle, RESERVED_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(handle)
        if view[:16] != b"".join(half.to_bytes(8, "little", signed=True) for half in halves):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it must not be written: nobody does
            return torch.frombuffer(view, dtype=torch.uint8)
    return None
