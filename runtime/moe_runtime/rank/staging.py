"""Slots of a coming map, brought into memory beside the ones in use, so that the change itself is a swap."""

import threading
import time
from collections.abc import Callable

from moe_core.contract.expert_map import ExpertMap
from moe_runtime.engine.model import ExpertParallelModel, StagedSlots
from moe_runtime.rank.work import ModelUnusable, loading

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0


class Staging:
    """At most one map is staged or on its way. (A trainer reads what it needs from its snapshot after the swap.)

    One that cannot be staged is tried again, later each time; `problem` says why it is not there yet.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._staged: StagedSlots | None = None
        self._busy_digest = ""
        self._failed_digest = ""
        self._retry_s = 0.0
        self._not_before = 0.0
        self.problem = ""

    @property
    def digest(self) -> str:
        """Of the map that is ready to be swapped in; empty for none."""
        staged = self._staged
        return staged.expert_map.digest if staged is not None else ""

    def want(self, expert_map: ExpertMap, epm: ExpertParallelModel, *, wait: bool) -> bool:
        """Begin to stage `expert_map` unless it is in force, staged, on its way or has failed a moment ago; whether it
        was begun. `wait`: be done on return."""
        digest = expert_map.digest
        with self._lock:
            if digest == epm.expert_map.digest:
                self._staged, self._failed_digest, self.problem = None, "", ""
                return False
            if digest in (self.digest, self._busy_digest):
                return False
            if digest == self._failed_digest and self._clock() < self._not_before:
                return False
            self._busy_digest = digest
        if wait:
            self._stage(expert_map, epm)
        else:
            threading.Thread(target=self._stage, args=(expert_map, epm), name="staging", daemon=True).start()
        return True

    def take(self, digest: str) -> StagedSlots | None:
        with self._lock:
            staged = self._staged
            if staged is None or staged.expert_map.digest != digest:
                return None
            self._staged = None
            return staged

    def staged(self, digest: str) -> StagedSlots | None:
        """What `take` would give, left where it is."""
        with self._lock:
            return self._staged if self._staged is not None and self._staged.expert_map.digest == digest else None

    def reject(self, digest: str, problem: str) -> None:
        """What is staged is not to be used: it will be staged anew, later."""
        with self._lock:
            if self._staged is not None and self._staged.expert_map.digest == digest:
                self._staged = None
            self._note(digest, problem)

    def _stage(self, expert_map: ExpertMap, epm: ExpertParallelModel) -> None:
        staged, problem = None, ""
        try:
            with loading(f"map {expert_map.digest} cannot be staged"):
                staged = epm.stage(expert_map)
        except (ModelUnusable, OSError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        with self._lock:
            if self._busy_digest == expert_map.digest:
                self._busy_digest = ""
                self._staged = staged
                self._note(expert_map.digest, problem)

    def _note(self, digest: str, problem: str) -> None:
        self.problem = problem
        again = digest == self._failed_digest and bool(self._retry_s)
        self._failed_digest = digest if problem else ""
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S) if again else FIRST_RETRY_S
        self._not_before = self._clock() + self._retry_s
