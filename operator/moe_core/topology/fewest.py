"""The fewest racks are known; which of them lie in the fewest blocks?

Any `num` racks with enough room are as good as each other by rule 2, so the levels above decide, broad to narrow. Three
steps, each only where the one before leaves a doubt: a bound that no choice of blocks can beat, the largest blocks, and
an exact search over blocks.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from moe_core.topology.tree import BoolArray, IntArray

MAX_CELLS = 1 << 21
"""Cells that the exact search may fill: 4 ms for 50 blocks of 6 racks, 25 ms at the limit (one core of a shared box).
Beyond it the largest blocks stand: still the fewest racks, and of blocks at most a few more than needed."""


def largest_first(domains: IntArray, caps: IntArray) -> IntArray:
    """Those with room, ties in path order."""
    domains = domains[caps[domains] > 0]
    return domains[np.lexsort((domains, -caps[domains]))]


def fewest_parents(
    domains: IntArray, caps: IntArray, parents: IntArray, at_home: Collection[int], *, num: int, missing: int
) -> IntArray:
    """`domains`, largest first, without those of parents that are not needed.

    `num` of the result hold `missing`. Parents in `at_home` hold kept ranks and are used anyway.
    """
    room = caps[domains]
    names = np.flatnonzero(np.bincount(parents))
    parent_of = np.searchsorted(names, parents)
    is_home = np.array([name in at_home for name in names.tolist()], bool)
    best_of = np.array([room[parent_of == p][:num].sum() for p in range(len(names))])
    order = [int(p) for p in np.lexsort((np.arange(len(names)), -best_of)) if not is_home[p]]

    def suffices(chosen: Sequence[int]) -> bool:
        open_to = is_home.copy()
        open_to[list(chosen)] = True
        return bool(room[open_to[parent_of]][:num].sum() >= missing)

    bound = int(best_of[is_home].sum())
    least = 0
    while bound < missing:
        bound += int(best_of[order[least]])
        least += 1
    count = next(j for j in range(least, len(order) + 1) if suffices(order[:j]))
    chosen = order[:count]
    if count > least and count * num * len(domains) <= MAX_CELLS:
        rows = [room[parent_of == p] for p in range(len(names))]
        chosen = _search(rows, is_home, num=num, missing=missing, most=count - 1, least=least) or chosen
    chosen = _tightest_last(chosen, order, best_of, suffices)
    open_to = is_home.copy()
    open_to[chosen] = True
    needed: IntArray = domains[open_to[parent_of]]
    return needed


def _tightest_last(
    chosen: list[int], order: Sequence[int], best_of: IntArray, suffices: Callable[[Sequence[int]], bool]
) -> list[int]:
    """Swaps the last one for the smallest that still will do, so that big parents stay whole."""
    if not chosen:
        return chosen
    *full, last = chosen
    smaller = sorted((p for p in order if p not in full and best_of[p] < best_of[last]), key=lambda p: (best_of[p], p))
    return [*full, next((p for p in smaller if suffices([*full, p])), last)]


def _search(
    rows: Sequence[IntArray], is_home: BoolArray, *, num: int, missing: int, most: int, least: int
) -> list[int] | None:
    """At most `most` parents, as few as possible, of which `num` domains hold `missing`; None if there are none.

    room_JN[j, n] is the most that n domains of j parents hold; parents come one by one, each gives any number.
    """
    room_JN = np.full((most + 1, num + 1), -1, np.int64)
    room_JN[:, 0] = 0
    given: list[npt.NDArray[np.int32]] = []
    for row, free in zip(rows, is_home, strict=True):
        grown = np.cumsum(row[:num])
        before, given_JN = room_JN.copy(), np.zeros(room_JN.shape, np.int32)
        source = before if free else before[:-1]
        target, told = (room_JN, given_JN) if free else (room_JN[1:], given_JN[1:])
        for count, room in enumerate(grown, start=1):
            with_row = np.where(source[:, : num + 1 - count] >= 0, source[:, : num + 1 - count] + room, -1)
            better = with_row > target[:, count:]
            target[:, count:][better] = with_row[better]
            told[:, count:][better] = count
        given.append(given_JN)
    for most_parents in range(least, most + 1):
        if room_JN[most_parents].max() >= missing:
            return _retrace(given, is_home, most_parents, int(np.argmax(room_JN[most_parents])))
    return None


def _retrace(given: Sequence[npt.NDArray[np.int32]], is_home: BoolArray, j: int, n: int) -> list[int]:
    chosen = []
    for parent in range(len(given) - 1, -1, -1):
        count = int(given[parent][j, n])
        n -= count
        if count and not is_home[parent]:
            chosen.append(parent)
            j -= 1
    return sorted(chosen)
