"""Where copies go: the part of an assignment that keeps copies of one expert on distinct ranks.

A copy is placed where it fits best; when every rank that lacks the expert is full, other copies move over in a chain
(an augmenting path), so a copy is given up only if no arrangement at all could hold it.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_core.experts.checks import FloatArray, IntArray


class Layout:
    """One layer under construction; R ranks, E logical experts.

    holds_RE: which experts a rank holds; home_E: the rank of the first copy; copies_E: how many there are;
    guests_RR: how many of the experts at home on the second rank the first one holds.
    """

    def __init__(self, room: Sequence[int], num_logical: int) -> None:
        num_ranks = len(room)
        self.room_R: IntArray = np.asarray(room, dtype=np.int64)
        self.free_R: IntArray = np.minimum(self.room_R, num_logical)
        self.holds_RE: NDArray[np.bool_] = np.zeros((num_ranks, num_logical), dtype=bool)
        self.copies_E: IntArray = np.zeros(num_logical, dtype=np.int64)
        self.home_E: IntArray = np.repeat(np.arange(num_ranks), proportional_shares(num_logical, room))
        self.guests_RR: IntArray = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        for logical, home in enumerate(self.home_E.tolist()):  # contiguous, in proportion to the ranks' slots
            self._put(logical, home)

    def _put(self, logical: int, rank: int, step: int = 1) -> None:
        self.holds_RE[rank, logical] = step > 0
        self.free_R[rank] -= step
        self.copies_E[logical] += step
        self.guests_RR[rank, self.home_E[logical]] += step

    def place_copy(self, logical: int, rank_load_R: FloatArray) -> bool:
        """Put one more copy on the least loaded rank that lacks it; False if no arrangement can hold it.

        Of equals: most free slots, fewest guests of the same home, nearest after home.
        """
        home, num_ranks = int(self.home_E[logical]), len(self.room_R)
        open_ranks = np.flatnonzero(~self.holds_RE[:, logical] & (self.free_R > 0))
        if open_ranks.size == 0:
            return self._make_room(logical)
        ring = (open_ranks - home) % num_ranks
        keys = (ring, self.guests_RR[open_ranks, home], -self.free_R[open_ranks], rank_load_R[open_ranks])
        self._put(logical, int(open_ranks[np.lexsort(keys)[0]]))
        return True

    def _make_room(self, logical: int) -> bool:
        """Shift copies along the shortest chain that ends at a free slot. Homes stay where they are."""
        first = np.flatnonzero(~self.holds_RE[:, logical]).tolist()
        came_by: dict[int, tuple[int, int] | None] = dict.fromkeys(first)
        queue = deque(first)
        while queue:
            rank = queue.popleft()
            if self.free_R[rank] > 0:
                self._shift(logical, rank, came_by)
                return True
            for other in np.flatnonzero(self.holds_RE[rank] & (self.home_E != rank)).tolist():
                for target in np.flatnonzero(~self.holds_RE[:, other]).tolist():
                    if target not in came_by:
                        came_by[target] = (rank, other)
                        queue.append(target)
        return False

    def _shift(self, logical: int, end: int, came_by: dict[int, tuple[int, int] | None]) -> None:
        rank, step = end, came_by[end]
        while step is not None:
            source, moved = step
            self._put(moved, source, -1)
            self._put(moved, rank)
            rank, step = source, came_by[source]
        self._put(logical, rank)

    def rows(self) -> list[list[int]]:
        """Per rank: homes ascending, then copies ascending; shorter than its room where a slot stays empty."""
        found = []
        for rank in range(len(self.room_R)):
            held = np.flatnonzero(self.holds_RE[rank])
            at_home = self.home_E[held] == rank
            found.append([*held[at_home].tolist(), *held[~at_home].tolist()])
        return found


def proportional_shares(total: int, room: Sequence[int]) -> list[int]:
    """`total` split over ranks in proportion to their room (largest remainders first), never above it."""
    slots = sum(room)
    shares = [total * r // slots for r in room]
    by_remainder = sorted(range(len(room)), key=lambda r: (-(total * room[r] % slots), r))
    for rank in by_remainder[: total - sum(shares)]:
        shares[rank] += 1
    return shares


def lay_out(room: Sequence[int], num_logical: int, load_E: FloatArray | None, *, least: int = 1) -> Layout:
    """One layer: homes first, then a copy at a time until the slots are full or no copy can go anywhere useful.

    With a load the expert with the most load per copy comes next, those with fewer than `least` before all others;
    without one the least copied, taken from the rank whose homes are least copied, so that every rank holds a mix of
    copied and uncopied experts.
    """
    layout = Layout(room, num_logical)
    max_copies = sum(1 for r in room if r)
    copied_of_home = np.zeros(len(room), dtype=np.int64)
    rank_load_R = np.zeros(len(room))
    stuck_E = layout.copies_E >= max_copies
    while layout.free_R.any() and not stuck_E.all():
        open_E = np.flatnonzero(~stuck_E)
        copies = layout.copies_E[open_E]
        if load_E is None:
            chosen = int(open_E[np.lexsort((copied_of_home[layout.home_E[open_E]], copies))[0]])
        else:
            chosen = int(open_E[np.lexsort((copies, -load_E[open_E] / copies, copies >= least))[0]])
            rank_load_R = (layout.holds_RE * (load_E / layout.copies_E)).sum(-1)
        if layout.place_copy(chosen, rank_load_R):
            copied_of_home[layout.home_E[chosen]] += 1
            stuck_E[chosen] = layout.copies_E[chosen] >= max_copies
        else:
            stuck_E[chosen] = True
    return layout
