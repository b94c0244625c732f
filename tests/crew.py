"""Processes that do what they are told, all at once, and say how long it took: the ranks of a bench, and its baseline.

A bench gives each crew a `make(rank, store_path, **arguments)` that returns ways of doing one thing by name. The crews
live side by side and work in turn, A B A B, so that a busy machine slows both; a crew that has no turn waits in a
pipe and takes no processor time.
"""

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from gloo_ranks import PRELOAD

Ways = Mapping[str, Callable[[], object]]
ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Timing:
    """One turn: wall_s of the slowest process, cpu_s of all of them together, per repeat."""

    wall_s: float
    cpu_s: float


def _serve(make: Callable[..., Ways], connection: Connection, threads: int, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(threads)
    try:
        ways = make(**arguments)
        connection.send("ready")
        while (order := connection.recv()) is not None:
            name, repeats = order
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                answer = ways[name]()
            connection.send(
                ((time.perf_counter() - began) / repeats, (time.process_time() - cpu_began) / repeats, answer)
            )
    except BaseException:  # noqa: BLE001 - whatever went wrong belongs in the bench's output
        connection.send(traceback.format_exc())


class Crew:
    """`members` processes of `threads` threads each."""

    def __init__(
        self, make: Callable[..., Ways], *, members: int, store_path: str, threads: int = 1, **arguments: Any
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(members):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(make, there, threads, {"rank": rank, "store_path": store_path, **arguments}),
                daemon=True,
            )
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)
        for end in self._ends:
            said = self._hear(end)
            assert said == "ready", said

    def _hear(self, end: Connection) -> Any:
        assert end.poll(ANSWER_S), f"no answer in {ANSWER_S:.0f} s"
        said = end.recv()
        assert said == "ready" or not isinstance(said, str), said
        return said

    def run(self, name: str, *, repeats: int = 1) -> tuple[Timing, list[Any]]:
        """One turn; what the last repeat gave comes along, by rank."""
        for end in self._ends:
            end.send((name, repeats))
        said = [self._hear(end) for end in self._ends]
        return Timing(max(s[0] for s in said), sum(s[1] for s in said)), [s[2] for s in said]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(5)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile: machines that others use too have long tails."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def shown(values: list[float], *, digits: int = 2) -> str:
    """`1.31 (1.28-1.35)`: median and quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
