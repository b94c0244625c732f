"""Words between ranks of one machine, through pipes: that rows lie in memory, and where.

A pipe wakes who waits at its end, and ends when its writer dies: the kernel sees to both. Four ranks on two cores tell
each other a word in some 30 us, where an exchange over Gloo takes a millisecond. Each member has one pipe from every
other one, which opens the writing end through /proc as it opens the memory, so that nothing has a name that could be
left behind.
"""

import contextlib
import math
import os
import select
import stat
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Word:
    """number: of the exchange. place, num_bytes: where the rows begin in the speaker's memory. over: exchanges numbered
    below have ended at the speaker."""

    number: int
    place: int
    num_bytes: int
    over: int

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<4q")


class NearWords:
    """One member's pipes. Raises OSError where they are not to be had."""

    def __init__(self, ranks: Sequence[int], *, position: int) -> None:
        self._ranks = ranks
        self._hears: dict[int, int] = {}  # by position: the end that this member reads
        self._given: dict[int, int] = {}  # the other end, until its writer has opened it
        self._says: dict[int, int] = {}  # the end of another member's pipe
        self._polls: dict[int, select.poll] = {}
        self._early: dict[int, dict[int, Word]] = {}  # by position and number: heard before it was asked for
        try:
            for other in range(len(ranks)):
                if other != position:
                    self._hears[other], self._given[other] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self.close()
            raise

    @property
    def address(self) -> list[int]:
        """Two numbers for each position: the descriptor that it opens, and what it must find there."""
        ends = [self._given.get(p, -1) for p in range(len(self._ranks))]
        return [number for end in ends for number in ((end, os.fstat(end).st_ino) if end >= 0 else (end, 0))]

    def open(self, position: int, *, pid: int, told: Sequence[int], own_position: int) -> bool:
        """Whether this process can write into the pipe that a member's address has for it."""
        end, inode = told[2 * own_position : 2 * own_position + 2]
        try:
            opened = os.open(f"/proc/{pid}/fd/{end}", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        found = os.fstat(opened)
        if not stat.S_ISFIFO(found.st_mode) or found.st_ino != inode:
            os.close(opened)
            return False
        self._says[position] = opened
        return True

    def keep(self, members: Iterable[int]) -> None:
        """All members have opened what they could; only these speak to each other from now on."""
        kept = set(members)
        _close(self._given.values())  # while this process held it, the death of its writer would not end the pipe
        self._given.clear()
        for ends in (self._hears, self._says):
            _close(end for position, end in ends.items() if position not in kept)
            for position in [position for position in ends if position not in kept]:
                del ends[position]
        for position, end in self._hears.items():
            self._polls[position] = select.poll()
            self._polls[position].register(end, select.POLLIN)

    def say(self, position: int, word: Word) -> None:
        """Raises RuntimeError when nobody is there to hear it."""
        try:
            os.write(self._says[position], Word.FORMAT.pack(word.number, word.place, word.num_bytes, word.over))
        except OSError as error:
            raise RuntimeError(f"rank {self._ranks[position]} is gone: {error.strerror}") from None

    def hear(self, position: int, number: int, *, until: float) -> Word:
        """A member's word of exchange `number`.

        until: by time.monotonic. Raises RuntimeError when the member dies or lets that pass.
        """
        early = self._early.setdefault(position, {})
        while number not in early:
            word = self._next(position, until)
            early[word.number] = word
        return early.pop(number)

    def _next(self, position: int, until: float) -> Word:
        while True:
            with contextlib.suppress(BlockingIOError):
                said = os.read(self._hears[position], Word.FORMAT.size)
                if not said:
                    raise RuntimeError(f"rank {self._ranks[position]} is gone: its pipe has ended")
                return Word(*Word.FORMAT.unpack(said))
            left_ms = (until - time.monotonic()) * 1000
            if left_ms <= 0:
                raise RuntimeError(f"rank {self._ranks[position]} has not come in time")
            self._polls[position].poll(math.ceil(left_ms))

    def close(self) -> None:
        """Who waits for this member knows at once. Idempotent."""
        for ends in (self._hears, self._given, self._says):
            _close(ends.values())
            ends.clear()

    def __del__(self) -> None:
        self.close()


def _close(ends: Iterable[int]) -> None:
    for end in ends:
        os.close(end)
