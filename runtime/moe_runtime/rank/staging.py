"""Slots of a coming map, brought into memory beside the ones in use, so that the change itself is a swap."""

import threading

from moe_core.contract.expert_map import ExpertMap
from moe_core.outcome import InvalidInput
from moe_runtime.engine.model import ExpertParallelModel, StagedSlots


class Staging:
    """At most one map is staged or on its way. (A trainer reads what it needs from its snapshot after the swap.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._staged: StagedSlots | None = None
        self._busy_digest = ""
        self.problem = ""

    @property
    def digest(self) -> str:
        """Of the map that is ready to be swapped in; empty for none."""
        staged = self._staged
        return staged.expert_map.digest if staged is not None else ""

    def want(self, expert_map: ExpertMap, epm: ExpertParallelModel, *, wait: bool) -> None:
        """Begin to stage `expert_map` unless it is in force, staged or on its way; `wait`: be done on return."""
        with self._lock:
            if expert_map.digest == epm.expert_map.digest:
                self._staged = None
                return
            if expert_map.digest in (self.digest, self._busy_digest):
                return
            self._busy_digest = expert_map.digest
        if wait:
            self._stage(expert_map, epm)
        else:
            threading.Thread(target=self._stage, args=(expert_map, epm), name="staging", daemon=True).start()

    def take(self, digest: str) -> StagedSlots | None:
        with self._lock:
            staged = self._staged
            if staged is None or staged.expert_map.digest != digest:
                return None
            self._staged = None
            return staged

    def _stage(self, expert_map: ExpertMap, epm: ExpertParallelModel) -> None:
        staged: StagedSlots | None = None
        try:
            staged = epm.stage(expert_map)
        except (InvalidInput, OSError) as error:
            self.problem = f"map {expert_map.digest} cannot be staged: {error}"
        with self._lock:
            if self._busy_digest == expert_map.digest:
                self._busy_digest = ""
                self._staged = staged
