"""What becomes of a group's all-to-all: near members get their rows through memory, the others through the backend.

Who is near whom has been agreed on when the group was built. Where all are near, the backend has no part in it, and how
many rows come need not be known beforehand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.membership.near_memory import Bytes, NearMemory


@dataclass(frozen=True, slots=True)
class Far:
    """What goes to the backend. All tensors must stay until that is over."""

    received: torch.Tensor
    sent: torch.Tensor
    receive_counts: list[int]
    send_counts: list[int]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One that has begun, `number` of this epoch. far: None where nothing goes to the backend.

    end(until) after the backend's part is over: everything is where it belongs. until: how long to wait for near
    members, by time.monotonic. Raises RuntimeError.
    """

    number: int
    far: Far | None
    end: Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Heard:
    """Rows by position as their senders counted them, and what was told beside them: told_GC [members, C] int64."""

    rows: torch.Tensor
    counts: list[int]
    told_GC: torch.Tensor


class AllToAll:
    """An epoch's exchanges; all ranks begin the same ones in one order."""

    def __init__(self, *, position: int, near: NearMemory | None) -> None:
        self._position, self._near = position, near
        self._begun = 0
        self._open: set[int] = set()

    @property
    def is_near(self) -> bool:
        """Whether all members are near; they all say the same."""
        return self._near is not None and self._near.is_all

    def begin(
        self, out: torch.Tensor, rows: torch.Tensor, receive_counts: Sequence[int], send_counts: Sequence[int]
    ) -> Exchange:
        """out and rows are contiguous and of one kind. Raises RuntimeError."""
        near, (number, over) = self._near, self._next()
        if near is None:

            def over_there(_: float) -> None:
                self._open.remove(number)

            return Exchange(number, Far(out, rows, list(receive_counts), list(send_counts)), over_there)
        parts, places = _parts(rows, send_counts), _parts(out, receive_counts)
        near.lay(number, parts, over=over)
        places[self._position][:] = parts[self._position]
        far = None if near.is_all else self._far(parts, places, near)

        def end(until: float) -> None:
            _fetch(near, number, places, until)
            if far is not None:
                for p, message in enumerate(_parts(far.received, far.receive_counts)):
                    if len(message):
                        places[p][:] = message
            self._open.remove(number)

        return Exchange(number, far, end)

    def tell(self, rows: torch.Tensor, send_counts: Sequence[int], told_GC: torch.Tensor) -> Callable[[float], Heard]:
        """Rows to members that do not know how many come, and told_GC[p] to each. Only where all are near.

        What ends it, by when (time.monotonic), gives what came. Both raise RuntimeError.
        """
        near, (number, over) = self._near, self._next()
        assert near is not None and near.is_all, "somebody is far"
        mine, each = self._position, (1,) * len(told_GC)
        parts, beside = _parts(rows, send_counts), _parts(told_GC.contiguous(), each)
        near.lay(number, beside, parts, over=over)
        head, row_bytes = len(beside[mine]), _row_bytes(rows)

        def end(until: float) -> Heard:
            laid = dict(near.heard(number, until=until))
            counts = [send_counts[mine] if p == mine else (len(laid[p]) - head) // row_bytes for p in range(len(parts))]
            out, heard_GC = rows.new_empty(sum(counts), *rows.shape[1:]), torch.empty_like(told_GC)
            places, told = _parts(out, counts), _parts(heard_GC, each)
            for p, (place, beside_place) in enumerate(zip(places, told, strict=True)):
                place[:] = parts[p] if p == mine else laid[p][head:]
                beside_place[:] = beside[p] if p == mine else laid[p][:head]
            self._open.remove(number)
            return Heard(out, counts, heard_GC)

        return end

    def sum(self, tensor: torch.Tensor, *, until: float) -> None:
        """Over all members, in place. Each sums a part of it, so that all get the same bits. Only where all are near.

        until: by time.monotonic. Raises RuntimeError.
        """
        assert self._near is not None
        size = len(self._near.members) + 1
        flat_N = tensor.detach().contiguous().view(-1)
        counts = [len(part) for part in torch.tensor_split(flat_N, size)]
        own = [counts[self._position]] * size
        parts_N = flat_N.new_empty(sum(own))
        self.begin(parts_N, flat_N, own, counts).end(until)
        sums_N = parts_N.view(size, -1).sum(0, dtype=tensor.dtype)
        number, over = self._next()
        [mine], places = _parts(sums_N, own[:1]), _parts(flat_N, counts)
        self._near.lay_for_all(number, mine, over=over)
        places[self._position][:] = mine
        _fetch(self._near, number, places, until)
        self._open.remove(number)
        if not tensor.is_contiguous():  # else flat_N is its memory
            tensor.detach().copy_(flat_N.view_as(tensor))

    def _next(self) -> tuple[int, int]:
        """Number of an exchange that begins, and below which all have ended here."""
        number, over = self._begun, min(self._open, default=self._begun)
        self._begun += 1
        self._open.add(number)
        return number, over

    def _far(self, parts: Sequence[Bytes], places: Sequence[Bytes], near: NearMemory) -> Far:
        here = {self._position, *near.members}
        # nothing goes from one that is near all others, who are not near each other: it takes part all the same
        sent = torch.from_numpy(np.concatenate([part[:0] if p in here else part for p, part in enumerate(parts)]))
        lengths = [0 if p in here else len(place) for p, place in enumerate(places)]
        received = torch.empty(sum(lengths), dtype=torch.uint8)
        return Far(received, sent, lengths, [0 if p in here else len(part) for p, part in enumerate(parts)])

    def close(self) -> None:
        """Near members that wait for this one know at once. Idempotent."""
        if self._near is not None:
            self._near.close()
            self._near = None


def _fetch(near: NearMemory, number: int, places: Sequence[Bytes], until: float) -> None:
    for p, laid in near.heard(number, until=until):
        if len(laid) != len(places[p]):
            raise RuntimeError(f"position {p} sends {len(laid)} bytes, {len(places[p])} are expected")
        places[p][:] = laid


def _row_bytes(rows: torch.Tensor) -> int:
    return rows.element_size() * math.prod(rows.shape[1:])


def _parts(rows: torch.Tensor, counts: Sequence[int]) -> list[Bytes]:
    """By position the bytes [n] of that many rows, in place."""
    row_bytes, begin, parts = _row_bytes(rows), 0, []
    all_bytes = rows.view(-1).view(torch.uint8).numpy()
    for count in counts:
        end = begin + count * row_bytes
        parts.append(all_bytes[begin:end])
        begin = end
    return parts
