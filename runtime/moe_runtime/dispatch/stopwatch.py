"""How long this rank's experts take for how many rows: what one pick costs, which a rebalance has to know."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Over all layers since the start. On a GPU the work is only put on a queue: events say when it was done."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device.startswith("cuda")
        self._seconds = 0.0
        self._rows = 0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, num_rows: int) -> Iterator[None]:
        self._rows += num_rows
        if self._is_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            yield
            ended.record()
            self._open.append((began, ended))
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def read(self) -> tuple[float, int]:
        """(seconds, rows)."""
        for began, ended in self._open:
            ended.synchronize()  # device sync: of work that a committed step has already waited for
            self._seconds += began.elapsed_time(ended) / 1000
        self._open.clear()
        return self._seconds, self._rows
