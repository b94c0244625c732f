"""Where copies go: the part of an assignment that keeps copies of one expert on distinct ranks.

A copy is placed where it fits best; when every rank that lacks the expert is full, other copies move over in a chain
(an augmenting path), so a copy is given up only if no arrangement at all could hold it.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moe_core.experts.checks import FloatArray


@dataclass(slots=True)
class Layout:
    """One layer under construction: `holds[r]` are the experts on rank r; `home[e]` is the rank of e's first copy."""

    room: list[int]
    num_logical: int
    holds: list[set[int]] = field(default_factory=list)
    home: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.holds = [set() for _ in self.room]
        self.copies = [0] * self.num_logical

    def free(self, rank: int) -> int:
        return min(self.room[rank], self.num_logical) - len(self.holds[rank])

    def put(self, logical: int, rank: int) -> None:
        self.holds[rank].add(logical)
        self.copies[logical] += 1

    def place_homes(self) -> None:
        """One copy of each expert, contiguous over the ranks, shares in proportion to the ranks' slots."""
        for rank, share in enumerate(_shares(self.num_logical, self.room)):
            for _ in range(share):
                self.put(len(self.home), rank)
                self.home.append(rank)

    def copied_homes(self, rank: int) -> int:
        return sum(1 for logical, home in enumerate(self.home) if home == rank and self.copies[logical] > 1)

    def place_copy(self, logical: int, rank_load: FloatArray) -> bool:
        """Put one more copy on the least loaded rank that lacks it; False if no arrangement can hold it."""
        open_ranks = [r for r in range(len(self.room)) if logical not in self.holds[r] and self.free(r) > 0]
        if open_ranks:
            home, num_ranks = self.home[logical], len(self.room)
            guests = [sum(1 for other in self.holds[r] if self.home[other] == home) for r in range(num_ranks)]
            best = min(open_ranks, key=lambda r: (rank_load[r], -self.free(r), guests[r], (r - home) % num_ranks))
            self.put(logical, best)
            return True
        return self._make_room(logical)

    def _make_room(self, logical: int) -> bool:
        """Shift copies along the shortest chain that ends at a free slot. Homes stay where they are."""
        came_by: dict[int, tuple[int, int] | None] = {
            r: None for r in range(len(self.room)) if logical not in self.holds[r]
        }
        queue = deque(sorted(came_by))
        while queue:
            rank = queue.popleft()
            if self.free(rank) > 0:
                self._shift(logical, rank, came_by)
                return True
            for other in sorted(self.holds[rank]):
                if self.home[other] == rank:
                    continue
                for target in range(len(self.room)):
                    if target not in came_by and other not in self.holds[target]:
                        came_by[target] = (rank, other)
                        queue.append(target)
        return False

    def _shift(self, logical: int, end: int, came_by: dict[int, tuple[int, int] | None]) -> None:
        rank, step = end, came_by[end]
        while step is not None:
            source, moved = step
            self.holds[source].discard(moved)
            self.holds[rank].add(moved)
            rank, step = source, came_by[source]
        self.put(logical, rank)

    def row(self) -> tuple[tuple[int, ...], ...]:
        """Per rank: homes ascending, then copies ascending; shorter than its room where a slot stays empty."""
        return tuple(
            tuple(sorted(held, key=lambda e: (self.home[e] != rank, e))) for rank, held in enumerate(self.holds)
        )


def _shares(total: int, room: list[int]) -> list[int]:
    """`total` split over ranks in proportion to their room (largest remainders first), never above it."""
    slots = sum(room)
    shares = [total * r // slots for r in room]
    by_remainder = sorted(range(len(room)), key=lambda r: (-(total * room[r] % slots), r))
    for rank in by_remainder[: total - sum(shares)]:
        shares[rank] += 1
    return shares


def lay_out(room: list[int], num_logical: int, load_E: FloatArray | None) -> Layout:
    """One layer: homes first, then a copy at a time until the slots are full or no copy can go anywhere useful.

    With a load the expert with the most load per copy comes next; without one the least copied, taken from the rank
    whose homes are least copied, so that every rank holds a mix of copied and uncopied experts.
    """
    layout = Layout(room=list(room), num_logical=num_logical)
    layout.place_homes()
    stuck = np.zeros(num_logical, dtype=bool)
    max_copies = sum(1 for r in room if r)
    copied_of_rank = [0] * len(room)
    rank_load = np.zeros(len(room))
    if load_E is not None:
        np.add.at(rank_load, layout.home, load_E)
    while any(layout.free(r) for r in range(len(room))):
        candidates = [e for e in range(num_logical) if not stuck[e] and layout.copies[e] < max_copies]
        if not candidates:
            break
        if load_E is None:
            copies, home = layout.copies, layout.home
            chosen = min(candidates, key=lambda e: (copies[e], copied_of_rank[home[e]], e))
        else:
            chosen = max(candidates, key=lambda e: (load_E[e] / layout.copies[e], -layout.copies[e], -e))
        if not layout.place_copy(chosen, rank_load):
            stuck[chosen] = True
            continue
        copied_of_rank[layout.home[chosen]] += 1
        if load_E is not None:
            rank_load = _rank_load(layout, load_E)
    return layout


def _rank_load(layout: Layout, load_E: FloatArray) -> FloatArray:
    per_copy = load_E / np.asarray(layout.copies)
    return np.asarray([per_copy[sorted(held)].sum() for held in layout.holds])
