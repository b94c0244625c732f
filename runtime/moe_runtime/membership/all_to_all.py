"""What a group's all-to-all really sends: rows to ranks of other machines, and word of rows in memory to near ones.

Which way a pair's rows go follows from their number, which both ends know, and from who reads whose memory, on which
all have agreed: so the two ends of a pair always expect the same message.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_runtime.membership.near_memory import NearMemory

_WORD_BYTES = 8
"""Where in the sender's memory the rows begin."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What goes to the backend; `end` puts what came where it belongs. All tensors must stay until then."""

    received: torch.Tensor
    sent: torch.Tensor
    receive_counts: list[int]
    send_counts: list[int]
    end: Callable[[], None]


class AllToAll:
    """An epoch's exchanges, prepared and ended in one order on all ranks."""

    def __init__(self, *, position: int, near: NearMemory | None) -> None:
        self._position, self._near = position, near
        self._begun = self._over = 0

    def prepare(
        self, out: torch.Tensor, rows: torch.Tensor, receive_counts: Sequence[int], send_counts: Sequence[int]
    ) -> Exchange:
        """out and rows are contiguous and of one kind."""
        number, over = self._begun, self._over
        self._begun += 1

        def ended() -> None:
            self._over = number + 1
            if self._near is not None:
                # whoever took part in this exchange had ended all that this rank had when it began it
                self._near.forget(before=over)

        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        going, coming = ([n * row_bytes for n in counts] for counts in (send_counts, receive_counts))
        near = self._near
        if near is None or not (near.carries_any_to(going) or near.carries_any_from(coming)):
            return Exchange(out, rows, list(receive_counts), list(send_counts), ended)

        parts = list(torch.split(rows.view(-1).view(torch.uint8), going))
        places = torch.split(out.view(-1).view(torch.uint8), coming)
        places[self._position].copy_(parts[self._position])
        parts[self._position] = parts[self._position][:0]
        laid = [p for p, num_bytes in enumerate(going) if near.carries_to(p, num_bytes)]
        if laid:
            begins = torch.tensor(near.lay(number, [parts[p] for p in laid]), dtype=torch.int64)
            for p, word in zip(laid, begins.view(-1, 1).view(torch.uint8), strict=True):
                parts[p] = word
        lengths = [_WORD_BYTES if near.carries_from(p, num_bytes) else num_bytes for p, num_bytes in enumerate(coming)]
        lengths[self._position] = 0
        received = torch.empty(sum(lengths), dtype=torch.uint8)

        def end() -> None:
            for p, (message, place) in enumerate(zip(torch.split(received, lengths), places, strict=True)):
                if near.carries_from(p, len(place)):
                    place.copy_(near.view(p, int.from_bytes(message.numpy().tobytes(), "little"), len(place)))
                elif p != self._position:
                    place.copy_(message)
            ended()

        return Exchange(received, torch.cat(parts), lengths, [len(part) for part in parts], end)
