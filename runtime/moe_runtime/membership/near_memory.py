"""Rows between ranks of one machine go through memory that both see, and a word of them through a pipe.

Gloo knows nothing but sockets, also inside a machine: each byte is copied into the kernel and out of it, and each
exchange is a round of three messages between any two ranks, through a thread of its own. Here a sender copies rows into
a memory file and says where they lie (`near_words`); the receiver copies them out. Two members are near when each reads
the other's memory; the group does the rest.

A place in the file is used again once every near member has said that it has ended the exchange of what lay there.

Memory files (memfd) have no name that could be left behind; readers open them through /proc, check that they hold the
secret they were told, and map them for reading only. Ranks in pods of their own see each other's not, and send as ever.
"""

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_runtime.membership.near_words import NearWords, Word

RESERVED_BYTES = 1 << 36
"""Of address space for one member's rows. Memory is taken as it is needed."""
_HEAD_BYTES = 64
_ALIGNED = 64
_NAME = "moerator-rows"

Bytes = npt.NDArray[np.uint8]
"""[n]; numpy's, whose slices cost a tenth of torch's."""
Gather = Callable[[Sequence[int]], list[list[int]]]


class NearMemory:
    """One member's file, its view of the others', and words to and from them.

    members: positions that are near this one. is_all: any two are near, on which all agree.
    """

    def __init__(
        self,
        own: "_OwnFile",
        views: dict[int, Bytes],
        words: NearWords,
        *,
        members: Sequence[int],
        is_all: bool,
    ) -> None:
        self._own, self._views, self._words = own, views, words
        self.members, self.is_all = members, is_all
        self._over = dict.fromkeys(self.members, 0)

    @classmethod
    def meet(cls, gather: Gather, *, ranks: Sequence[int], position: int) -> "NearMemory | None":
        """All members call this together. None: no other member is near."""
        size = len(ranks)
        try:
            own, words = _OwnFile(), NearWords(ranks, position=position)
        except (OSError, ValueError):  # no such files here, no address space, no pipes: sockets do as well
            gather((0,) * (4 + 2 * size))
            gather((0,) * size)
            return None
        views: dict[int, Bytes] = {}
        try:
            told = gather((*own.address, *words.address))
            for p in [p for p in range(size) if p != position]:
                view = _open(told[p][:4])
                if view is not None and words.open(p, pid=told[p][0], told=told[p][4:], own_position=position):
                    views[p] = view
            reads = gather([int(p in views) for p in range(size)])
        except BaseException:
            words.close()  # at once, not when the exception is forgotten: others may wait for a word already
            raise
        # from the next one on, so that not all read the same member's memory at a time
        others = [(position + i) % size for i in range(1, size)]
        members = [p for p in others if p in views and reads[p][position]]
        words.keep(members)
        if not members:
            return None
        is_all = all(reads[p][q] for p in range(size) for q in range(size) if p != q)
        return cls(own, views, words, members=members, is_all=is_all)

    def lay(self, number: int, *parts_of: Sequence[Bytes], over: int) -> None:
        """Copy exchange `number` into the file, for each near member its part of each of `parts_of`, by position one
        after the other, and tell it.

        over: exchanges numbered below have ended here. Raises RuntimeError for a member that is gone.
        """
        lengths = [sum(len(parts[p]) for parts in parts_of) for p in self.members]
        sizes = [-(-length // _ALIGNED) * _ALIGNED for length in lengths]
        begin = self._own.take(number, sum(sizes))
        for p, length, size in zip(self.members, lengths, sizes, strict=True):
            place = begin
            for parts in parts_of:
                end = place + len(parts[p])
                self._own.bytes[place:end] = parts[p]
                place = end
            self._words.say(p, Word(number, begin, length, over))
            begin += size

    def lay_for_all(self, number: int, rows: Bytes, *, over: int) -> None:
        """The same bytes for every near member: copied once."""
        place = self._own.take(number, len(rows))
        self._own.bytes[place : place + len(rows)] = rows
        for p in self.members:
            self._words.say(p, Word(number, place, len(rows), over))

    def heard(self, number: int, *, until: float) -> Iterator[tuple[int, Bytes]]:
        """Each near member and the bytes [n] that it has laid for this one, to be read before this exchange ends.

        until: by time.monotonic. Raises RuntimeError for a member that dies or lets that pass.
        """
        for p in self.members:
            word = self._words.hear(p, number, until=until)
            self._over[p] = max(self._over[p], word.over)
            yield p, self._views[p][word.place : word.place + word.num_bytes]
        self._own.free(min(self._over.values()))

    def close(self) -> None:
        """Who waits for this member knows at once. Idempotent."""
        self._words.close()


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
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
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


def _open(told: Sequence[int]) -> Bytes | None:
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
        return np.frombuffer(view, dtype=np.uint8)
    return None
