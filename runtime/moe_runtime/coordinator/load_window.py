"""The load of the last minute or so, out of counters that only grow.

Ranks count from their start on; popularity is what the newest tokens say. What a pod had counted before this
coordinator first heard of it is left out: nobody can tell how old that is. The window moves on by an eighth of its
length at a time, so what it says, and what is derived from it, does not change with every report.
"""

from collections import deque

import numpy as np
import numpy.typing as npt

LoadLE = npt.NDArray[np.int64]
PARTS = 8


class LoadWindow:
    """Times are seconds of any clock that never falls.

    >>> window = LoadWindow(now=0.0)
    >>> for now, count in ((10.0, 5), (40.0, 7), (70.0, 9)):
    ...     window.note("pod", np.array([[count]]))
    ...     window.tick(now, length_s=60.0)
    >>> window.load(), window.covers_s
    (((4,),), 60.0)
    """

    def __init__(self, now: float) -> None:
        self._last: dict[str, LoadLE] = {}
        self._total_LE: LoadLE | None = None
        self._marks: deque[tuple[float, LoadLE | None]] = deque([(now, None)])
        """(time, total then): the window reaches from the first to the last."""
        self._part_s = 1.0

    def note(self, pod_uid: str, load_LE: LoadLE, *, counted_before: bool = False) -> None:
        """`counted_before`: the pod is heard of for the first time, and has counted for long."""
        before = self._last.get(pod_uid)
        self._last[pod_uid] = load_LE
        if before is None and counted_before:
            return
        if before is None or before.shape != load_LE.shape:
            before = np.zeros_like(load_LE)
        if self._total_LE is None or self._total_LE.shape != load_LE.shape:  # another model
            self._total_LE = np.zeros_like(load_LE)
            self._marks = deque((time, None) for time, _ in self._marks)
        self._total_LE = self._total_LE + np.maximum(load_LE - before, 0)

    def forget(self, pod_uid: str) -> None:
        """The pod is gone; what it counted stays counted."""
        self._last.pop(pod_uid, None)

    def tick(self, now: float, *, length_s: float) -> None:
        self._part_s = length_s / PARTS
        if now - self._marks[-1][0] >= self._part_s:
            self._marks.append((now, self._total_LE))
        while len(self._marks) > 1 and self._marks[-1][0] - self._marks[1][0] >= length_s:
            self._marks.popleft()

    @property
    def covers_s(self) -> float:
        """In whole parts: a clock's jitter is no news."""
        return round((self._marks[-1][0] - self._marks[0][0]) / self._part_s) * self._part_s

    def load(self) -> tuple[tuple[int, ...], ...]:
        """[L][E] tokens; empty when none was counted in the window."""
        began_LE, ended_LE = self._marks[0][1], self._marks[-1][1]
        if ended_LE is None:
            return ()
        load_LE = ended_LE if began_LE is None else ended_LE - began_LE
        rows: list[list[int]] = load_LE.tolist() if load_LE.any() else []
        return tuple(map(tuple, rows))
