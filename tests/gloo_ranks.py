"""Real rank processes over real Gloo for tests: forked from one preloaded process, bounded in time, killed at the end.

`run_ranks(task, num_ranks=4, ...)` calls `task(rank, store_path, **arguments)` in every process and returns the results by rank; a rank that
died has none. Tasks live in importable modules (tests/ is on the path), because processes are started by name.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import AllreduceOptions, AllToAllOptions, FileStore, PrefixStore, ProcessGroupGloo

from moe_runtime.errors import GroupFault

PRELOAD = [
    "torch",
    "torch.distributed",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "moe_runtime.engine.model",
]


class GlooGroup:
    """The data plane's Group over a FileStore."""

    def __init__(self, store_path: str, *, ranks: Sequence[int], rank: int, epoch: int = 1, timeout_s: float = 20) -> None:
        self.ranks, self.size, self.position = tuple(ranks), len(ranks), list(ranks).index(rank)
        self._timeout = timedelta(seconds=timeout_s)
        store = PrefixStore(f"epoch{epoch}", FileStore(store_path, -1))
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = self._timeout
        self._group = ProcessGroupGloo(store, self.position, self.size, options)

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        options = AllToAllOptions()
        options.timeout = self._timeout
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        try:
            self._group.alltoall_base(received, rows, list(receive_counts), list(send_counts), options).wait()
        except RuntimeError as error:
            raise GroupFault(f"all_to_all: {error}") from error
        return received

    def all_gather_ints(self, row: Sequence[int]) -> list[list[int]]:
        sent = torch.tensor([list(row)] * self.size)
        gathered: list[list[int]] = self.all_to_all(sent, [1] * self.size, [1] * self.size).tolist()
        return gathered

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        options = AllreduceOptions()
        options.timeout = self._timeout
        try:
            self._group.allreduce([tensor], options).wait()
        except RuntimeError as error:
            raise GroupFault(f"all_reduce: {error}") from error


def _main(task: Callable[..., Any], connection: Connection, rank: int, store_path: str, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    try:
        connection.send((True, task(rank, store_path, **arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))


def run_ranks(
    task: Callable[..., Any], *, num_ranks: int, store_path: str, timeout_s: float = 90, **arguments: Any
) -> dict[int, Any]:
    """Results by rank; ranks that died are missing. Raises AssertionError with the traceback of a rank that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ends: dict[Connection, int] = {}
    processes = []
    results: dict[int, Any] = {}
    try:
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(task, there, rank, store_path, arguments), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            ends[here] = rank
        deadline = time.monotonic() + timeout_s
        while ends and time.monotonic() < deadline:
            for ready in wait(list(ends), timeout=0.5):
                assert isinstance(ready, Connection)
                rank = ends.pop(ready)
                try:
                    ok, value = ready.recv()
                except EOFError:
                    continue
                assert ok, f"rank {rank}:\n{value}"
                results[rank] = value
        assert not ends, f"ranks {sorted(ends.values())} did not finish in {timeout_s} s"
    finally:
        for process in processes:
            process.kill()
            process.join(5)
    return results
