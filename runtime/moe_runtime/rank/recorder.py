"""A rank's routing trace: what its tokens chose in each committed step, in lines (moe_core.contract.trace) of one file.

The step's thread hands over copies and never waits. Lines are made and written by a thread of its own, so that a folder
that answers slowly, or not at all, costs records and no step.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moe_core.contract.runtime_config import TraceConfig
from moe_core.contract.trace import TraceRecord, trace_file

MOST_WAITING_BYTES = 64 << 20
"""Picks that may wait to be written; what comes on top is left out."""


@dataclass(frozen=True, slots=True)
class _Step:
    """layers: (MoE layer, [T, K] logical experts)."""

    number: int
    layers: tuple[tuple[int, npt.NDArray[np.int32]], ...]

    @property
    def num_bytes(self) -> int:
        return sum(picks_TK.nbytes for _, picks_TK in self.layers)


class Recorder:
    """One pod's file. `step` (set before each step) is the number under which the group knows the step that is next.

    `problem` says why records are being left out; empty while none are.
    """

    def __init__(self, config: TraceConfig, *, name: str, rank: int, pod_uid: str, say: Callable[[str], None]) -> None:
        self.path = Path(config.folder) / trace_file(name, rank=rank, pod_uid=pod_uid)
        self.step = 0
        self.problem = ""
        self._every, self._max_bytes, self._rank, self._say = config.every_steps, config.max_bytes, rank, say
        self._news = threading.Condition()
        self._waiting: deque[_Step] = deque()
        self._waiting_bytes = 0
        self._left_out = 0
        self._is_full = False
        threading.Thread(target=self._write_all, name="routing-trace", daemon=True).start()

    def take(self, routed: Sequence[tuple[int, torch.Tensor]]) -> None:
        """What a committed step has routed: (MoE layer, expert_TK), a layer may come in several parts."""
        if self._is_full or self.step % self._every or not routed:
            return
        picks_N = torch.cat([expert_TK.reshape(-1) for _, expert_TK in routed])
        on_host_N = picks_N.to(torch.int32).cpu().numpy()  # device sync: picks to the host
        step = _Step(self.step, _layers(routed, on_host_N))
        with self._news:
            if self._waiting and self._waiting_bytes + step.num_bytes > MOST_WAITING_BYTES:
                self._leave_out(f"{self.path} is written more slowly than steps are made")
                return
            self._waiting.append(step)
            self._waiting_bytes += step.num_bytes
            self._news.notify()

    def _write_all(self) -> None:
        while not self._is_full:
            with self._news:
                self._news.wait_for(lambda: bool(self._waiting))
                step = self._waiting[0]
            self._write(step)
            with self._news:
                self._waiting.popleft()
                self._waiting_bytes -= step.num_bytes

    def _write(self, step: _Step) -> None:
        """The step's lines, all or none of them."""
        lines = b"".join(_line(step.number, self._rank, *layer) for layer in step.layers)
        size = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                size = file.tell()
                self._is_full = size + len(lines) > self._max_bytes
                if not self._is_full:
                    file.write(lines)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            with self._news:
                self._leave_out(f"{self.path}: {error.strerror}")
            return
        with self._news:
            if self._is_full:
                self._say(f"records no more routing: {self.path} has {size} of at most {self._max_bytes} bytes")
            elif self.problem and len(self._waiting) == 1:
                self._say(f"records routing again, {self._left_out} steps were left out")
                self.problem, self._left_out = "", 0

    def _leave_out(self, why: str) -> None:
        self._left_out += 1
        problem = f"routing is not recorded: {why}"
        if problem != self.problem:
            self.problem = problem
            self._say(problem)


def _layers(
    routed: Sequence[tuple[int, torch.Tensor]], picks_N: npt.NDArray[np.int32]
) -> tuple[tuple[int, npt.NDArray[np.int32]], ...]:
    """All picks cut into layers again, parts of one layer put together; layers without tokens are left out."""
    parts: dict[int, list[npt.NDArray[np.int32]]] = {}
    first = 0
    for layer_idx, expert_TK in routed:
        parts.setdefault(layer_idx, []).append(picks_N[first : first + expert_TK.numel()].reshape(expert_TK.shape))
        first += expert_TK.numel()
    joined = {layer_idx: np.concatenate(found) for layer_idx, found in sorted(parts.items())}
    return tuple((layer_idx, picks_TK) for layer_idx, picks_TK in joined.items() if len(picks_TK))


def _line(step: int, rank: int, layer_idx: int, picks_TK: npt.NDArray[np.int32]) -> bytes:
    num_tokens, top_k = picks_TK.shape
    record = TraceRecord.model_construct(  # unchecked: a router names no expert that is not there
        step=step, layer=layer_idx, rank=rank, num_tokens=num_tokens, topk=top_k, top_indices=picks_TK.tolist()
    )
    return record.line().encode() + b"\n"
